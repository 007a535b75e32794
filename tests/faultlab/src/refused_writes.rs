//! Saves that the file system refuses: calls that fail one by one, and a disk that is too small.

use std::path::Path;

use fsdp_tests_behaviour::job::{Ended, Job};

use crate::saves::{BEHIND, IN_STEP, SHORT, SHORT_STEPS, assert_finishes_as, assert_goes_on, debris, newest_step};
use crate::strace::{self, Sampled};
use crate::tally::{Tally, Times};
use crate::tmpfs::Tmpfs;

/// Names for `strace`, and how the operating system puts them.
const ERRORS: [(&str, &str); 3] =
    [("ENOSPC", "No space left on device"), ("EIO", "Input/output error"), ("EDQUOT", "Disk quota exceeded")];

/// Row 13: each call of a save fails, on either rank, with each error; and disks for one and a half checkpoints.
pub fn refused(tally: &mut Tally, n: usize) {
    match strace::is_missing() {
        Some(reason) => tally.skip(reason),
        None => calls(tally, n),
    }
    match Tmpfs::is_refused() {
        Some(reason) => tally.skip(format!("no small disks: {reason}")),
        None => small_disks(tally),
    }
}

/// About `n` calls of saves, one by one.
fn calls(tally: &mut Tally, n: usize) {
    let whole = Job::new();
    whole.finish(2, &[SHORT, IN_STEP].concat());
    let (mut num_calls, times) = (0, Times::default());
    let cases: Vec<(&[&str], usize)> = vec![(IN_STEP, 0), (IN_STEP, 1), (BEHIND, 0), (BEHIND, 1)];
    for (i, &(mode, rank)) in cases.iter().enumerate() {
        let args = [SHORT, mode].concat();
        let sampled = Sampled::of_saves(2, &args, rank, n.div_ceil(cases.len()));
        num_calls += sampled.num_calls;
        for (k, call) in sampled.calls.iter().enumerate() {
            let (error, text) = ERRORS[(i + k) % ERRORS.len()];
            let inject = call.inject(&format!("error={error}"));
            tally.check(format_args!("rank {rank}, {}: {inject}: {}", mode[1], call.line), || {
                let job = Job::new();
                let ended = job.spawn(strace::command(&job, 2, &args, rank, std::slice::from_ref(&inject))).wait();
                if ended.status != 0 {
                    times.add(ended.took);
                }
                assert_refused(&job, &ended, error, text);
                assert_finishes_as(&job, 2, &args, &whole);
            });
        }
    }
    tally.note(format!("out of {num_calls} calls of saves, runs that failed took {times}"));
}

/// What a call that failed, if one did, has led to.
#[track_caller]
fn assert_refused(job: &Job, ended: &Ended, error: &str, text: &str) {
    assert_goes_on(job, ended, 0);
    let trace = job.read("trace");
    let mut failed = trace.lines().filter(|line| line.ends_with("(INJECTED)") && line.contains("/out/checkpoints"));
    if let Some(line) = failed.next() {
        let said = ended.stderr.lines().find(|line| line.contains("/out/checkpoints") && line.contains(text));
        let said = said.unwrap_or_else(|| panic!("not told of: {line}\n{ended:?}"));
        let of_space = ["write(", "pwrite64(", "fallocate("].iter().any(|call| line.contains(call)) && error != "EIO";
        if of_space {
            assert!(said.contains("bytes needed") && said.contains("free"), "told of without sizes: {line}\n{said}");
        }
    }
    // An old checkpoint that cannot be deleted costs space, not the run.
    if ended.status == 0 {
        assert_eq!(newest_step(job), SHORT_STEPS, "{ended:?}");
        assert!(debris(job).iter().all(|name| name.starts_with(".trash-")), "{:?}: {ended:?}", debris(job));
    } else {
        assert_eq!(debris(job), [""; 0], "what was left unfinished is removed: {ended:?}");
    }
}

fn small_disks(tally: &mut Tally) {
    for mode in [IN_STEP, BEHIND] {
        let args = [SHORT, mode].concat();
        let whole = Job::new();
        whole.finish(2, &args);
        let one_bytes = blocks_bytes(&whole.path("out/checkpoints").join(whole.checkpoints().last().expect("one")));
        for (percent, fits) in [(50, 0), (150, 1)] {
            tally.check(format_args!("{}, a disk for {percent} % of a checkpoint", mode[1]), || {
                let job = Job::new();
                std::fs::create_dir_all(job.path("out/checkpoints")).expect("a folder of the test");
                let disk = Tmpfs::mount(&job.path("out/checkpoints"), one_bytes * percent / 100);
                let empty_bytes = disk.free_bytes();
                let ended = job.run(2, &args);
                assert_goes_on(&job, &ended, 0);
                assert_eq!(job.checkpoints().len(), fits, "{ended:?}");
                assert_ne!(ended.status, 0, "{ended:?}");
                let said = ended.stderr.lines().find(|line| line.contains("no space for")).unwrap_or_default();
                for part in ["/out/checkpoints", "bytes needed", "free", "space"] {
                    assert!(said.contains(part), "{part:?} is not in {said:?}: {ended:?}");
                }
                assert_eq!(disk.free_bytes(), empty_bytes - one_bytes * fits as u64, "space is given back: {ended:?}");
                let before = newest_step(&job);
                let again = job.run(2, &args);
                assert_goes_on(&job, &again, before);
                assert_eq!(disk.free_bytes(), empty_bytes - one_bytes * fits as u64, "and again: {again:?}");
                disk.resize(one_bytes * 10);
                assert_finishes_as(&job, 2, &args, &whole);
            });
        }
    }
}

/// What the files of a folder take on a file system of pages.
fn blocks_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a checkpoint").map(|entry| entry.expect("an entry"));
    entries.map(|entry| entry.metadata().expect("a file").len().next_multiple_of(4096)).sum()
}
