//! The worker that does to itself what `FSDP_FAULT` asks for; see `faults.rs`. For tests: nothing installs it.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    fsdp_train::main()
}
