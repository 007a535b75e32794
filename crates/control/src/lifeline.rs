//! Ranks die with their launcher, even when that is killed with SIGKILL, or with each other where they have none.
//!
//! Two means, because each has a hole. The kernel's parent-death signal ([`prepare_child`]) is prompt, but it does not
//! reach children of children. The lifeline is a pipe whose write end only the launcher holds: when the launcher is
//! gone, in whatever way, every reader sees the hang-up, and a native thread in each rank ([`watch`]) ends that rank,
//! whatever its other threads are doing.
//!
//! Ranks that `mpirun` or `srun` starts inherit no pipe. For them a connection to the store is the lifeline
//! ([`watch_store`]), both ways: they end when the store is gone, and the store tells the others when one of them is.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, Signal};

use crate::error_file::ErrorRecord;
use crate::store::Store;
use crate::{ControlError, ExitStatus, failures, stop};

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

    /// One more read end, for a process that is given it as its stdin and reads to the end.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn try_clone_read_end(&self) -> Result<OwnedFd, ControlError> {
        self.read_end.try_clone().map_err(|source| ControlError::system("cannot hand on the lifeline pipe", source))
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

/// How much longer than it may wait itself the store has for a reply to a rank that is ending: a store whose process is
/// suspended keeps nobody.
const PARTING_SLACK: Duration = Duration::from_secs(3);

/// How long what is to be done at a loss may take, before the rank ends all the same.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(2);

/// Why [`watch_store`] ends a rank.
#[derive(Debug)]
pub enum Loss {
    /// The store, and so the process that served it, is gone.
    Store(ControlError),
    /// Ranks have failed; what is known of them, in the order in which it came.
    Ranks(Vec<ErrorRecord>),
}

/// A rank's watch over the store. Keep it as long as the rank belongs to the run, and then let it go: a process that ends
/// without that has failed.
#[derive(Debug)]
pub struct StoreLifeline {
    will: Store,
    watch: TcpStream,
    is_over: Arc<AtomicBool>,
}

/// Ends this process soon after the store at `addr` is gone, or after another rank has failed and this one has not ended
/// within `grace`: it calls `on_loss`, which has 2 s for last words and gives the exit
/// status. If this process ends
/// without [`StoreLifeline::let_go`], `last_will` is added to the [`crate::failures`] for it.
///
/// A host that is gone without a packet is noticed within about 4 s.
///
/// # Errors
/// The store cannot be reached within `timeout`, or no thread can be started.
pub fn watch_store(
    addr: (&str, u16),
    timeout: Duration,
    grace: Duration,
    last_will: &ErrorRecord,
    on_loss: impl FnOnce(Loss) -> ExitStatus + Send + 'static,
) -> Result<StoreLifeline, ControlError> {
    let mut will = Store::connect(addr, timeout)?.with_reply_slack(PARTING_SLACK);
    will.will(failures::KEY, &failures::line(last_will))?;
    let store = Store::connect(addr, timeout)?;
    let failed = |source| ControlError::system("cannot start the lifeline thread", source);
    let watch = store.stream().try_clone().map_err(failed)?;
    let is_over = Arc::new(AtomicBool::new(false));
    let is_over_here = Arc::clone(&is_over);
    let wait = move || {
        let loss = wait_for_loss(store, grace, &is_over_here);
        if is_over_here.load(Ordering::Acquire) {
            return;
        }
        // In a thread of its own, because it may come to wait for what other threads hold.
        let (send, receive) = std::sync::mpsc::channel();
        let _ = std::thread::Builder::new().name("last-words".into()).spawn(move || send.send(on_loss(loss)));
        let status = receive.recv_timeout(LAST_WORDS_DEADLINE).unwrap_or(ExitStatus::Failed);
        // SAFETY: `_exit` has no preconditions. Not `exit`: its handlers could wait for threads that are stuck.
        unsafe { libc::_exit(status.code()) }
    };
    std::thread::Builder::new().name("lifeline".into()).spawn(wait).map_err(failed)?;
    Ok(StoreLifeline { will, watch, is_over })
}

/// Returns when the store or a rank is lost, or when `is_over`.
fn wait_for_loss(mut store: Store, grace: Duration, is_over: &AtomicBool) -> Loss {
    const LONG: Duration = Duration::from_secs(3600);
    loop {
        match store.get(failures::KEY, LONG) {
            Ok(_) => break,
            Err(ControlError::KeyTimeout { .. }) => continue,
            Err(error) => return Loss::Store(error),
        }
    }
    let start = Instant::now();
    while start.elapsed() < grace && !is_over.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(20));
    }
    match failures::list(&mut store.with_reply_slack(PARTING_SLACK)) {
        Ok(records) => Loss::Ranks(records),
        Err(error) => Loss::Store(error),
    }
}

impl StoreLifeline {
    /// This rank's part of the run is over, and it ends by itself: nothing is watched any more.
    pub fn let_go(mut self) {
        self.is_over.store(true, Ordering::Release);
        // An error means that the store is gone, and with it whoever could take this end for a failure.
        let _ = self.will.will(failures::KEY, b"");
        let _ = self.watch.shutdown(std::net::Shutdown::Both);
    }
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

/// Prepares `command` to start `mpirun`, which starts the ranks: it gets a process group of its own, and SIGTERM when the
/// launcher dies, on which it ends its ranks. Ranks inherit nothing through it; see [`watch_store`].
///
/// Spawn from the main thread, as for [`prepare_child`].
pub fn prepare_mpirun(command: &mut Command) {
    let launcher = rustix::process::getpid();
    let before_exec = move || -> io::Result<()> {
        rustix::process::setpgid(None, None)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        if rustix::process::getppid() != Some(launcher) {
            return Err(Errno::SRCH.into()); // the launcher died before the signal was set
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates nor takes a lock.
    unsafe { command.pre_exec(before_exec) };
}

/// Prepares `command` to start a process that outlives the launcher, to end what it leaves: it gets a process group of its
/// own, and the signals that ask to stop blocked until it calls [`stop::StopFlag::install`].
pub fn prepare_guard(command: &mut Command) {
    let before_exec = || -> io::Result<()> {
        rustix::process::setpgid(None, None)?;
        stop::block_signals()
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
