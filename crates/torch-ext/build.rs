//! Compiles the C++ shim against the libtorch of `LIBTORCH` (scripts/setup.sh), and the row kernels once for each
//! x86-64 level they choose between at run time.

use std::path::PathBuf;

include!("../../scripts/rpath.rs");

fn main() {
    emit();
    println!("cargo:rerun-if-changed=cpp");

    let libtorch = std::env::var("LIBTORCH")
        .unwrap_or_else(|_| panic!("LIBTORCH is not set: run scripts/setup.sh, then build inside the repository"));
    let include = PathBuf::from(libtorch).join("include");
    cc::Build::new()
        .cpp(true)
        .flags(["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden"])
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files([
            "cpp/accelerator.cpp",
            "cpp/attention.cpp",
            "cpp/attention_cuda.cpp",
            "cpp/autograd.cpp",
            "cpp/cuda.cpp",
            "cpp/error.cpp",
            "cpp/kernels_attention.cpp",
            "cpp/kernels_loss.cpp",
            "cpp/kernels_mlp.cpp",
            "cpp/kernels_norm.cpp",
            "cpp/kernels_rope.cpp",
            "cpp/kernels_sum.cpp",
            "cpp/malloc.cpp",
            "cpp/optimizer.cpp",
            "cpp/pinned.cpp",
            "cpp/plain.cpp",
            "cpp/rows_dispatch.cpp",
            "cpp/stream.cpp",
        ])
        .compile("fsdp_torch_ext");

    let x86_64 = std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64");
    rows("rows_base", &[]);
    if x86_64 {
        rows("rows_v3", &["-march=x86-64-v3"]);
        rows("rows_v4", &["-march=x86-64-v4", "-mprefer-vector-width=512"]);
    }
}

/// Compiles cpp/rows.cpp as the kernel table `name`. That file includes no header with inline functions, so no code
/// of a higher level can be picked by the linker for a lower one.
fn rows(name: &str, level: &[&str]) {
    cc::Build::new()
        .cpp(true)
        .flags(["-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps"])
        .flags(level)
        .define("ROWS", name)
        .file("cpp/rows.cpp")
        .compile(name);
}
