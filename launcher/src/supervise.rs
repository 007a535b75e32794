//! The loop that waits for ranks, signals and deadlines. It has one thread and never polls: it sleeps until a rank ends
//! or prints, a signal comes, a reader takes output, or a deadline passes.
//!
//! ```text
//!             signal                    25 s
//!   Running ---------> Stopping ---------------------> Killed
//!      |                  | a rank fails      5 s        ^
//!      | a rank fails     +---------> Ending ------------+
//!      |                              ^
//!      +--> (a victim: 0.5 s for the cause to show)
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::progress::{Progress, Snapshot};
use fsdp_control::{ExitStatus, host_name};
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;
use signal_hook::consts::{SIGKILL, SIGTERM};

use crate::failure::Failure;
use crate::output::Outlet;
use crate::processes;
use crate::rank::{End, RankProcess};
use crate::signals::{Arrived, Signals};

/// How long ranks have to finish the step and save after a signal. Schedulers kill after 30 s.
pub const STOP_DEADLINE: Duration = Duration::from_secs(25);

/// How long ranks have to end once another one has failed.
const GRACE: Duration = Duration::from_secs(5);

/// How long the cause has to show once a victim has been seen.
const CAUSE_DEADLINE: Duration = Duration::from_millis(500);

/// How long the kernel has to end killed processes.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What happened, in the order in which the launcher saw it; [`crate::verdict`] makes sense of it.
#[derive(Debug, Default)]
pub struct History {
    pub failures: Vec<RankFailure>,
    /// Ranks that ended because they were asked to.
    pub num_stopped: usize,
    /// The launcher got a signal.
    pub stop_requested: bool,
    /// Ranks were killed because they did not stop in time, or because a person insisted.
    pub forced: bool,
    /// Ranks that even SIGKILL did not end.
    pub unkillable: Vec<usize>,
}

/// A rank's failure.
#[derive(Debug)]
pub struct RankFailure {
    pub rank: usize,
    pub host: String,
    pub pid: i32,
    pub end: End,
    /// Training step, from 1; 0 before the first.
    pub step: u64,
    /// What the rank itself says.
    pub record: Option<ErrorRecord>,
    pub last_lines: Vec<String>,
    /// For a timeout: who was not there.
    pub absent: Vec<AbsentRank>,
}

impl RankFailure {
    /// The failure can be the cause of others.
    pub fn is_primary(&self) -> bool {
        self.record.as_ref().is_none_or(|record| record.primary)
    }
}

/// A rank that lives, but had not come to a collective for which another one waited in vain, or is suspended.
#[derive(Debug)]
pub struct AbsentRank {
    pub rank: usize,
    pub pid: i32,
    pub at: Snapshot,
    /// State letter of the process.
    pub state: Option<char>,
}

impl AbsentRank {
    /// Least for the one to blame: who is suspended, then who does not wait for others itself, then who is furthest behind.
    pub fn order_of_suspicion(&self) -> impl Ord {
        (self.state != Some('T'), self.at.inside, self.at.seq)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// A victim was seen; its cause should show until then.
    Suspecting(Instant),
    /// Asked by signal to stop until then.
    Stopping(Instant),
    /// A rank failed; the others have until then to end.
    Ending(Instant),
    /// All were killed; whoever is left by then is left.
    Killed(Instant),
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Self::Running => None,
            Self::Suspecting(at) | Self::Stopping(at) | Self::Ending(at) | Self::Killed(at) => Some(at),
        }
    }
}

/// What a descriptor that is ready stands for.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Signal,
    Stdout,
    Stderr,
    Output(usize),
    Exit(usize),
}

#[derive(Debug)]
pub struct Supervisor<'a> {
    pub ranks: Vec<RankProcess>,
    pub progress: &'a Progress,
    pub log_dir: &'a Path,
    pub signals: Signals,
    pub stdout: Outlet,
    pub stderr: Outlet,
    phase: Phase,
    history: History,
}

impl<'a> Supervisor<'a> {
    pub fn new(ranks: Vec<RankProcess>, progress: &'a Progress, log_dir: &'a Path, signals: Signals) -> Self {
        Self {
            ranks,
            progress,
            log_dir,
            signals,
            stdout: Outlet::stdout(),
            stderr: Outlet::stderr(),
            phase: Phase::Running,
            history: History::default(),
        }
    }

    /// Returns once all ranks have ended; the outlets may still hold some output.
    ///
    /// # Errors
    /// The system refuses to wait. The ranks then end with the lifeline.
    pub fn run(&mut self) -> Result<History, Failure> {
        while self.ranks.iter().any(|rank| !rank.has_ended()) {
            let ready = self.wait().map_err(|e| Failure::failed(format!("cannot wait for the ranks: {e}")))?;
            // Signals first: a scheduler that signals all processes of a job has ranks die of its signal, not of a fault.
            for &event in &ready {
                self.handle(event)?;
            }
            if self.phase.deadline().is_some_and(|at| Instant::now() >= at) && !self.pass_deadline() {
                break;
            }
        }
        Ok(std::mem::take(&mut self.history))
    }

    /// Sleeps until something is ready or the phase's deadline has come.
    fn wait(&self) -> Result<Vec<Ready>, rustix::io::Errno> {
        let mut fds = Vec::new();
        let mut events = Vec::new();
        let mut add = |fd, flags, event| {
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            events.push(event);
        };
        for fd in self.signals.fds() {
            add(fd, PollFlags::IN, Ready::Signal);
        }
        for (outlet, event) in [(&self.stdout, Ready::Stdout), (&self.stderr, Ready::Stderr)] {
            if outlet.is_waiting() {
                add(outlet.fd(), PollFlags::OUT, event);
            }
        }
        for (index, rank) in self.ranks.iter().enumerate() {
            for pipe in rank.pipes().into_iter().flatten() {
                add(pipe, PollFlags::IN, Ready::Output(index));
            }
        }
        for (index, rank) in self.ranks.iter().enumerate() {
            if let Some(pidfd) = rank.exit_fd() {
                add(pidfd, PollFlags::IN, Ready::Exit(index));
            }
        }
        let timeout = self.phase.deadline().map(|at| processes::timespec(at.saturating_duration_since(Instant::now())));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(fds.iter().zip(events).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, event)| event).collect())
    }

    fn handle(&mut self, event: Ready) -> Result<(), Failure> {
        match event {
            Ready::Signal => match self.signals.take() {
                Arrived::Nothing => {}
                Arrived::Stop => self.stop(),
                Arrived::Force => {
                    self.history.forced = true;
                    self.kill();
                }
            },
            Ready::Stdout => self.stdout.write_some(),
            Ready::Stderr => self.stderr.write_some(),
            Ready::Output(index) => self.ranks[index].pump(&mut self.stdout, &mut self.stderr),
            Ready::Exit(index) => self.take_end(index)?,
        }
        Ok(())
    }

    /// Asks all ranks to finish the step, save and exit; once.
    fn stop(&mut self) {
        if !matches!(self.phase, Phase::Running | Phase::Suspecting(_)) {
            return;
        }
        self.history.stop_requested = true;
        let secs = STOP_DEADLINE.as_secs();
        self.stderr
            .push_line(&format!("fsdp-launch: asked to stop; the ranks finish the step and save ({secs} s at most)"));
        self.ask_all_to_stop();
        self.phase = Phase::Stopping(Instant::now() + STOP_DEADLINE);
    }

    /// What to do when the phase's deadline has come; false when there is nothing left to do.
    fn pass_deadline(&mut self) -> bool {
        match self.phase {
            Phase::Running => {}
            Phase::Suspecting(_) => self.end_all(),
            Phase::Stopping(_) => {
                self.history.forced = true;
                self.kill();
            }
            Phase::Ending(_) => self.kill(),
            Phase::Killed(_) => {
                self.history.unkillable = self.living().map(|rank| rank.rank).collect();
                return false;
            }
        }
        true
    }

    /// A rank has failed: the others end too.
    fn end_all(&mut self) {
        if matches!(self.phase, Phase::Ending(_) | Phase::Killed(_)) {
            return;
        }
        for (index, rank) in self.ranks.iter().enumerate().filter(|(_, rank)| !rank.has_ended()) {
            // A suspended process cannot react, and what it would wake up to is gone. Before the first step there is
            // nothing to save, and ranks may be in a wait that only a time limit ends.
            if processes::state(rank.pid) == Some('T') || self.progress.snapshot(index).step == 0 {
                processes::signal_group(rank.pid, Signal::KILL);
            }
        }
        self.ask_all_to_stop();
        self.phase = Phase::Ending(Instant::now() + GRACE);
    }

    fn ask_all_to_stop(&self) {
        self.living().for_each(|rank| processes::ask_group_to_stop(rank.pid));
    }

    fn kill(&mut self) {
        self.living().for_each(|rank| processes::signal_group(rank.pid, Signal::KILL));
        self.phase = Phase::Killed(Instant::now() + KILL_DEADLINE);
    }

    fn living(&self) -> impl Iterator<Item = &RankProcess> {
        self.ranks.iter().filter(|rank| !rank.has_ended())
    }

    /// Takes and judges the end of a rank.
    fn take_end(&mut self, index: usize) -> Result<(), Failure> {
        let rank = &mut self.ranks[index];
        let (number, pid) = (rank.rank, rank.pid.as_raw_pid());
        let end = rank
            .reap(&mut self.stdout, &mut self.stderr)
            .map_err(|e| Failure::failed(format!("cannot wait for rank {number} (pid {pid}): {e}")))?;
        // A record of an earlier run under the same rank is not this process's.
        let record = error_file::read(self.log_dir, number).ok().flatten().filter(|r| r.pid == pid.cast_unsigned());
        // By the launcher, with that signal.
        let was_asked = |signal| match self.phase {
            Phase::Running | Phase::Suspecting(_) => false,
            Phase::Stopping(_) => signal == SIGTERM,
            Phase::Ending(_) | Phase::Killed(_) => signal == SIGTERM || signal == SIGKILL,
        };
        match end {
            End::Exited(0) => return Ok(()),
            End::Exited(code) if code == ExitStatus::Stopped.code() && record.is_none() => {
                self.history.num_stopped += 1;
                return Ok(());
            }
            End::Killed(signal) if was_asked(signal) => {
                self.history.num_stopped += 1;
                // It was still starting and had no handler yet: the others wait for it in vain.
                if let Phase::Stopping(_) = self.phase {
                    self.phase = Phase::Ending(Instant::now() + GRACE);
                }
                return Ok(());
            }
            End::Exited(_) | End::Killed(_) => {}
        }
        let snapshot = self.progress.snapshot(index);
        let failure = RankFailure {
            rank: number,
            host: host_name(),
            pid,
            end,
            step: record.as_ref().map_or(snapshot.step, |record| record.step),
            absent: match &record {
                Some(record) if record.kind == ErrorKind::CollectiveTimeout => self.absent_from(&snapshot),
                _ => Vec::new(),
            },
            record,
            last_lines: self.ranks[index].last_lines(),
        };
        if failure.record.is_none() && matches!(end, End::Killed(_)) {
            self.write_record(&failure, index);
        }
        match self.phase {
            _ if failure.is_primary() => self.end_all(),
            Phase::Running => self.phase = Phase::Suspecting(Instant::now() + CAUSE_DEADLINE),
            _ => {}
        }
        self.history.failures.push(failure);
        Ok(())
    }

    /// Ranks that live and had not come to the collective in which another one, at `waiting`, gave up; or are suspended.
    fn absent_from(&self, waiting: &Snapshot) -> Vec<AbsentRank> {
        let of = |(index, rank): (usize, &RankProcess)| {
            let (at, state) = (self.progress.snapshot(index), processes::state(rank.pid));
            (!rank.has_ended() && (at.seq < waiting.seq || state == Some('T'))).then(|| AbsentRank {
                rank: rank.rank,
                pid: rank.pid.as_raw_pid(),
                at,
                state,
            })
        };
        self.ranks.iter().enumerate().filter_map(of).collect()
    }

    /// The record that a rank ended by a signal could not write.
    fn write_record(&self, failure: &RankFailure, local_rank: usize) {
        let message = failure.end.to_string();
        let mut record = ErrorRecord::new(failure.rank, local_rank, ErrorKind::Signal, message, ExitStatus::Failed);
        record.pid = failure.pid.cast_unsigned();
        record.step = failure.step;
        // The report says the same; a full disk must not hide it.
        let _ = error_file::write(self.log_dir, &record);
    }
}
