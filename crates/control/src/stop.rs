//! Signals that ask a process to stop set a flag, and nothing else: what stopping means is decided between two steps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::ControlError;

/// The signals that ask to stop.
const SIGNALS: [i32; 5] = [SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2];

/// Set once SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 has arrived. Clones share the flag.
///
/// More signals change nothing: schedulers send them twice.
#[derive(Clone, Debug)]
pub struct StopFlag {
    /// The last such signal's number; 0 = none yet.
    signal: Arc<AtomicUsize>,
}

impl StopFlag {
    /// Takes over the five signals for the rest of the process's life.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn install() -> Result<Self, ControlError> {
        let failed = |source| ControlError::system("cannot install signal handlers", source);
        let signal = Arc::new(AtomicUsize::new(0));
        for number in SIGNALS {
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize).map_err(failed)?;
        }
        change_mask(libc::SIG_UNBLOCK).map_err(failed)?;
        Ok(StopFlag { signal })
    }

    pub fn is_set(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// Name of the signal that set the flag, for messages.
    pub fn signal_name(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            number => signal_hook::low_level::signal_name(number as i32),
        }
    }
}

/// Blocks the five signals in this thread. Makes system calls only, so it may run between fork and exec.
pub(crate) fn block_signals() -> io::Result<()> {
    change_mask(libc::SIG_BLOCK)
}

fn change_mask(how: libc::c_int) -> io::Result<()> {
    // SAFETY: `sigset_t` is plain data that `sigemptyset` initialises; all pointers are to this frame or null.
    let error = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for number in SIGNALS {
            libc::sigaddset(&mut set, number);
        }
        libc::pthread_sigmask(how, &set, std::ptr::null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}
