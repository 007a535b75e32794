//! The worker's binary: where it is, and what it was built with.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use xxhash_rust::xxh3::Xxh3;

use crate::failure::Failure;

/// The binary, beside the launcher's own.
const NAME: &str = "fsdp-train";

/// # Errors
/// It is not there, or is no program.
pub fn find() -> Result<PathBuf, Failure> {
    let own =
        std::env::current_exe().map_err(|e| Failure::failed(format!("cannot find the launcher's own path: {e}")))?;
    let worker = own.with_file_name(NAME);
    match rustix::fs::access(&worker, rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(worker),
        Err(error) => Err(Failure::failed(format!(
            "{}: expected the worker's binary beside fsdp-launch, got: {error}; build both with cargo build --release",
            worker.display()
        ))),
    }
}

/// A digest of the binary: the same on all nodes, or they do not compute the same.
///
/// # Errors
/// It cannot be read.
pub fn digest(worker: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::failed(format!("cannot read {}: {error}", worker.display()));
    let mut file = File::open(worker).map_err(failed)?;
    let mut digest = Xxh3::new();
    let mut bytes = vec![0; 1 << 20];
    loop {
        match file.read(&mut bytes).map_err(failed)? {
            0 => return Ok(format!("{:032x}", digest.digest128())),
            num => digest.update(&bytes[..num]),
        }
    }
}

/// Asks the binary whether it knows MPI.
///
/// # Errors
/// It does not, or does not run here.
pub fn check_mpi() -> Result<(), Failure> {
    let worker = find()?;
    let output = Command::new(&worker).arg("--features").stdin(Stdio::null()).output();
    let output = output.map_err(|e| Failure::failed(format!("cannot run {}: {e}", worker.display())))?;
    let features = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(Failure::failed(format!(
            "{} --features: expected the back ends that it was built with, got {}: {}",
            worker.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    if features.lines().any(|feature| feature == "mpi") {
        return Ok(());
    }
    Err(Failure::bad_input(format!(
        "backend \"mpi\": expected {} to be built with MPI, got one with {}; build it with cargo build --release --features \
         fsdp-train/mpi",
        worker.display(),
        features.lines().collect::<Vec<_>>().join(", ")
    )))
}
