//! The watchdog: a thread that looks at the groups of this process ten times a second. Where NCCL reports an error, or a
//! collective is not done in time, it aborts all communicators, so that the device and the rank's thread come back, finds
//! out who is missing, and leaves the error for the next call. A rank's thread that does not come back is ended with the
//! process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use fsdp_control::ControlError;

use super::communicator::{self, Communicator};
use super::failure::{Board, Failure, Report};
use crate::Call;

pub(super) const TICK: Duration = Duration::from_millis(100);
/// How often it looks whether another rank has given up.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long the rank's thread may take to come back after an abort.
const COME_BACK_LIMIT: Duration = Duration::from_secs(5);

/// Looks after the groups that were split from one, as long as one of them lives.
#[derive(Debug)]
pub(super) struct Watchdog {
    timeout: Duration,
    clock: Arc<Clock>,
    groups: Mutex<Vec<Weak<Communicator>>>,
}

/// Time in which this process runs: while it is stopped as a whole, as when its job is suspended, this clock stands.
#[derive(Debug, Default)]
pub(super) struct Clock {
    micros: AtomicU64,
}

impl Clock {
    pub fn now(&self) -> Duration {
        Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }
}

impl Watchdog {
    /// # Errors
    /// No thread can be started.
    pub fn start(timeout: Duration, board: Board) -> Result<Arc<Self>, ControlError> {
        let watchdog = Arc::new(Watchdog { timeout, clock: Arc::default(), groups: Mutex::default() });
        let weak = Arc::downgrade(&watchdog);
        let failed = |source| ControlError::System { what: "cannot start the watchdog thread".into(), source };
        std::thread::Builder::new().name("nccl-watchdog".into()).spawn(move || watch(&weak, board)).map_err(failed)?;
        Ok(watchdog)
    }

    pub fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.clock)
    }

    pub fn add(&self, group: &Arc<Communicator>) {
        self.groups.lock().expect(NO_PANIC).push(Arc::downgrade(group));
    }

    /// The groups that live.
    fn groups(&self) -> Vec<Arc<Communicator>> {
        let mut groups = self.groups.lock().expect(NO_PANIC);
        groups.retain(|group| group.strong_count() > 0);
        groups.iter().filter_map(Weak::upgrade).collect()
    }
}

const NO_PANIC: &str = "no thread panics while it holds the groups";

/// The thread.
fn watch(watchdog: &Weak<Watchdog>, mut board: Board) {
    let mut last_tick = Instant::now();
    let mut last_ask = Instant::now();
    loop {
        std::thread::sleep(TICK);
        let Some(watchdog) = watchdog.upgrade() else { return };
        let awake = last_tick.elapsed().min(2 * TICK);
        last_tick = Instant::now();
        watchdog.clock.micros.fetch_add(awake.as_micros() as u64, Ordering::Relaxed);
        let groups = watchdog.groups();
        let mut failure = groups.iter().find_map(|group| group.look(watchdog.timeout));
        if failure.is_none() && last_ask.elapsed() >= ASK_EVERY {
            last_ask = Instant::now();
            failure = board.who_gave_up().and_then(|other_rank| {
                let call = report(&groups).last?;
                Some(Failure::PeerGaveUp { other_rank, call })
            });
        }
        if let Some(failure) = failure {
            drop(groups);
            end(watchdog, failure, &mut board);
            return;
        }
    }
}

/// Aborts all, finds out why, and sees to it that the process ends.
fn end(watchdog: Arc<Watchdog>, mut failure: Failure, board: &mut Board) {
    let start = Instant::now();
    let groups = watchdog.groups();
    let report = report(&groups);
    let mut left = groups.clone();
    while !left.is_empty() && start.elapsed() < COME_BACK_LIMIT {
        left.retain(|group| match group.seize() {
            Some(raw) => {
                raw.into_iter().for_each(|raw| communicator::abort(group.library, raw));
                false
            }
            None => true,
        });
        if !left.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    if left.is_empty() {
        match failure {
            Failure::Timeout { .. } => {
                let reports = board.exchange(&report);
                let failed = groups.iter().find(|group| group.oldest().as_ref() == failure.call());
                if let Some(group) = failed.or(groups.first()) {
                    failure = failure.judged(&reports, group.rank, &group.members);
                }
            }
            Failure::PeerGaveUp { .. } => board.report(&report),
            // Known already; the others are told before this rank's thread, which may end the process.
            Failure::Nccl { .. } | Failure::Mismatch { .. } => _ = board.give_up(&report),
        }
        groups.iter().for_each(|group| group.set_failure(failure.clone()));
    }
    let rank = groups.first().map_or(0, |group| group.rank);
    drop((left, groups));
    // Only the groups' owner holds it from here on: gone means that the rank's thread has dropped them.
    let watchdog = Arc::downgrade(&{ watchdog });
    while start.elapsed() < COME_BACK_LIMIT {
        let Some(watchdog) = watchdog.upgrade() else { return };
        if watchdog.groups().iter().any(|group| group.is_told()) {
            return;
        }
        drop(watchdog);
        std::thread::sleep(TICK);
    }
    let error = failure.to_error(rank);
    eprintln!("{error}; this rank did not come back within {COME_BACK_LIMIT:?} of the abort, so it ends here");
    // SAFETY: `_exit` has no preconditions. Not `exit`: its handlers could wait for threads that are stuck.
    unsafe { _exit(1) }
}

/// What this rank has called last on any group, and what it waits for.
fn report(groups: &[Arc<Communicator>]) -> Report {
    let by_seq = |call: &Call| call.seq;
    Report {
        last: groups.iter().filter_map(|group| group.calls.last()).max_by_key(by_seq),
        oldest: groups.iter().filter_map(|group| group.oldest()).min_by_key(by_seq),
    }
}

unsafe extern "C" {
    /// Ends the process at once; of the C library.
    fn _exit(status: std::ffi::c_int) -> !;
}
