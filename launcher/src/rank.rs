//! One rank's process, or the mpirun that stands for all: its start, its pipes, its end.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::time::Instant;

use fsdp_control::env::WorkerEnv;
use fsdp_control::lifeline;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::mpirun::{self, MpirunRanks, MpirunStart};
use crate::output::{OutFile, Outlet, Outlets, Tail};
use crate::{machine, processes};

/// Variables of a launcher's own ranks, which a launcher that runs inside of a rank must not hand on.
const OF_RANKS: [&str; 12] = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "FSDP_LIFELINE_FD",
    "FSDP_PROGRESS_FD",
    "FSDP_PREPARED",
    "FSDP_TERMINAL_WIDTH",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
];

/// How a rank is started.
#[derive(Debug)]
pub struct RankStart<'a> {
    /// The worker's binary.
    pub program: &'a Path,
    /// The resolved config, its one argument.
    pub config: &'a Path,
    pub env: WorkerEnv,
    /// Further variables.
    pub vars: &'a [(String, String)],
    /// Descriptors that it inherits.
    pub inherit: &'a [RawFd],
    /// Where its output goes, unless it is rank 0.
    pub log_dir: &'a Path,
}

/// A started rank, or a started mpirun. Dropping it does not end the process.
#[derive(Debug)]
pub struct RankProcess {
    pub first_rank: usize,
    /// What an mpirun stands for; `None` for a rank's own process.
    pub mpirun: Option<MpirunRanks>,
    pub pid: Pid,
    pub started: Instant,
    /// Readable once the process has ended; `None` once that has been seen.
    pidfd: Option<OwnedFd>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    output: Output,
    tail: Tail,
}

/// Where a process's output goes.
#[derive(Debug)]
enum Output {
    /// Rank 0 draws the progress of the run.
    Terminal,
    File(OutFile),
    /// mpirun's stdout is rank 0's output, stderr is its own.
    Mpirun(OutFile),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

/// "rank 3 (pid 1234)".
impl fmt::Display for RankProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mpirun {
            None => write!(f, "rank {} (pid {})", self.first_rank, self.pid),
            Some(_) => write!(f, "mpirun (pid {})", self.pid),
        }
    }
}

impl RankProcess {
    /// Starts the rank. Call it from the main thread: the kernel ties the rank's life to the thread that spawned it.
    pub fn start(start: RankStart<'_>) -> io::Result<Self> {
        let rank = start.env.rank;
        let mut command = Command::new(start.program);
        command.arg(start.config);
        set_env(&mut command, start.env.vars().into_iter().chain(start.vars.iter().cloned()));
        lifeline::prepare_child(&mut command, start.inherit);
        let output = match rank {
            0 => Output::Terminal,
            _ => Output::File(OutFile::new(&start.log_dir.join(format!("rank-{rank}.out")))),
        };
        Self::spawn(command, start.env.local_world_size, rank, None, output)
    }

    /// Starts an mpirun. Call it from the main thread, as for a rank.
    pub fn start_mpirun(start: &MpirunStart<'_>) -> io::Result<Self> {
        let mut command = start.command();
        set_env(&mut command, start.vars.iter().cloned());
        let output = Output::Mpirun(OutFile::new(&start.log_dir.join(mpirun::OUTPUT)));
        Self::spawn(command, start.num_local_ranks, 0, Some(start.ranks()), output)
    }

    fn spawn(
        mut command: Command,
        num_local_ranks: usize,
        first_rank: usize,
        mpirun: Option<MpirunRanks>,
        output: Output,
    ) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            command.env("OMP_NUM_THREADS", machine::threads_per_rank(num_local_ranks).to_string());
        }
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (started, tail) = (Instant::now(), Tail::default());
        let mut process = Self { first_rank, mpirun, pid, started, pidfd: None, stdout, stderr, output, tail };
        if let Err(error) = process.watch() {
            // Nobody would notice the end of such a process.
            processes::signal_group(pid, Signal::KILL);
            child.wait()?;
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

    /// Asks for the end of the step, a save, and the end.
    pub fn ask_to_stop(&self) {
        match self.mpirun {
            None => processes::ask_group_to_stop(self.pid),
            // mpirun hands this signal on to the ranks; on SIGTERM it would kill them.
            Some(_) => processes::signal(self.pid, Signal::USR1),
        }
    }

    /// Asks for the end. A rank that has nothing to save yet (`has_begun` is false), or is suspended and so cannot react,
    /// is killed.
    pub fn ask_to_end(&self, has_begun: bool) {
        match self.mpirun {
            None => {
                if !has_begun || processes::state(self.pid).is_some_and(processes::is_suspended) {
                    processes::signal_group(self.pid, Signal::KILL);
                }
                processes::ask_group_to_stop(self.pid);
            }
            Some(_) => processes::signal(self.pid, Signal::TERM),
        }
    }

    pub fn kill(&self) {
        processes::signal_group(self.pid, Signal::KILL);
    }

    /// Moves what it printed on, as much as is there now.
    pub fn pump(&mut self, outlets: &mut Outlets) {
        let Outlets { stdout: to_stdout, stderr: to_stderr } = outlets;
        let (tail, output) = (&mut self.tail, &mut self.output);
        let mut sink = match output {
            Output::Terminal => Sink::Outlet(to_stdout),
            Output::Mpirun(_) => Sink::Outlet(to_stderr),
            Output::File(file) => Sink::File(file, tail),
        };
        if !pump_pipe(&mut self.stdout, &mut sink) {
            self.stdout = None;
        }
        let mut sink = match output {
            Output::Terminal => Sink::Outlet(to_stderr),
            Output::Mpirun(file) | Output::File(file) => Sink::File(file, tail),
        };
        if !pump_pipe(&mut self.stderr, &mut sink) {
            self.stderr = None;
        }
    }

    /// Takes the end of a process whose [`RankProcess::exit_fd`] is readable, with the most memory that it had: ends what it
    /// left in its group, moves the rest of its output on, and closes its pipes, which a process that escaped the group may
    /// still hold.
    pub fn reap(&mut self, outlets: &mut Outlets) -> io::Result<(End, u64)> {
        // Before the wait: an unreaped leader keeps the group's number from being given to others.
        processes::signal_group(self.pid, Signal::KILL);
        let (status, peak_rss_bytes) = fsdp_control::child::wait(self.pid)?;
        self.pidfd = None;
        self.pump(outlets);
        (self.stdout, self.stderr) = (None, None);
        let end = match status.signal() {
            Some(signal) => End::Killed(signal),
            None => End::Exited(status.code().expect("a process that no signal ended has a code")),
        };
        Ok((end, peak_rss_bytes))
    }

    /// The last lines that it printed and that are not on the screen.
    pub fn last_lines(&self) -> Vec<String> {
        self.tail.lines()
    }
}

fn set_env(command: &mut Command, vars: impl IntoIterator<Item = (String, String)>) {
    for name in OF_RANKS {
        command.env_remove(name);
    }
    command.envs(vars);
}

/// Where the bytes of one pipe go.
enum Sink<'a> {
    Outlet(&'a mut Outlet),
    File(&'a mut OutFile, &'a mut Tail),
}

impl Sink<'_> {
    fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Outlet(outlet) => outlet.push(bytes),
            Self::File(file, tail) => {
                file.push(bytes);
                tail.push(bytes);
            }
        }
    }
}

/// The most that is read from one pipe in one go, so that a rank that prints without end does not take all attention.
const MAX_PUMP_BYTES: usize = 1 << 20;

/// Moves what is in `pipe` on; false once its other end is closed.
fn pump_pipe(pipe: &mut Option<impl Read>, sink: &mut Sink) -> bool {
    let Some(pipe) = pipe else { return false };
    let mut bytes = [0; 16 * 1024];
    let mut total = 0;
    while total < MAX_PUMP_BYTES {
        match pipe.read(&mut bytes) {
            Ok(0) => return false,
            Ok(num) => {
                total += num;
                sink.push(&bytes[..num]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}
