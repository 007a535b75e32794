//! The worker's binary.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    fsdp_train::main()
}
