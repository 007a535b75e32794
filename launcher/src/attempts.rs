//! The starts of a run's ranks, one after the other: each ends with a verdict, and the launcher of node 0 decides whether
//! there is another one. The others hear of it over their links.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_checkpoint::sharded;
use fsdp_config::{JobConfig, Resume};
use fsdp_control::error_file::{self, Committed};
use fsdp_control::lock::Lock;
use fsdp_control::restarts::Start;
use fsdp_control::{ControlError, ExitStatus, lifeline};
use rustix::process::Pid;

use crate::failure::Failure;
use crate::folder::{self, newest_checkpoint, reached};
use crate::guard::Guard;
use crate::history::History;
use crate::link::{Farewell, Message, Restart};
use crate::nodes::{self, Nodes};
use crate::oom::OomWatch;
use crate::output::Outlets;
use crate::place::Place;
use crate::preflight::Checked;
use crate::report::Records;
use crate::signals::{Arrived, Signals};
use crate::start::{NodeStart, config_path, restart_vars};
use crate::summary::{Attempt, Decision, Summary, now};
use crate::supervise::{Supervisor, Word};
use crate::verdict::{Verdict, verdict};
use crate::{mpirun, processes, worker};

/// How long the terminal has to take the report.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// The ranks of this node among all, and what all nodes have in common.
#[derive(Debug)]
pub struct Ranks {
    pub first_rank: usize,
    pub num_local: usize,
    pub world_size: usize,
    pub run_id: String,
    pub max_restarts: u32,
}

/// Starts the ranks of this node and stays with them to their end, each time.
///
/// # Errors
/// The launcher cannot do its part; the other nodes are still to be told.
pub fn run(
    place: &Place,
    ranks: &Ranks,
    checked: &Checked,
    nodes: &mut Nodes,
    signals: &mut Signals,
) -> Result<ExitStatus, Failure> {
    let worker = worker::find()?;
    let dir = &checked.config.output.dir;
    let log_dir = dir.join("logs");
    folder::create_dir(&log_dir)?;
    // The head's launcher alone locks the folder and owns what has no node in its name.
    let _lock = match place.is_head() {
        true => Some(Lock::take(dir, "fsdp-launch").map_err(Failure::bad_input)?),
        false => None,
    };
    let mut spare = processes::children();
    lifeline::become_subreaper().map_err(Failure::failed)?;
    let guard = Guard::start()?;
    spare.push(guard.pid());
    let summary = Summary::new(&log_dir, ranks, nodes);
    let mut run = Run {
        place,
        ranks,
        checked,
        worker,
        log_dir,
        config_path: config_path(dir, place.node_rank),
        guard,
        spare,
        config: checked.config.clone(),
        last_old_step: newest_checkpoint(dir).ok().flatten().map(|committed| committed.step),
        nodes,
        signals,
        outlets: Outlets::new(),
        summary,
    };
    let result = run.attempts();
    if let Err(failure) = &result
        // A start that is refused leaves the summary of those before it, which say why.
        && failure.status != ExitStatus::DoNotRerun
    {
        let failure = failure.with_checkpoint(dir);
        run.summary.set_checkpoint(newest_checkpoint(dir).ok().flatten());
        run.summary.end(failure.status, vec![failure.message], None);
        run.write_summary();
    }
    run.outlets.finish(OUTPUT_PATIENCE);
    result
}

/// What all starts have in common.
#[derive(Debug)]
struct Run<'a> {
    place: &'a Place,
    ranks: &'a Ranks,
    checked: &'a Checked,
    worker: PathBuf,
    log_dir: PathBuf,
    config_path: PathBuf,
    guard: Guard,
    /// Children of this process that are none of the run's.
    spare: Vec<Pid>,
    /// What the workers read. Its `resume` changes once there is a checkpoint of this run.
    config: JobConfig,
    /// The newest checkpoint of an earlier run.
    last_old_step: Option<u64>,
    nodes: &'a mut Nodes,
    signals: &'a mut Signals,
    outlets: Outlets,
    /// The head's.
    summary: Summary,
}

/// What the head decides.
enum Next {
    End(ExitStatus),
    Restart(Restart),
}

impl Run<'_> {
    fn attempts(&mut self) -> Result<ExitStatus, Failure> {
        let mut restart = None;
        let mut attempt = 0;
        loop {
            match self.attempt(attempt, restart.take())? {
                Next::End(status) => return Ok(status),
                Next::Restart(next) => {
                    next.lines.iter().for_each(|line| self.outlets.stderr.push_line(line));
                    if next.resumes {
                        self.config.checkpoint.resume = Resume::Auto;
                    }
                    restart = Some(next);
                    attempt += 1;
                }
            }
        }
    }

    /// Start number `attempt` of the ranks, from 0, to its end. The head tells the others of `restart` when its store is
    /// there.
    fn attempt(&mut self, attempt: u32, restart: Option<Restart>) -> Result<Next, Failure> {
        let dir = &self.checked.config.output.dir;
        // Before the records are removed: who is refused looks at them.
        let start = if self.place.is_head() { Some(begin(dir)?) } else { None };
        folder::write_resolved(&self.config, &self.config_path)?;
        self.remove_records()?;
        let started_at = now();
        let mut vars = restart_vars(self.ranks, attempt);
        vars.push(self.guard.variable());
        let node_start = NodeStart {
            place: self.place,
            ranks: self.ranks,
            mpirun: self.checked.mpirun.as_ref(),
            worker: &self.worker,
            config: &self.config_path,
            log_dir: &self.log_dir,
            vars,
            spare: &self.spare,
        };
        let store = if self.place.is_head() { Some(node_start.serve_store()?) } else { None };
        if self.signals.take() != Arrived::Nothing {
            return Err(nodes::stopped_early());
        }
        match restart {
            None => self.nodes.start_all(self.ranks.world_size, &self.ranks.run_id, self.ranks.max_restarts),
            Some(restart) => {
                self.nodes.begin_again();
                if self.nodes.is_head {
                    self.nodes.tell_all(&Message::Restart(restart));
                }
            }
        }
        let oom_watch = OomWatch::new();
        let (started, processes) = node_start.start(store.as_ref())?;
        let records = Records::new(&self.log_dir, dir, &self.ranks.run_id, attempt);
        let (progress, outlets) = (&started.progress, &mut self.outlets);
        let mut supervisor =
            Supervisor::new(processes, progress, &records, self.signals, self.nodes, outlets, oom_watch);
        supervisor.run()?;
        let (history, word) = (supervisor.history, supervisor.word);
        drop(started);
        node_start.end_orphans();
        if self.checked.mpirun.is_some() {
            mpirun::remove_empty_outputs(&self.log_dir, self.ranks.world_size);
        }
        match word {
            Some(Word::Restart(restart)) => return Ok(Next::Restart(restart)),
            Some(Word::Verdict(farewell)) => {
                farewell.lines.iter().for_each(|line| self.outlets.stderr.push_line(line));
                return Ok(Next::End(farewell.status()));
            }
            None => {}
        }

        let checkpoint = newest_checkpoint(dir).unwrap_or_else(|error| {
            // The report comes first, whatever the file system says.
            self.outlets.stderr.push_line(&format!("fsdp-launch: {error}"));
            None
        });
        let resumes = self.checked.config.checkpoint.resume == Resume::Auto;
        let mut verdict = verdict(&history, &records, checkpoint.as_ref().map(|newest| newest.path.as_path()), resumes);
        if let Some(start) = start {
            let cause = verdict.cause.as_ref().map(|cause| cause.headline.as_str());
            let (status, last) = start.conclude(verdict.status, cause, reached(dir));
            verdict.status = status;
            if let Some(last) = last {
                verdict.closing = vec![last];
            }
        }
        if let Some(cause) = &verdict.cause {
            records.write_cause(cause);
        }
        let restart = self.decide(attempt, &history, &verdict, checkpoint.as_ref());
        let ended = Attempt {
            attempt,
            started: started_at,
            ended: now(),
            what: verdict.cause.as_ref().map(|cause| cause.headline.clone()),
            cause: verdict.cause.as_ref().and_then(|cause| cause.record.clone()),
            failures: history.failures.iter().map(|failure| records.complete(failure)).collect(),
            decision: restart.as_ref().map_or(Decision::End, |(_, decision)| decision.clone()),
        };
        self.summary.add(ended, checkpoint);
        Ok(match restart {
            Some((restart, _)) => Next::Restart(restart),
            None => {
                let status = self.end(verdict);
                if self.place.is_head() && history.unkillable.is_empty() {
                    self.sweep();
                }
                Next::End(status)
            }
        })
    }

    /// Whether and how all ranks start again.
    fn decide(
        &self,
        attempt: u32,
        history: &History,
        verdict: &Verdict,
        checkpoint: Option<&Committed>,
    ) -> Option<(Restart, Decision)> {
        let cause = verdict.cause.as_ref()?;
        let can_help = matches!(verdict.status, ExitStatus::Stopped | ExitStatus::Failed);
        let is_allowed = self.nodes.is_head
            && attempt < self.ranks.max_restarts
            && !history.was_signalled
            && !history.forced
            && !history.lost_node
            && history.unkillable.is_empty();
        if !can_help || !is_allowed {
            return None;
        }
        let is_new = checkpoint.is_some_and(|committed| Some(committed.step) > self.last_old_step);
        let from = match &self.config.checkpoint.resume {
            Resume::Path(path) if !is_new => Some(path.clone()),
            Resume::Never if !is_new => None,
            _ => checkpoint.map(|committed| committed.path.clone()),
        };
        let how = match &from {
            Some(path) => format!("continuing from {}", path.display()),
            None => "starting from the beginning".to_owned(),
        };
        let (number, most) = (attempt + 1, self.ranks.max_restarts);
        let mut lines = vec![format!("fsdp-launch: restart {number} of {most}: {}; {how}", cause.headline)];
        lines.extend(cause.details.iter().cloned());
        Some((Restart { resumes: is_new, lines }, Decision::Restart { from }))
    }

    /// Says what became of the run, here and on the other nodes.
    fn end(&mut self, verdict: Verdict) -> ExitStatus {
        let lines = verdict.lines();
        lines.iter().for_each(|line| self.outlets.stderr.push_line(line));
        self.summary.end(verdict.status, lines.clone(), verdict.hint());
        self.write_summary();
        if self.nodes.is_head {
            self.nodes.dismiss(&Message::Verdict(Farewell::new(verdict.status, lines)));
        }
        verdict.status
    }

    /// Removes what no rank will finish any more, which takes space: workers that start again do it themselves. Last, because
    /// a file system may take long for it.
    fn sweep(&mut self) {
        if let Err(error) = sharded::sweep(&self.checked.config.output.dir.join("checkpoints")) {
            self.outlets.stderr.push_line(&format!("fsdp-launch: {error}"));
        }
    }

    /// Records of earlier starts would be taken for this one's. The head's folder may be that of all nodes.
    fn remove_records(&self) -> Result<(), Failure> {
        if self.place.is_head() {
            self.write_summary_quietly();
            return error_file::remove_all(&self.log_dir).map_err(Failure::bad_input);
        }
        let mut own = self.ranks.first_rank..self.ranks.first_rank + self.ranks.num_local;
        own.try_for_each(|rank| error_file::remove(&self.log_dir, rank)).map_err(Failure::bad_input)
    }

    fn write_summary(&mut self) {
        if self.place.is_head()
            && let Err(line) = self.summary.write()
        {
            self.outlets.stderr.push_line(&line);
        }
    }

    /// A summary that cannot be written is told of at the end.
    fn write_summary_quietly(&self) {
        let _ = self.summary.write();
    }
}

/// Counts a start of the run, unless those before it led nowhere.
fn begin(dir: &Path) -> Result<Start, Failure> {
    Start::begin(dir, reached(dir)).map_err(|error| match error {
        ControlError::NoProgress { .. } => Failure::do_not_rerun(error),
        error => Failure::failed(error),
    })
}
