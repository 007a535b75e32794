//! Ranks die with their launcher, even when that is killed with SIGKILL.
//!
//! Two means, because each has a hole. The kernel's parent-death signal ([`prepare_child`]) is prompt, but it does not
//! reach children of children. The lifeline is a pipe whose write end only the launcher holds: when the launcher is
//! gone, in whatever way, every reader sees the hang-up, and a native thread in each rank ([`watch`]) ends that rank,
//! whatever its other threads are doing.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, Signal};

use crate::{ControlError, ExitStatus, stop};

/// The launcher's end. Keep it as long as the ranks are to live: dropping it ends them.
#[derive(Debug)]
pub struct Lifeline {
    read_end: OwnedFd,
    /// Close-on-exec, so that no child keeps the lifeline of its siblings alive.
    _write_end: OwnedFd,
}

impl Lifeline {
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> Result<Self, ControlError> {
        let (read_end, write_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|source| ControlError::system("cannot make the lifeline pipe", source))?;
        Ok(Lifeline { read_end, _write_end: write_end })
    }

    /// The descriptor that ranks inherit (through [`prepare_child`]) and give to [`watch`].
    pub fn inherit_fd(&self) -> RawFd {
        self.read_end.as_raw_fd()
    }
}

/// Ends this process with status 1 as soon as the launcher at the other end of `fd` is gone. Call once, early: takes
/// over the descriptor, and starts a thread.
///
/// # Errors
/// `fd` is not open, or no thread can be started.
pub fn watch(fd: RawFd) -> Result<(), ControlError> {
    let fd = take_inherited(fd, "lifeline")?;
    let hang_up = move || {
        let mut fds = [PollFd::new(&fd, PollFlags::empty())];
        loop {
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => continue,
                // Without the lifeline the rank would outlive its launcher: end it now rather than then.
                Err(_) => break,
            }
        }
        // SAFETY: `_exit` has no preconditions. Not `exit`: its handlers could wait for threads that are stuck.
        unsafe { libc::_exit(ExitStatus::Failed.code()) }
    };
    std::thread::Builder::new()
        .name("lifeline".into())
        .stack_size(64 * 1024)
        .spawn(hang_up)
        .map_err(|source| ControlError::system("cannot start the lifeline thread", source))?;
    Ok(())
}

/// Prepares `command` to start a rank: it gets a process group of its own (a terminal's Ctrl-C reaches the launcher
/// only), SIGKILL when the launcher dies, the descriptors `inherit` under their present numbers, and the signals that ask
/// to stop blocked until it calls [`stop::StopFlag::install`] (they come at any time, and their default is death).
///
/// Spawn from the main thread: the kernel ties the death signal to the *thread* that spawned.
pub fn prepare_child(command: &mut Command, inherit: &[RawFd]) {
    let inherit = inherit.to_vec();
    let launcher = rustix::process::getpid();
    let before_exec = move || -> io::Result<()> {
        rustix::process::setpgid(None, None)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(launcher) {
            return Err(Errno::SRCH.into()); // the launcher died before the signal was set
        }
        stop::block_signals()?;
        for &fd in &inherit {
            // SAFETY: the caller keeps the descriptors open until the spawn; borrowed only for this call.
            let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes a lock.
    unsafe { command.pre_exec(before_exec) };
}

/// Makes this process the parent of its descendants' orphans, so that it can end and reap what a dead rank left.
///
/// # Errors
/// The kernel is older than Linux 3.4.
pub fn become_subreaper() -> Result<(), ControlError> {
    rustix::process::set_child_subreaper(Some(Pid::INIT))
        .map_err(|source| ControlError::system("cannot become the reaper of orphans", source))
}

/// Owns a descriptor that the launcher passed by number; children of this process no longer inherit it.
pub(crate) fn take_inherited(fd: RawFd, what: &str) -> Result<OwnedFd, ControlError> {
    // SAFETY: borrowed for one call, which fails if the number is not open.
    let borrowed = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)
        .map_err(|source| ControlError::system(format!("{what} descriptor {fd} was not inherited"), source))?;
    // SAFETY: it is open (above), and the launcher's contract gives it to this process for this one use.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
