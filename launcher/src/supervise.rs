//! The loop that waits for ranks, signals, other launchers and deadlines. It has one thread and never polls: it sleeps
//! until a rank ends or prints, a signal or a message comes, a reader takes output, or a deadline passes.
//!
//! ```text
//!             signal              25 s, unless SIGUSR1 or 2
//!   Running ---------> Stopping ---------------------> Killed
//!      |                  | a rank fails      5 s        ^
//!      | a rank fails     +---------> Ending ------------+
//!      |                              ^
//!      +--> (a victim: 0.5 s for the cause to show; where there is none but a rank that did not come, 0.3 s to end)
//! ```
//!
//! Ranks that give up on one while the run is stopping lead to `Ending` as well.
//!
//! With several nodes each launcher passes through these phases with its own ranks and tells the others why. The head
//! hears of all failures, and its word ends this start of the ranks for all launchers.

use std::time::{Duration, Instant};

use fsdp_control::progress::Progress;
use rustix::event::{PollFd, PollFlags};

use crate::failure::Failure;
use crate::history::History;
use crate::link::{Ended, Farewell, Message, Restart};
use crate::nodes::Nodes;
use crate::oom::OomWatch;
use crate::output::Outlets;
use crate::processes;
use crate::rank::RankProcess;
use crate::report::Records;
use crate::signals::{Arrived, Signals};

/// How long ranks have to finish the step and save after a signal. Schedulers kill after 30 s.
pub const STOP_DEADLINE: Duration = Duration::from_secs(25);

/// How often an mpirun is asked to stop, and how long after its start at first: it dies of a signal that comes while it
/// starts the ranks, or drops it.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How long the cause has to show once a victim has been seen.
const CAUSE_DEADLINE: Duration = Duration::from_millis(500);

/// How long the kernel has to end killed processes.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long the other launchers have to say how their ranks ended, once this one's have: a stop's deadline and the
/// kernel's. The head has to wait for the others itself before it answers.
const NODES_DEADLINE: Duration = Duration::from_secs(40);
const HEAD_DEADLINE: Duration = Duration::from_secs(60);

/// Why all ranks are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// One has failed.
    Failure,
    /// Ranks have given up on one that lives: all are stuck, or have just given up themselves.
    Hang,
    /// A whole node is lost: no step can end, nothing can be saved.
    LostNode,
}

impl Ending {
    /// How long they have.
    fn grace(self) -> Duration {
        match self {
            Self::Failure => Duration::from_secs(5),
            Self::Hang => Duration::from_millis(300),
            Self::LostNode => Duration::from_secs(2),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Running,
    /// A victim was seen; its cause should show until then.
    Suspecting(Instant),
    /// Asked by signal to stop, until then where the signal has a deadline.
    Stopping(Option<Instant>),
    /// A rank failed; the others have until then to end.
    Ending(Instant),
    /// All were killed; whoever is left by then is left.
    Killed(Instant),
    /// This launcher's ranks have ended, other nodes' have until then.
    Waiting(Instant),
}

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Self::Running => None,
            Self::Stopping(at) => at,
            Self::Suspecting(at) | Self::Ending(at) | Self::Killed(at) | Self::Waiting(at) => Some(at),
        }
    }
}

/// What a descriptor that is ready stands for.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Signal,
    Stdout,
    Stderr,
    Node(usize),
    Output(usize),
    Exit(usize),
}

/// What the head says once all ranks have ended.
#[derive(Debug)]
pub enum Word {
    Verdict(Farewell),
    Restart(Restart),
}

#[derive(Debug)]
pub struct Supervisor<'a> {
    pub ranks: Vec<RankProcess>,
    pub progress: &'a Progress,
    pub records: &'a Records<'a>,
    pub signals: &'a mut Signals,
    pub nodes: &'a mut Nodes,
    pub outlets: &'a mut Outlets,
    pub oom_watch: OomWatch,
    pub phase: Phase,
    /// When an mpirun is to be asked to stop once more.
    ask_again: Option<Instant>,
    pub history: History,
    /// On nodes other than the head.
    pub word: Option<Word>,
}

impl<'a> Supervisor<'a> {
    pub fn new(
        ranks: Vec<RankProcess>,
        progress: &'a Progress,
        records: &'a Records<'a>,
        signals: &'a mut Signals,
        nodes: &'a mut Nodes,
        outlets: &'a mut Outlets,
        oom_watch: OomWatch,
    ) -> Self {
        Self {
            ranks,
            progress,
            records,
            signals,
            nodes,
            outlets,
            oom_watch,
            phase: Phase::Running,
            ask_again: None,
            history: History::default(),
            word: None,
        }
    }

    /// Returns once all ranks of all nodes have ended, and the head has said what follows; the outlets may still hold some
    /// output.
    ///
    /// # Errors
    /// The system refuses to wait. The ranks then end with the lifeline.
    pub fn run(&mut self) -> Result<(), Failure> {
        // What came together with the last message before the start makes no descriptor ready any more.
        (0..self.nodes.peers.len()).for_each(|index| self.hear(index));
        let mut has_reported = false;
        loop {
            if self.living().all(|rank| self.history.unkillable.contains(&rank.first_rank)) {
                if !has_reported {
                    has_reported = true;
                    self.history.has_begun = self.has_begun();
                    self.report_end();
                }
                if self.nodes.peers.iter().all(|peer| peer.is_done) {
                    return Ok(());
                }
                // Without a deadline yet, or with one for what the other nodes are still to be told.
                let is_open = matches!(self.phase, Phase::Running | Phase::Suspecting(_) | Phase::Stopping(None));
                if !is_open && !matches!(self.phase, Phase::Waiting(_)) {
                    let patience = if self.nodes.is_head { NODES_DEADLINE } else { HEAD_DEADLINE };
                    self.phase = Phase::Waiting(Instant::now() + patience);
                }
            }
            let ready = self.wait().map_err(|e| Failure::failed(format!("cannot wait for the ranks: {e}")))?;
            // Signals first: a scheduler that signals all processes of a job has ranks die of its signal, not of a fault.
            for &event in &ready {
                self.handle(event)?;
            }
            self.oom_watch.look();
            // What a failed write has closed makes no descriptor ready any more.
            for index in 0..self.nodes.peers.len() {
                let peer = &self.nodes.peers[index];
                if !peer.is_done && peer.link.closed().is_some() {
                    self.hear(index);
                }
            }
            if self.ask_again.is_some_and(|at| Instant::now() >= at) {
                self.ask_to_stop();
            }
            if self.phase.deadline().is_some_and(|at| Instant::now() >= at) {
                self.pass_deadline();
            }
        }
    }

    /// Tells the head how this node's ranks ended.
    fn report_end(&mut self) {
        if !self.nodes.is_head {
            let History { num_stopped, forced, ref unkillable, ref early, .. } = self.history;
            // One that others may miss, and one for the case that it is itself who misses them.
            let early = early.iter().take(2).cloned().collect();
            let ended = Ended { num_stopped, forced, unkillable: unkillable.clone(), early };
            self.nodes.tell_all(&Message::Ended(ended));
        }
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
        for (outlet, event) in [(&self.outlets.stdout, Ready::Stdout), (&self.outlets.stderr, Ready::Stderr)] {
            if outlet.is_waiting() {
                add(outlet.fd(), PollFlags::OUT, event);
            }
        }
        for (index, peer) in self.nodes.peers.iter().enumerate() {
            if peer.link.closed().is_none() {
                add(peer.link.fd(), peer.link.flags(), Ready::Node(index));
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
        let wake_at = self.phase.deadline().into_iter().chain(self.ask_again).min();
        let timeout = wake_at.map(|at| processes::timespec(at.saturating_duration_since(Instant::now())));
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
                Arrived::Stop { has_deadline } => self.stop(has_deadline),
                Arrived::Force => self.force(),
            },
            Ready::Stdout => self.outlets.stdout.write_some(),
            Ready::Stderr => self.outlets.stderr.write_some(),
            Ready::Node(index) => self.hear(index),
            Ready::Output(index) => self.ranks[index].pump(self.outlets),
            Ready::Exit(index) => self.take_end(index)?,
        }
        Ok(())
    }

    /// Asks all ranks to finish the step, save and exit; once. A wish with a deadline may come after one without.
    pub fn stop(&mut self, has_deadline: bool) {
        let is_news = !self.history.was_signalled;
        self.history.was_signalled = true;
        let is_first = match self.phase {
            Phase::Running => true,
            Phase::Stopping(None) if has_deadline => false,
            // Too late for this start, but there is to be no other.
            _ => {
                if is_news && !self.nodes.is_head {
                    self.nodes.tell_all(&Message::Stop { has_deadline });
                }
                return;
            }
        };
        self.history.stop_requested |= self.history.failures.is_empty();
        self.nodes.tell_all(&Message::Stop { has_deadline });
        self.phase = Phase::Stopping(has_deadline.then(|| Instant::now() + STOP_DEADLINE));
        let ends_at_once = has_deadline && !self.has_begun();
        if is_first {
            let how = match has_deadline {
                _ if ends_at_once => "there is nothing to save yet, and the ranks end at once".to_owned(),
                true => format!("the ranks finish the step and save ({} s at most)", STOP_DEADLINE.as_secs()),
                false => "the ranks finish the step and save".to_owned(),
            };
            self.outlets.stderr.push_line(&format!("fsdp-launch: asked to stop; {how}"));
        }
        if ends_at_once {
            // Ranks may be in a wait that only a time limit ends, or read for long.
            self.kill();
        } else if is_first {
            self.ask_to_stop();
        }
    }

    /// A step is under way, or was, as far as is known: of an mpirun's ranks nothing is.
    fn has_begun(&self) -> bool {
        let has_begun =
            |(index, rank): (usize, &RankProcess)| rank.mpirun.is_some() || self.progress.snapshot(index).step > 0;
        self.ranks.iter().enumerate().any(has_begun)
    }

    fn ask_to_stop(&mut self) {
        self.ask_again = None;
        if let Phase::Stopping(_) = self.phase {
            let can_hear = |process: &&RankProcess| process.mpirun.is_none() || process.started.elapsed() >= ASK_AGAIN;
            self.living().filter(can_hear).for_each(RankProcess::ask_to_stop);
            if self.living().any(|process| process.mpirun.is_some()) {
                self.ask_again = Some(Instant::now() + ASK_AGAIN);
            }
        }
    }

    /// A person does not want to wait.
    pub fn force(&mut self) {
        self.history.was_signalled = true;
        if !self.history.forced {
            self.history.forced = true;
            self.nodes.tell_all(&Message::Kill);
            self.kill();
        }
    }

    /// What to do when the phase's deadline has come.
    fn pass_deadline(&mut self) {
        match self.phase {
            Phase::Running => {}
            Phase::Suspecting(_) => {
                let is_hang = self.history.is_hang();
                self.end_all(if is_hang { Ending::Hang } else { Ending::Failure });
            }
            Phase::Stopping(_) => {
                self.history.forced = true;
                self.kill();
            }
            Phase::Ending(_) => self.kill(),
            Phase::Killed(_) => self.history.unkillable = self.living().map(|rank| rank.first_rank).collect(),
            Phase::Waiting(_) => {
                let silent: Vec<usize> = (0..self.nodes.peers.len()).collect();
                silent.into_iter().for_each(|index| self.lose(index, "it does not say how its ranks ended"));
            }
        }
    }

    /// A rank has failed, or a node is lost: the others end too.
    pub fn end_all(&mut self, why: Ending) {
        self.nodes.tell_all(&Message::End { is_hang: why == Ending::Hang });
        if matches!(self.phase, Phase::Ending(_) | Phase::Killed(_) | Phase::Waiting(_)) {
            return;
        }
        for (index, rank) in self.ranks.iter().enumerate().filter(|(_, rank)| !rank.has_ended()) {
            // Before the first step there is nothing to save, and ranks may be in a wait that only a time limit ends.
            rank.ask_to_end(self.progress.snapshot(index).step > 0);
        }
        self.phase = Phase::Ending(Instant::now() + why.grace());
    }

    fn kill(&mut self) {
        self.living().for_each(RankProcess::kill);
        self.phase = Phase::Killed(Instant::now() + KILL_DEADLINE);
    }

    pub fn living(&self) -> impl Iterator<Item = &RankProcess> {
        self.ranks.iter().filter(|rank| !rank.has_ended())
    }

    /// A victim was seen: its cause should show soon, here or on another node. Only the head hears of all, and so it alone
    /// decides what follows where none shows.
    pub fn suspect(&mut self) {
        let is_open = match self.phase {
            Phase::Running => true,
            // A rank that ends early in a stop takes the others' peer away, which is all right; but one that hangs never
            // ends.
            Phase::Stopping(_) => self.history.is_hang(),
            _ => false,
        };
        if is_open && self.nodes.is_head {
            self.phase = Phase::Suspecting(Instant::now() + CAUSE_DEADLINE);
        }
    }
}
