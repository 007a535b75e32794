//! One rank's process: its start, its pipes, its end.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use fsdp_control::env::WorkerEnv;
use fsdp_control::lifeline;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::output::{OutFile, Outlet, Tail};
use crate::{machine, processes};

/// How a rank is started.
#[derive(Debug)]
pub struct RankStart<'a> {
    /// The worker's binary.
    pub program: &'a Path,
    /// The resolved config, its one argument.
    pub config: &'a Path,
    pub env: WorkerEnv,
    /// Descriptors that it inherits.
    pub inherit: &'a [RawFd],
    /// Where its output goes, unless it is rank 0.
    pub log_dir: &'a Path,
}

/// A started rank. Dropping it does not end the process.
#[derive(Debug)]
pub struct RankProcess {
    pub rank: usize,
    pub pid: Pid,
    child: Child,
    /// Readable once the process has ended; `None` once that has been seen.
    pidfd: Option<OwnedFd>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    destination: Destination,
    tail: Tail,
}

/// Where a rank's output goes.
#[derive(Debug)]
enum Destination {
    /// Rank 0 draws the progress of the run.
    Terminal,
    File(OutFile),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    /// The number of the signal.
    Killed(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with status {code}"),
            Self::Killed(signal) => match signal_hook::low_level::signal_name(*signal) {
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

impl RankProcess {
    /// Starts the rank. Call it from the main thread: the kernel ties the rank's life to the thread that spawned it.
    pub fn start(start: RankStart<'_>) -> io::Result<Self> {
        let rank = start.env.rank;
        let mut command = Command::new(start.program);
        command.arg(start.config).envs(start.env.vars());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            command.env("OMP_NUM_THREADS", machine::threads_per_rank(start.env.local_world_size).to_string());
        }
        lifeline::prepare_child(&mut command, start.inherit);
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut process = Self {
            rank,
            pid,
            child,
            pidfd: None,
            stdout,
            stderr,
            destination: match rank {
                0 => Destination::Terminal,
                _ => Destination::File(OutFile::new(&start.log_dir.join(format!("rank-{rank}.out")))),
            },
            tail: Tail::default(),
        };
        if let Err(error) = process.watch() {
            // Nobody would notice the end of such a rank.
            processes::signal_group(pid, Signal::KILL);
            process.child.wait()?;
            return Err(error);
        }
        Ok(process)
    }

    fn watch(&mut self) -> io::Result<()> {
        self.pidfd = Some(rustix::process::pidfd_open(self.pid, PidfdFlags::empty())?);
        for pipe in self.pipes().into_iter().flatten() {
            rustix::fs::fcntl_setfl(pipe, OFlags::NONBLOCK)?;
        }
        Ok(())
    }

    /// Readable once the process has ended; `None` once [`RankProcess::reap`] has been called.
    pub fn exit_fd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Its stdout and stderr, while they are open.
    pub fn pipes(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.stdout.as_ref().map(AsFd::as_fd), self.stderr.as_ref().map(AsFd::as_fd)]
    }

    pub fn has_ended(&self) -> bool {
        self.pidfd.is_none()
    }

    /// Moves what it printed on, as much as is there now.
    pub fn pump(&mut self, to_stdout: &mut Outlet, to_stderr: &mut Outlet) {
        let (tail, destination) = (&mut self.tail, &mut self.destination);
        if !pump_pipe(&mut self.stdout, tail, destination, to_stdout) {
            self.stdout = None;
        }
        if !pump_pipe(&mut self.stderr, tail, destination, to_stderr) {
            self.stderr = None;
        }
    }

    /// Takes the end of a process whose [`RankProcess::exit_fd`] is readable: ends what it left in its group, moves the
    /// rest of its output on, and closes its pipes, which a process that escaped the group may still hold.
    pub fn reap(&mut self, to_stdout: &mut Outlet, to_stderr: &mut Outlet) -> io::Result<End> {
        // Before the wait: an unreaped leader keeps the group's number from being given to others.
        processes::signal_group(self.pid, Signal::KILL);
        let status = self.child.wait()?;
        self.pidfd = None;
        self.pump(to_stdout, to_stderr);
        (self.stdout, self.stderr) = (None, None);
        Ok(match status.signal() {
            Some(signal) => End::Killed(signal),
            None => End::Exited(status.code().expect("a process that no signal ended has a code")),
        })
    }

    /// The last lines that it printed.
    pub fn last_lines(&self) -> Vec<String> {
        match self.destination {
            // They are on the screen already.
            Destination::Terminal => Vec::new(),
            Destination::File(_) => self.tail.lines(),
        }
    }
}

/// The most that is read from one pipe in one go, so that a rank that prints without end does not take all attention.
const MAX_PUMP_BYTES: usize = 1 << 20;

/// Moves what is in `pipe` on; false once its other end is closed.
fn pump_pipe(
    pipe: &mut Option<impl Read>,
    tail: &mut Tail,
    destination: &mut Destination,
    outlet: &mut Outlet,
) -> bool {
    let Some(pipe) = pipe else { return false };
    let mut bytes = [0; 16 * 1024];
    let mut total = 0;
    while total < MAX_PUMP_BYTES {
        match pipe.read(&mut bytes) {
            Ok(0) => return false,
            Ok(num) => {
                total += num;
                tail.push(&bytes[..num]);
                match destination {
                    Destination::Terminal => outlet.push(&bytes[..num]),
                    Destination::File(file) => file.push(&bytes[..num]),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}
