//! The end of a child process, with what the system knows of its memory.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::Pid;

/// Waits for the end of the child `pid` and takes it: how it ended, and the most memory that it had at a time (resident, in
/// bytes; what the process had in common with others included).
///
/// # Errors
/// `pid` is no child of this process, or somebody else has taken its end.
pub fn wait(pid: Pid) -> io::Result<(ExitStatus, u64)> {
    loop {
        let mut status = 0;
        // SAFETY: `rusage` is plain data, for which all zeros are valid, and which `wait4` overwrites.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to this frame.
        match unsafe { libc::wait4(pid.as_raw_nonzero().get(), &mut status, 0, &mut usage) } {
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            _ => return Ok((ExitStatus::from_raw(status), usage.ru_maxrss.cast_unsigned() * 1024)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn status_and_peak_memory_are_the_child_s_own() {
        for (script, code, signal) in [("exit 7", Some(7), None), ("kill -9 $$", None, Some(9))] {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let (status, peak_bytes) = wait(Pid::from_child(&child)).unwrap();
            assert!(child.wait().is_err(), "its end is taken");
            assert_eq!((status.code(), status.signal()), (code, signal));
            assert!((100 << 10..200 << 20).contains(&peak_bytes), "{peak_bytes}");
        }
        assert!(wait(Pid::INIT).is_err());
    }
}
