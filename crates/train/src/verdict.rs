//! How ranks that no launcher watches learn of each other's ends, and agree on what became of the run.
//!
//! Each rank holds on to the store ([`Ties`]), publishes its own failure there, and hears of the others'. The first that can
//! be a cause decides the exit status of all, so that it does not matter whose status a scheduler takes.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fsdp_checkpoint::sharded;
use fsdp_config::{JobConfig, Resume};
use fsdp_control::env::WorkerEnv;
use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::lifeline::{self, Loss, StoreLifeline};
use fsdp_control::store::{Store, StoreServer};
use fsdp_control::{ControlError, ExitStatus, failures};

use crate::whereabouts;

/// How long a rank has to end by itself once another one has failed.
pub const GRACE: Duration = Duration::from_secs(5);

/// How long the cause has to show once a victim has been seen.
const CAUSE_DEADLINE: Duration = Duration::from_millis(500);

const POLL_EVERY: Duration = Duration::from_millis(20);

/// What ties a rank to the others.
#[derive(Debug)]
pub struct Ties {
    pub store: Store,
    lifeline: StoreLifeline,
}

/// The output folder of a run that may fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub dir: PathBuf,
    /// The same command goes on from the newest checkpoint.
    pub resumes: bool,
}

impl Output {
    pub fn of(config: &JobConfig) -> Self {
        Output { dir: config.output.dir.clone(), resumes: config.checkpoint.resume == Resume::Auto }
    }
}

impl Ties {
    /// Holds on to `store` from now on: when it is gone, or another rank has failed and this one is still busy after a
    /// while, this process ends. `output` is where it then leaves its record, once it is known.
    pub fn new(
        store: Store,
        env: &WorkerEnv,
        timeout: Duration,
        output: Arc<OnceLock<Output>>,
    ) -> Result<Self, ControlError> {
        let (rank, local_rank) = (env.rank, env.local_rank);
        let will = "ended without a word: it was killed, or its host is gone".to_owned();
        let will = ErrorRecord::new(rank, local_rank, ErrorKind::Signal, will, ExitStatus::Failed);
        let serves_store = env.run_id.is_some() && rank == 0;
        let server = if env.run_id.is_some() { "rank 0" } else { "the launcher" };
        // Who serves the store ends after the others.
        let grace = if serves_store { GRACE + Duration::from_secs(1) } else { GRACE };
        let on_loss = move |loss| {
            let (message, cause) = match loss {
                Loss::Store(error) => (format!("{server} is gone: {error}"), None),
                Loss::Ranks(records) => {
                    let cause = failures::first_cause(&records).cloned();
                    let who = cause.as_ref().map_or("another rank".to_owned(), |cause| format!("rank {}", cause.rank));
                    (format!("still busy {} s after {who} failed", grace.as_secs()), cause)
                }
            };
            let record = peer_lost(rank, local_rank, message);
            say(format_args!("fsdp-train: {}", describe(&record)));
            let Some(output) = output.get() else { return ExitStatus::Failed };
            if let Err(error) = error_file::write(&output.dir.join("logs"), &record) {
                say(format_args!("fsdp-train: {error}"));
            }
            if let (true, Some(cause)) = (serves_store, &cause) {
                report(cause, rank, output);
            }
            verdict(&cause.unwrap_or(record), &output.dir)
        };
        let lifeline = lifeline::watch_store((&env.master_addr, env.master_port), timeout, grace, &will, on_loss)?;
        Ok(Ties { store, lifeline })
    }

    /// Ends the watch of a rank that has not failed.
    pub fn let_go(self) {
        self.lifeline.let_go();
    }

    /// Publishes this rank's failure and ends the watch; the cause, which has a moment to show.
    pub fn fail(self, record: &ErrorRecord) -> ErrorRecord {
        // Whoever has lost the store, or finds it suspended, knows of no failure but its own.
        let mut store = self.store.with_reply_slack(CAUSE_DEADLINE.max(Duration::from_secs(3)));
        let _ = failures::publish(&mut store, record);
        let start = Instant::now();
        let cause = loop {
            let records = failures::list(&mut store).unwrap_or_default();
            let cause = failures::first_cause(&records).unwrap_or(record);
            if cause.primary || start.elapsed() >= CAUSE_DEADLINE {
                break cause.clone();
            }
            std::thread::sleep(POLL_EVERY);
        };
        self.lifeline.let_go();
        cause
    }
}

/// Waits, at most for `patience`, until all other ranks have let go of the store that this process serves, or are gone.
/// The first cause, if any failed.
pub fn wait_for_others(server: &StoreServer, env: &WorkerEnv, patience: Duration) -> Option<ErrorRecord> {
    server.wait_for_wills(patience);
    let records =
        Store::connect((&env.master_addr, env.master_port), GRACE).and_then(|mut store| failures::list(&mut store));
    // Its own store: an error means that the system lacks something, and then the ranks have said what they know.
    failures::first_cause(&records.unwrap_or_default()).cloned()
}

/// The status of a run whose first failure is `cause`.
pub fn verdict(cause: &ErrorRecord, output_dir: &Path) -> ExitStatus {
    match ExitStatus::from_code(cause.exit_status) {
        Some(status @ (ExitStatus::BadInput | ExitStatus::DoNotRerun)) => status,
        _ if newest_checkpoint(output_dir).is_some() => ExitStatus::Stopped,
        _ => ExitStatus::Failed,
    }
}

/// The last lines on a run that failed, by `rank`, which has said what happened to itself.
pub fn report(cause: &ErrorRecord, rank: usize, output: &Output) {
    if cause.rank != rank {
        say(format_args!("fsdp-train: the first failure: {}", describe(cause)));
    }
    match (verdict(cause, &output.dir), newest_checkpoint(&output.dir)) {
        (ExitStatus::Stopped, Some(path)) => {
            let how =
                if output.resumes { "the same command goes" } else { "with --set checkpoint.resume=auto it goes" };
            say(format_args!("fsdp-train: {} is committed; {how} on from there", path.display()));
        }
        (ExitStatus::Failed, _) => say("fsdp-train: no checkpoint is committed"),
        _ => {}
    }
}

/// A line on stderr, for whoever still reads it.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Who, where, when and why, in one line.
pub fn describe(record: &ErrorRecord) -> String {
    let who = format!("rank {} (host {}, pid {})", record.rank, record.host, record.pid);
    match (record.kind, record.step) {
        // Said on its behalf.
        (ErrorKind::Signal, _) => format!("{who} {}", record.message),
        (_, 0) => format!("{who} failed before the first step: {}", record.message),
        (_, step) => format!("{who} failed at step {step}: {}", record.message),
    }
}

/// The record of a rank that ends because of others.
pub fn peer_lost(rank: usize, local_rank: usize, message: String) -> ErrorRecord {
    let mut record = ErrorRecord::new(rank, local_rank, ErrorKind::PeerLost, message, ExitStatus::Failed);
    record.step = whereabouts::step();
    record.phase = Some(whereabouts::phase());
    record
}

fn newest_checkpoint(output_dir: &Path) -> Option<PathBuf> {
    let mut checkpoints = sharded::list(&output_dir.join("checkpoints")).ok()?;
    checkpoints.pop().map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_and_divergence_are_the_run_s_status_whatever_is_saved() {
        let nowhere = Path::new("/nonexistent");
        for (status, expected) in [
            (ExitStatus::Failed, ExitStatus::Failed),
            (ExitStatus::BadInput, ExitStatus::BadInput),
            (ExitStatus::DoNotRerun, ExitStatus::DoNotRerun),
        ] {
            let cause = ErrorRecord::new(1, 1, ErrorKind::Other, String::new(), status);
            assert_eq!(verdict(&cause, nowhere), expected, "{status:?}");
        }
    }
}
