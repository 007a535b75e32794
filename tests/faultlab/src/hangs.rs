//! Ranks that do not come to a collective, and ranks that come to another one.

use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Ended, Job};
use fsdp_tests_behaviour::processes::{send, workers};
use rustix::process::Signal;

use crate::kills::{LONG, sleep_randomly, start_training};
use crate::report::{assert_named, assert_recoverable};
use crate::tally::{Tally, Times};

const TIMEOUT: &[&str] = &["--set", "fsdp.timeout_secs=5"];

/// From the hang to the launcher's end: the ranks' timeout, and 2 s.
const END: Duration = Duration::from_secs(5 + 2);

/// These repetitions mostly wait.
const AT_ONCE: usize = 3;

/// Collectives of a training step, as messages name them.
const OPS: [&str; 4] = ["all_gather", "reduce_scatter", "all_reduce", "barrier"];

#[derive(Debug, Clone, Copy)]
enum Hang {
    Suspended,
    Spin,
    Skip,
}

/// Row 4: one of four ranks.
pub fn of_ranks(tally: &mut Tally, n: usize) {
    let hangs = [Hang::Suspended, Hang::Spin, Hang::Skip].into_iter().cycle();
    let cases: Vec<(Hang, usize)> = hangs.take(n).map(|hang| (hang, fastrand::usize(0..4))).collect();
    let (waited, skipped) = (Times::default(), Times::default());
    tally.check_at_once(AT_ONCE, &cases, |&(hang, culprit)| {
        let job = Job::new();
        let (ended, took) = match hang {
            Hang::Suspended => suspend(&job, culprit),
            Hang::Spin => run_with(&job, &format!("rank={culprit},step=5,do=spin")),
            Hang::Skip => run_with(&job, &format!("rank={culprit},step=5,do=skip")),
        };
        let times = if matches!(hang, Hang::Skip) { &skipped } else { &waited };
        times.add(took);
        let told = format!("{took:?}: {ended:?}");
        assert_named(&ended, culprit, &[]);
        assert_recoverable(&job, &ended);
        let line = ended.stderr.lines().find(|line| line.starts_with("fsdp-launch: rank ")).expect("a named rank");
        assert!(OPS.iter().any(|op| line.contains(op)), "no collective in {line:?}: {told}");
        assert!(took <= END, "{told}");
        match hang {
            Hang::Suspended => assert!(line.contains("is suspended"), "{told}"),
            Hang::Spin => assert!(line.contains("did not come") && line.contains("at step 5"), "{told}"),
            Hang::Skip => assert!(line.contains("barrier"), "{told}"),
        }
    });
    tally.note(format!("exit of those that wait {waited}, of those that skip {skipped}; the timeout is 5 s"));
}

fn suspend(job: &Job, culprit: usize) -> (Ended, Duration) {
    let running = start_training(job, 4, true, TIMEOUT);
    sleep_randomly(50);
    send(workers(&job.resolved_config())[culprit].pid, Signal::STOP);
    let start = Instant::now();
    (running.wait(), start.elapsed())
}

/// The time counts from when the faulty rank says that it strikes.
fn run_with(job: &Job, fault: &str) -> (Ended, Duration) {
    let args = [LONG, TIMEOUT, &["--set", "checkpoint.every_steps=2"]].concat();
    let mut running = job.spawn(job.faulty_command(4, &args, fault));
    running.wait_for_step(4);
    let start = Instant::now();
    (running.wait(), start.elapsed())
}

/// Row 5: one rank of two to four calls another collective: another operation, size, or data type.
pub fn desyncs(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for i in 0..n {
        let (num_ranks, difference) = (2 + i / 3 % 3, ["op", "size", "dtype"][i % 3]);
        let culprit = fastrand::usize(0..num_ranks);
        tally.check(format_args!("rank {culprit} of {num_ranks}: {difference}"), || {
            let job = Job::new();
            let args = [LONG, TIMEOUT, &["--set", "checkpoint.every_steps=2"]].concat();
            let fault = format!("rank={culprit},step=5,do=desync={difference}");
            let mut running = job.spawn(job.faulty_command(num_ranks, &args, &fault));
            running.wait_for_step(4);
            let start = Instant::now();
            let ended = running.wait();
            let took = start.elapsed();
            times.add(took);
            let (ours, theirs) = match difference {
                "op" => ("broadcast", "all_reduce"),
                "size" => ("64 bytes of Float", "32 bytes of Float"),
                _ => ("32 bytes of BFloat16", "32 bytes of Float"),
            };
            let is_told = |line: &&str| {
                let named = format!("rank {culprit} ");
                [ours, theirs, &named, "ranks call different collectives"].iter().all(|part| line.contains(part))
            };
            assert!(ended.stderr.lines().any(|line| is_told(&line)), "{ended:?}");
            assert_recoverable(&job, &ended);
            assert!(took <= Duration::from_secs(2), "{took:?}: {ended:?}");
        });
    }
    tally.note(format!("exit {times}"));
}
