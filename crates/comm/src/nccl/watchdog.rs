//! The watchdog: a thread that looks at the groups of this process ten times a second. Where NCCL reports an error, or a
//! collective is not done in time, it aborts all communicators, so that the device and the rank's thread come back, finds
//! out who is missing, and leaves the error for the next call. A rank's thread that does not come back is ended with the
//! process.
//!
//! Nothing here waits for the store, which may not answer: see `board.rs`. So a rank is told, or gone, within 5 s after the
//! timeout.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use fsdp_control::ControlError;

use super::board::{Board, Say};
use super::communicator::{self, Communicator};
use super::failure::{Failure, Report};
use crate::Call;

pub(super) const TICK: Duration = Duration::from_millis(100);
/// How long the rank's thread may take to come back after a failure was noticed: with the ticks, 5 s after the timeout.
const COME_BACK_LIMIT: Duration = Duration::from_millis(4500);
/// How long of that the other ranks' reports may take.
const BOARD_LIMIT: Duration = Duration::from_millis(3500);

/// Looks after the groups that were split from one, as long as one of them lives.
#[derive(Debug)]
pub(super) struct Watchdog {
    timeout: Duration,
    vitals: Arc<Vitals>,
    groups: Mutex<Vec<Weak<Communicator>>>,
}

/// What the watchdog tells its groups.
#[derive(Debug, Default)]
pub(super) struct Vitals {
    /// Time in which this process runs: while it is stopped as a whole, as when its job is suspended, this clock stands.
    micros: AtomicU64,
    /// Groups are about to be aborted. Known before the first one is: from then on none trusts the device.
    is_ending: AtomicBool,
    /// Why, once that is found out.
    failure: Mutex<Option<Failure>>,
    /// Signalled when it is.
    found: Condvar,
    /// The rank's thread knows of it.
    is_told: AtomicBool,
}

impl Vitals {
    pub fn now(&self) -> Duration {
        Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }

    pub fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// For the rank's thread, once something has failed: waits while the watchdog finds out more, 4.5 s at most (then the
    /// process has ended).
    pub fn failure(&self) -> Failure {
        let is_open = |failure: &mut Option<Failure>| failure.is_none();
        let failure = self.found.wait_while(self.lock(), is_open).expect(NO_PANIC).clone();
        self.is_told.store(true, Ordering::SeqCst);
        failure.expect("it was waited for")
    }

    fn lock(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failure.lock().expect(NO_PANIC)
    }
}

impl Watchdog {
    /// # Errors
    /// No thread can be started.
    pub fn start(timeout: Duration, board: Board) -> Result<Arc<Self>, ControlError> {
        let watchdog = Arc::new(Watchdog { timeout, vitals: Arc::default(), groups: Mutex::default() });
        let weak = Arc::downgrade(&watchdog);
        let failed = |source| ControlError::System { what: "cannot start the watchdog thread".into(), source };
        std::thread::Builder::new().name("nccl-watchdog".into()).spawn(move || watch(&weak, board)).map_err(failed)?;
        Ok(watchdog)
    }

    pub fn vitals(&self) -> Arc<Vitals> {
        Arc::clone(&self.vitals)
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

const NO_PANIC: &str = "no thread panics while it holds the lock";

/// The thread.
fn watch(watchdog: &Weak<Watchdog>, board: Board) {
    let mut last_tick = Instant::now();
    loop {
        std::thread::sleep(TICK);
        let Some(watchdog) = watchdog.upgrade() else { return };
        let awake = last_tick.elapsed().min(2 * TICK);
        last_tick = Instant::now();
        watchdog.vitals.micros.fetch_add(awake.as_micros() as u64, Ordering::Relaxed);
        let groups = watchdog.groups();
        let peer_gave_up = || {
            let other_rank = board.who_gave_up()?;
            Some(Failure::PeerGaveUp { other_rank, call: report(&groups).last? })
        };
        let failure = groups.iter().find_map(|group| group.look(watchdog.timeout)).or_else(peer_gave_up);
        if let Some(failure) = failure {
            drop(groups);
            end(watchdog, failure, &board);
            return;
        }
    }
}

/// Aborts all, finds out why, and sees to it that the process ends.
fn end(watchdog: Arc<Watchdog>, mut failure: Failure, board: &Board) {
    let start = Instant::now();
    watchdog.vitals.is_ending.store(true, Ordering::SeqCst);
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
        let say = match failure {
            Failure::Timeout { .. } => Say::Exchange,
            Failure::PeerGaveUp { .. } => Say::Report,
            // Known already; the others are told before this rank's thread, which may end the process.
            Failure::Nccl { .. } | Failure::Mismatch { .. } => Say::GiveUp,
        };
        let reports = board.say(say, report, BOARD_LIMIT.saturating_sub(start.elapsed()));
        let failed = groups.iter().find(|group| group.oldest().as_ref() == failure.call());
        if let (Some(reports), Some(group)) = (reports, failed.or(groups.first())) {
            failure = failure.judged(&reports, group.rank, &group.members);
        }
        *watchdog.vitals.lock() = Some(failure.clone());
        watchdog.vitals.found.notify_all();
    }
    let rank = groups.first().map_or(0, |group| group.rank);
    drop((left, groups));
    // Only the groups' owner holds it from here on: gone means that the rank's thread has dropped them.
    let watchdog = Arc::downgrade(&{ watchdog });
    while start.elapsed() < COME_BACK_LIMIT {
        let Some(watchdog) = watchdog.upgrade() else { return };
        if watchdog.vitals.is_told.load(Ordering::SeqCst) {
            return;
        }
        drop(watchdog);
        std::thread::sleep(TICK);
    }
    let error = failure.to_error(rank);
    eprintln!("{error}; this rank did not come back within {COME_BACK_LIMIT:?}, so it ends here");
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
