/// Tells the linker where the binaries of this crate find libtorch at run time. Each crate whose binaries, tests or
/// examples link libtorch includes this file in its build script, because cargo hands `rustc-link-arg` of a
/// dependency to nobody:
///
/// ```ignore
/// include!("../../scripts/rpath.rs");
/// fn main() { emit() }
/// ```
fn emit() {
    // Relative to target/release/x, then to target/release/deps/x and target/release/examples/x: a moved checkout runs.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../../.deps/libtorch/lib");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../../../.deps/libtorch/lib");
    // Absolute: for a target folder elsewhere, and for a LIBTORCH of the user's own (else .cargo/config.toml sets it).
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
    }
}
