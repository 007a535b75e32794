//! Signals to the launcher, as bytes in three pipes that its loop waits for.

use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::low_level::pipe;

/// The pipes' reading ends; the other ends belong to the signal handlers, for the rest of the process's life.
#[derive(Debug)]
pub struct Signals {
    /// SIGINT, a byte each.
    interrupts: UnixStream,
    /// SIGTERM, SIGHUP, a byte each.
    stops: UnixStream,
    /// SIGUSR1, SIGUSR2, a byte each.
    notices: UnixStream,
    num_interrupts: usize,
}

/// What arrived since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    Nothing,
    /// A wish to stop: however often it is repeated, it stays one. Whoever sends SIGTERM, SIGINT or SIGHUP kills soon after;
    /// SIGUSR1 and SIGUSR2 come from schedulers as early as the user wants (`--signal=USR1@600`), and have no deadline.
    Stop {
        has_deadline: bool,
    },
    /// Ctrl-C pressed again at a terminal: the person does not want to wait.
    Force,
}

impl Signals {
    /// Takes over the five signals, but leaves SIGHUP alone where it is ignored: that is how `nohup` keeps a run going
    /// after its terminal is gone.
    pub fn install() -> io::Result<Self> {
        let (interrupts, interrupts_writer) = UnixStream::pair()?;
        let (stops, stops_writer) = UnixStream::pair()?;
        let (notices, notices_writer) = UnixStream::pair()?;
        pipe::register(SIGINT, interrupts_writer)?;
        if !is_ignored(SIGHUP)? {
            pipe::register(SIGHUP, stops_writer.try_clone()?)?;
        }
        pipe::register(SIGTERM, stops_writer)?;
        pipe::register(SIGUSR1, notices_writer.try_clone()?)?;
        pipe::register(SIGUSR2, notices_writer)?;
        for reader in [&interrupts, &stops, &notices] {
            reader.set_nonblocking(true)?;
        }
        Ok(Self { interrupts, stops, notices, num_interrupts: 0 })
    }

    /// Readable when a signal has arrived.
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.interrupts.as_fd(), self.stops.as_fd(), self.notices.as_fd()]
    }

    pub fn take(&mut self) -> Arrived {
        let num_stops = drain(&mut self.stops);
        let num_notices = drain(&mut self.notices);
        let new_interrupts = drain(&mut self.interrupts);
        self.num_interrupts += new_interrupts;
        // Schedulers and wrappers repeat SIGINT too; only a person's second one means more than the first.
        if new_interrupts > 0 && self.num_interrupts > 1 && io::stdin().is_terminal() {
            Arrived::Force
        } else if new_interrupts + num_stops > 0 {
            Arrived::Stop { has_deadline: true }
        } else if num_notices > 0 {
            Arrived::Stop { has_deadline: false }
        } else {
            Arrived::Nothing
        }
    }
}

/// Whether this process ignores `signal`.
fn is_ignored(signal: i32) -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    Ok(mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1))
}

/// Empties the pipe; returns the number of bytes.
fn drain(pipe: &mut UnixStream) -> usize {
    let mut total = 0;
    let mut bytes = [0; 64];
    while let Ok(num @ 1..) = pipe.read(&mut bytes) {
        total += num;
    }
    total
}
