//! What a launcher said of a run, and what must hold after each.

use std::time::Duration;

use fsdp_checkpoint::sharded::Checkpoint;
use fsdp_tests_behaviour::job::{Ended, Job};

/// The first of the launcher's own lines that names a rank, and that rank.
fn named_rank(ended: &Ended) -> Option<(usize, &str)> {
    ended.stderr.lines().find_map(|line| {
        let (rank, _) = line.strip_prefix("fsdp-launch: rank ")?.split_once(' ')?;
        Some((rank.parse().ok()?, line))
    })
}

/// The first rank named is `rank`, in a line with all `parts`.
#[track_caller]
pub fn assert_named(ended: &Ended, rank: usize, parts: &[&str]) {
    let (named, line) = named_rank(ended).unwrap_or_else(|| panic!("no rank is named: {ended:?}"));
    assert_eq!(named, rank, "the wrong rank is named: {ended:?}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {line:?}: {ended:?}");
    }
}

/// After a failure: the status says whether a checkpoint is committed, the newest one is whole, and nobody is left.
#[track_caller]
pub fn assert_recoverable(job: &Job, ended: &Ended) {
    job.assert_no_survivors(Duration::ZERO);
    let checkpoints = job.checkpoints();
    let expected = if checkpoints.is_empty() { 1 } else { 75 };
    assert_eq!(ended.status, expected, "with the checkpoints {checkpoints:?}: {ended:?}");
    if let Some(newest) = checkpoints.last() {
        Checkpoint::open(&job.path("out/checkpoints").join(newest)).expect("the last checkpoint loads");
    }
}
