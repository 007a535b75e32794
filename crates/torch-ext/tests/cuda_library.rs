//! libtorch's CUDA half, loaded for real: in child processes of their own, as libtorch looks for it once and as the
//! library path is read at a process's start. Without the test harness, whose threads would be in the way.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fsdp_torch_ext::accelerator;
use tch::Device;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("load") => child(true),
        Some("late") => child(false),
        _ => {
            without_the_library_the_error_says_what_to_install();
            with_the_library_cuda_is_known();
        }
    }
}

/// Loads the library, first or too late, and says what libtorch then knows of CUDA.
fn child(first: bool) {
    if !first {
        println!("{} devices", accelerator::device_count().unwrap());
    }
    if let Err(error) = accelerator::load_cuda() {
        println!("{error}");
        return;
    }
    accelerator::load_cuda().expect("a second time");
    println!("loaded, {} devices", accelerator::device_count().unwrap());
    println!("driver: {}", accelerator::driver_device_count().map_or_else(|e| e.message, |n| format!("{n} devices")));
    if !accelerator::is_available() {
        println!("device 0: {}", accelerator::device_info(0).unwrap_err());
        let tensor = tch::Tensor::f_zeros([1], (tch::Kind::Float, Device::Cuda(0))).unwrap_err().to_string();
        println!("tensor: {}", tensor.lines().next().unwrap_or_default());
    } else {
        println!("device 0: {:?}", accelerator::device_info(0).unwrap());
    }
}

fn run(how: &str, library_path: Option<&Path>) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(how).env_remove("LD_LIBRARY_PATH");
    if let Some(path) = library_path {
        command.env("LD_LIBRARY_PATH", path);
    }
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{how}: {status}, {text}{}", String::from_utf8_lossy(&stderr));
    println!("{how} with {library_path:?}:\n{text}");
    text
}

fn without_the_library_the_error_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    if !beside_libtorch_cpu() {
        let text = run("load", Some(folder.path()));
        for part in ["accelerator::load_cuda: libtorch_cuda.so is neither on LD_LIBRARY_PATH nor in /", "torch 2.11.0"]
        {
            assert!(text.contains(part), "{text}");
        }
    }
    // Found, but no library.
    std::fs::write(folder.path().join("libtorch_cuda.so"), "text").unwrap();
    let text = run("load", Some(folder.path()));
    assert!(text.contains("libtorch_cuda.so cannot be loaded: ") && text.contains("file too short"), "{text}");
}

fn with_the_library_cuda_is_known() {
    let Some(folder) = wheel() else {
        println!("skipped: no libtorch_cuda.so on LD_LIBRARY_PATH or under target/py-peer (scripts/peer-python.sh)");
        return;
    };
    let text = run("load", Some(&folder));
    assert!(text.starts_with("loaded, "), "{text}");
    if text.starts_with("loaded, 0") {
        // libtorch's own reason, not that its CUDA half is missing.
        assert!(text.contains("driver: no NVIDIA driver on this machine") || text.contains("driver: cu"), "{text}");
        assert!(!text.contains("CUDA library MUST"), "{text}");
    }
    let text = run("late", Some(&folder));
    assert!(text.contains("after libtorch had looked for it") || text.contains("loaded, "), "{text}");
}

/// The folder of a whole wheel.
fn wheel() -> Option<PathBuf> {
    let on_path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let pythons = std::fs::read_dir(root.join("target/py-peer/lib")).into_iter().flatten().flatten();
    let in_peer = pythons.map(|python| python.path().join("site-packages/torch/lib"));
    on_path.split(':').map(PathBuf::from).chain(in_peer).find(|folder| folder.join("libtorch_cuda.so").exists())
}

fn beside_libtorch_cpu() -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let cpu = maps.lines().find_map(|line| line.split_whitespace().nth(5).filter(|f| f.ends_with("/libtorch_cpu.so")));
    Path::new(cpu.expect("libtorch_cpu.so is loaded")).with_file_name("libtorch_cuda.so").exists()
}
