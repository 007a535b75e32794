//! What went well, counted.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    total: usize,
    /// What the row says besides: times, numbers of operations.
    notes: Vec<String>,
    /// Why the row, or a part of it, cannot run here.
    skipped: Vec<String>,
}

impl Tally {
    /// One repetition; it fails by a panic, which is printed with `what` and does not end the row.
    pub fn check(&mut self, what: impl fmt::Display, repetition: impl FnOnce()) {
        self.total += 1;
        match catch_unwind(AssertUnwindSafe(repetition)) {
            Ok(()) => self.passed += 1,
            Err(_) => eprintln!("faultlab: failed: {what}"),
        }
    }

    /// One repetition for each of `cases`, `num_at_once` of them beside each other: for those that mostly wait.
    pub fn check_at_once<T: fmt::Debug + Sync>(
        &mut self,
        num_at_once: usize,
        cases: &[T],
        repetition: impl Fn(&T) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let passed = Mutex::new(0);
        let work = || {
            while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                match catch_unwind(AssertUnwindSafe(|| repetition(case))) {
                    Ok(()) => *passed.lock().expect("counting does not panic") += 1,
                    Err(_) => eprintln!("faultlab: failed: {case:?}"),
                }
            }
        };
        std::thread::scope(|scope| (0..num_at_once).for_each(|_| drop(scope.spawn(work))));
        self.total += cases.len();
        self.passed += *passed.lock().expect("counting does not panic");
    }

    /// Adds to the row's line.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// The row, or a part of it, cannot run here.
    pub fn skip(&mut self, reason: impl Into<String>) {
        self.skipped.push(reason.into());
    }

    pub fn all_passed(&self) -> bool {
        self.passed == self.total && (self.total > 0 || !self.skipped.is_empty())
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.passed, self.total)?;
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))?;
        self.skipped.iter().try_for_each(|reason| write!(f, "; skipped: {reason}"))
    }
}

/// How long something took, each time.
#[derive(Debug, Default)]
pub struct Times(Mutex<Vec<Duration>>);

impl Times {
    pub fn add(&self, time: Duration) {
        self.0.lock().expect("adding does not panic").push(time);
    }
}

/// "median 0.12 s, max 0.34 s".
impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted = self.0.lock().expect("adding does not panic").clone();
        sorted.sort();
        match sorted.last() {
            Some(max) => {
                let median = sorted[sorted.len() / 2];
                write!(f, "median {:.2} s, max {:.2} s", median.as_secs_f64(), max.as_secs_f64())
            }
            None => f.write_str("never"),
        }
    }
}
