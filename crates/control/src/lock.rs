//! One run at a time has an output folder: an advisory lock on the file `lock` in it, which names the holder.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::{ControlError, host_name};

/// Longest name of a holder that is read, in bytes.
const MAX_HOLDER_BYTES: u64 = 1000;

/// The lock, held until dropped, or until this process is gone in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the folder `dir`, for a process of `program`. Where the file system has no locks, it says so on
    /// stderr and goes on without one.
    ///
    /// # Errors
    /// [`ControlError::Locked`] if another run holds it; or the file cannot be written.
    pub fn take(dir: &Path, program: &str) -> Result<Self, ControlError> {
        let path = dir.join("lock");
        let failed = |source: io::Error| ControlError::LockFile { path: path.clone(), source };
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // Whatever it says, somebody holds it.
                let _ = file.take(MAX_HOLDER_BYTES).read_to_string(&mut holder);
                return Err(ControlError::Locked { dir: dir.to_owned(), holder: holder.trim().to_owned() });
            }
            Err(error) if is_unsupported(error) => {
                // A run that nobody disturbs needs no lock.
                let _ = writeln!(
                    io::stderr(),
                    "{program}: warning: {}: this file system has no locks ({error}): see to it yourself that no two runs \
                     use this folder at a time",
                    path.display()
                );
            }
            Err(error) => return Err(failed(error.into())),
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "{program} (pid {} on host {})", std::process::id(), host_name()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Lustre without `-o flock`, NFS without its lock service, and others.
fn is_unsupported(error: Errno) -> bool {
    [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK].contains(&error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_locks_is_told_from_a_folder_that_is_in_use() {
        for (error, expected) in [
            (Errno::NOSYS, true),
            (Errno::OPNOTSUPP, true),
            (Errno::NOLCK, true),
            (Errno::WOULDBLOCK, false),
            (Errno::IO, false),
        ] {
            assert_eq!(is_unsupported(error), expected, "{error}");
        }
    }

    #[test]
    fn a_second_run_is_refused_and_told_who_holds_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        // What an earlier holder left counts for nothing.
        std::fs::write(dir.path().join("lock"), "somebody (pid 1 on host of a longer name)\n".repeat(3)).unwrap();
        let lock = Lock::take(dir.path(), "fsdp-train").unwrap();
        let message = Lock::take(dir.path(), "fsdp-launch").unwrap_err().to_string();
        let holder = format!("in use by fsdp-train (pid {} on host {})", std::process::id(), host_name());
        assert!(message.contains(&holder) && message.contains("--set output.dir="), "{message}");
        drop(lock);
        Lock::take(dir.path(), "fsdp-launch").unwrap();
    }

    #[test]
    fn a_folder_that_is_missing_is_named() {
        let message = Lock::take(Path::new("/nonexistent"), "fsdp-train").unwrap_err().to_string();
        assert!(message.starts_with("/nonexistent/lock: expected a lock file that can be written"), "{message}");
    }
}
