//! How many starts of a run in a row led nowhere, in `restarts.json` of the output folder. So a run that fails at the same
//! place again and again ends, whether a launcher, a scheduler's requeue or a shell's loop starts it anew.
//!
//! A start led somewhere if it committed a newer checkpoint than the one that it went on from, or finished a step beyond the
//! furthest of the starts before it. What was finished is read from the run's step log (`metrics.jsonl`), which outlives
//! every process. A start counts once it has failed: not where somebody asked it to stop, nor where whoever would count was
//! itself killed or lost its machine.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{ControlError, ExitStatus};

/// After so many fruitless starts in a row there is no other.
const MAX_FRUITLESS_STARTS: u32 = 3;

/// How much of the end of a step log is looked at, in bytes. A line has some hundred.
const LOG_END_BYTES: u64 = 64 << 10;

/// Longest description of a failure that is kept, in characters.
const MAX_CAUSE_CHARS: usize = 1000;

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Step of the newest committed checkpoint; 0 without one.
    pub checkpoint_step: u64,
    /// Last step in the step log; see [`finished_step`].
    pub finished_step: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Count {
    schema: u32,
    /// Starts in a row that failed and led nowhere.
    num_fruitless: u32,
    /// The furthest step that a start has finished or committed.
    furthest_step: u64,
    last_failure: String,
}

/// A start of the run. [`Start::conclude`] ends it; dropped, it does not count.
#[derive(Debug)]
#[must_use = "a start is counted when it ends"]
pub struct Start {
    path: PathBuf,
    count: Count,
    /// Step of the checkpoint from which it goes on; 0 without one.
    from_step: u64,
}

impl Start {
    /// A run in the output folder `dir` starts, which has come as far as `reached`. Only for who holds the folder's lock.
    ///
    /// # Errors
    /// [`ControlError::NoProgress`]: the starts before this one led nowhere.
    pub fn begin(dir: &Path, reached: Reached) -> Result<Self, ControlError> {
        let path = dir.join("restarts.json");
        let from_step = reached.checkpoint_step;
        let mut start = match read(&path) {
            Some(count) => Start { path, count, from_step },
            None => Start { path, count: Count { schema: 1, furthest_step: from_step, ..Count::default() }, from_step },
        };
        // A start that nobody counted may have got further.
        start.count_progress(reached);
        if start.count.num_fruitless >= MAX_FRUITLESS_STARTS {
            return Err(ControlError::NoProgress {
                path: start.path,
                num_starts: start.count.num_fruitless,
                last_failure: start.count.last_failure,
            });
        }
        Ok(start)
    }

    /// Notes how the start ended: with `status`, and with `cause` where something failed. What fails whatever is done, and
    /// bad input, counts for nothing: it is told of at once.
    ///
    /// Gives the status with which the run is to end, and what to say about it: where this was the last start, that it was,
    /// and where the count is.
    pub fn conclude(self, status: ExitStatus, cause: Option<&str>, reached: Reached) -> (ExitStatus, Option<String>) {
        let path = self.path.clone();
        let num_fruitless = match (status, cause) {
            (ExitStatus::Done, _) => {
                self.finish();
                0
            }
            (ExitStatus::Stopped | ExitStatus::Failed, Some(cause)) => self.fail(reached, cause),
            (ExitStatus::Stopped | ExitStatus::Failed, None) | (ExitStatus::BadInput | ExitStatus::DoNotRerun, _) => {
                self.stop(reached);
                0
            }
        };
        if num_fruitless < MAX_FRUITLESS_STARTS {
            return (status, None);
        }
        let last = format!(
            "{num_fruitless} starts in a row failed without a new step, so this run does not start again; find the cause, \
             then delete {} to try again",
            path.display()
        );
        (ExitStatus::DoNotRerun, Some(last))
    }

    /// The run has failed by `cause`. How many starts in a row have now led nowhere.
    ///
    /// A file that cannot be written is no reason to fail otherwise: then this start is not counted the next time.
    fn fail(mut self, reached: Reached, cause: &str) -> u32 {
        if !self.count_progress(reached) {
            self.count.num_fruitless += 1;
        }
        self.count.last_failure = cause.chars().take(MAX_CAUSE_CHARS).collect();
        self.write();
        self.count.num_fruitless
    }

    /// The run was stopped on somebody's wish, or did not come to train. That counts for nothing, but what it has reached
    /// does.
    fn stop(mut self, reached: Reached) {
        if self.count_progress(reached) {
            self.forget();
        }
    }

    /// The run is done: nothing is left to count.
    fn finish(self) {
        self.forget();
    }

    /// Whether the run has got somewhere; then the starts before do not count any more.
    fn count_progress(&mut self, reached: Reached) -> bool {
        let furthest_step = reached.checkpoint_step.max(reached.finished_step);
        let is_further = reached.checkpoint_step > self.from_step || furthest_step > self.count.furthest_step;
        if is_further {
            self.count.num_fruitless = 0;
        }
        self.count.furthest_step = self.count.furthest_step.max(furthest_step);
        is_further
    }

    /// Whole or not at all.
    fn write(&self) {
        let json = serde_json::to_vec_pretty(&self.count).expect("plain fields are always representable as JSON");
        let temporary = self.path.with_extension("json.tmp");
        if std::fs::write(&temporary, json).and_then(|()| std::fs::rename(&temporary, &self.path)).is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
    }

    fn forget(&self) {
        // What is not there, or cannot be removed, changes nothing for this run.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What is damaged counts for nothing.
fn read(path: &Path) -> Option<Count> {
    let count: Count = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (count.schema == 1).then_some(count)
}

/// The last step in a step log: JSON lines, each with a `step`. 0 without one.
pub fn finished_step(log: &Path) -> u64 {
    let end = File::open(log).and_then(|mut file| {
        let len_bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(len_bytes.saturating_sub(LOG_END_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_END_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    // The last line may be cut.
    let step = |line: &[u8]| serde_json::from_slice::<serde_json::Value>(line).ok()?["step"].as_u64();
    end.unwrap_or_default().rsplit(|&byte| byte == b'\n').find_map(step).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(checkpoint_step: u64, finished_step: u64) -> Reached {
        Reached { checkpoint_step, finished_step }
    }

    #[test]
    fn three_starts_without_a_new_step_are_the_last() {
        // Where each start began and ended, and the count after it.
        for (name, starts, expected) in [
            ("fails before the first step", vec![(0, 0, 0); 3], vec![1, 2, 3]),
            // The first one brings 12 steps, the others none beyond them.
            ("fails at step 13", vec![(0, 10, 12), (10, 10, 12), (10, 10, 11), (10, 10, 12)], vec![0, 1, 2, 3]),
            ("gets further each time", vec![(0, 0, 3), (0, 0, 4), (0, 0, 5), (0, 0, 6)], vec![0, 0, 0, 0]),
            ("commits what another had only finished", vec![(0, 0, 19), (0, 10, 12), (10, 10, 13)], vec![0, 0, 1]),
            ("a new step resets", vec![(10, 10, 10), (10, 10, 10), (10, 10, 11), (10, 10, 11)], vec![1, 2, 0, 1]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            for ((from, committed, finished), expected) in starts.into_iter().zip(expected) {
                let start = Start::begin(dir.path(), reached(from, from)).unwrap();
                assert_eq!(start.fail(reached(committed, finished), "a bug"), expected, "{name}");
            }
        }
    }

    #[test]
    fn a_fourth_start_is_refused_until_the_file_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            let _ = Start::begin(dir.path(), reached(0, 0)).unwrap().fail(reached(0, 0), "rank 1 panicked");
        }
        for _ in 0..2 {
            let message = Start::begin(dir.path(), reached(0, 0)).unwrap_err().to_string();
            assert!(message.contains("restarts.json: 3 starts in a row"), "{message}");
            assert!(message.contains("rank 1 panicked") && message.contains("delete this file"), "{message}");
        }
        std::fs::remove_file(dir.path().join("restarts.json")).unwrap();
        Start::begin(dir.path(), reached(0, 0)).unwrap().finish();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn starts_that_nobody_counted_may_still_have_got_somewhere() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |step| Start::begin(dir.path(), reached(0, step)).unwrap();
        for expected in [1, 2] {
            (0..5).for_each(|_| drop(begin(0)));
            assert_eq!(begin(0).fail(reached(0, 0), ""), expected);
        }
        // One comes to step 3, and is killed with its launcher.
        drop(begin(0));
        assert_eq!(begin(3).fail(reached(0, 3), ""), 1);
    }

    #[test]
    fn stops_on_wish_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..10 {
            Start::begin(dir.path(), reached(4, 4)).unwrap().stop(reached(4, 4));
        }
        assert!(!dir.path().join("restarts.json").exists());
        // Nor do they reset the count, unless they got somewhere.
        let fail = || Start::begin(dir.path(), reached(4, 4)).unwrap().fail(reached(4, 4), "");
        assert_eq!((fail(), fail()), (1, 2));
        Start::begin(dir.path(), reached(4, 4)).unwrap().stop(reached(4, 4));
        assert_eq!(fail(), 3);
        std::fs::remove_file(dir.path().join("restarts.json")).unwrap();
        assert_eq!((fail(), fail()), (1, 2));
        Start::begin(dir.path(), reached(4, 4)).unwrap().stop(reached(5, 5));
        assert_eq!(fail(), 1);
    }

    #[test]
    fn statuses_and_causes_say_what_counts() {
        use ExitStatus::{BadInput, DoNotRerun, Done, Failed, Stopped};
        for (status, cause, counts) in [
            (Failed, Some("a bug"), true),
            (Stopped, Some("a bug"), true),
            (Stopped, None, false),
            // Killed at somebody's wish.
            (Failed, None, false),
            (BadInput, Some("no such key"), false),
            (DoNotRerun, Some("the loss is NaN"), false),
            (Done, None, false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            for round in 1..=3 {
                let start = Start::begin(dir.path(), reached(0, 0)).unwrap();
                let (got, last) = start.conclude(status, cause, reached(0, 0));
                let is_last = counts && round == 3;
                assert_eq!((got, last.is_some()), (if is_last { DoNotRerun } else { status }, is_last), "{status:?}");
                if let Some(last) = last {
                    assert!(last.starts_with("3 starts in a row") && last.contains("restarts.json"), "{last}");
                }
            }
        }
    }

    #[test]
    fn the_last_whole_line_of_a_step_log_counts() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("metrics.jsonl");
        assert_eq!(finished_step(&log), 0);
        let long = format!("{{\"step\": 8, \"x\": \"{}\"}}\n", "y".repeat(100_000));
        for (text, expected) in [
            ("", 0),
            ("{\"step\": 1, \"loss\": 2.0}\n", 1),
            ("{\"step\": 1}\n{\"step\": 2}\n{\"ste", 2),
            ("{\"step\": 7}\n{\"note\": 1}\n\n", 7),
            (&format!("{long}{{\"step\": 9}}\n"), 9),
        ] {
            std::fs::write(&log, text).unwrap();
            assert_eq!(finished_step(&log), expected);
        }
    }

    #[test]
    fn a_damaged_file_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{}", "[1", "{\"schema\": 2}"] {
            std::fs::write(dir.path().join("restarts.json"), text).unwrap();
            Start::begin(dir.path(), reached(0, 0)).unwrap().finish();
        }
    }
}
