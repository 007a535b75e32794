//! Ranks that are slower than the others, and healthy ones that are not to be blamed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Ended, Job};
use fsdp_tests_behaviour::processes::{send_if_alive, workers};
use rustix::process::Signal;

use crate::tally::Tally;

/// The step at which a rank becomes slow, and steps until it must have been named.
const SLOW_FROM: u64 = 20;
const PATIENCE: u64 = 20;

/// Steps of one window.
const WINDOW: usize = 10;

/// A slow rank is stopped so long, and runs so long, over and over: it takes 2.5 times as long.
const STOPPED: Duration = Duration::from_millis(18);
const RUNS: Duration = Duration::from_millis(12);

/// The share of its time that a rank waits for a core, from which on a machine is too busy to tell which rank is slow.
const BUSY_MACHINE: f64 = 0.15;

/// A model of which a step takes some ten milliseconds of computing.
const LARGER: [(&str, &str); 2] =
    [("\"hidden_size\": 16", "\"hidden_size\": 256"), ("\"intermediate_size\": 24", "\"intermediate_size\": 1024")];

/// Row 6: a rank that takes twice as long for a step; then healthy runs, `n` of 50 windows each.
pub fn of_ranks(tally: &mut Tally, n: usize) {
    for i in 0..n {
        let culprit = fastrand::usize(0..3);
        match i % 2 {
            0 => tally.check(format_args!("rank {culprit} sleeps"), || sleeps(culprit)),
            _ => {
                let culprit = culprit % 2;
                tally.check(format_args!("rank {culprit} of 2 is stopped and continued"), || pauses(culprit));
            }
        }
    }
    let num_windows = n * 50;
    tally.check(format_args!("{num_windows} healthy windows"), || healthy(num_windows));
    tally.note(format!("{num_windows} healthy windows"));
}

fn warnings(ended: &Ended) -> Vec<&str> {
    ended.stderr.lines().filter(|line| line.contains(" is slow: ")).collect()
}

/// Those that came after the culprit had become slow. Before that another program may have made a rank slow.
fn warnings_when_slow(ended: &Ended) -> Vec<&str> {
    let step = |line: &str| line.strip_prefix("step ")?.split(':').next()?.parse::<u64>().ok();
    warnings(ended).into_iter().filter(|line| step(line) > Some(SLOW_FROM)).collect()
}

/// The culprit alone is named.
#[track_caller]
fn assert_warned(ended: &Ended, culprit: usize) {
    assert_eq!(ended.status, 0, "{ended:?}");
    let warnings = warnings_when_slow(ended);
    assert!(!warnings.is_empty(), "no warning in {ended:?}");
    for line in warnings {
        assert!(line.contains(&format!("rank {culprit} is slow: ")), "{line}");
        assert!(line.contains("(compute)"), "{line}");
        let ratio = line.split("is slow: ").nth(1).and_then(|rest| rest.split(" x ").next()).unwrap_or_default();
        let ratio: f64 = ratio.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!((1.5..4.0).contains(&ratio), "{line}");
    }
}

/// A step's computing is a sleep for all ranks, and a longer one for the culprit: other programs do not disturb it.
fn sleeps(culprit: usize) {
    let job = Job::new();
    let steps = format!("training.steps={}", SLOW_FROM + PATIENCE);
    let fault = format!("rank=*,step=1,do=slow=20;rank={culprit},step={SLOW_FROM},do=slow=22");
    let ended = job.spawn(job.faulty_command(3, &["--set", &steps], &fault)).wait();
    assert_warned(&ended, culprit);
}

/// The culprit is stopped for more than half of the time from some step on. A rank for each core, and they compute: where
/// other programs take the cores, which shows in how long the other rank waits for one, it is as slow, and the run tells
/// nothing.
fn pauses(culprit: usize) {
    for _ in 0..3 {
        let (ended, others_wait) = run_with_pauses(culprit);
        if warnings_when_slow(&ended).is_empty() && others_wait > BUSY_MACHINE {
            eprintln!(
                "faultlab: the other rank of {culprit} waited for a core for {others_wait:.2} of its time; once more"
            );
            continue;
        }
        return assert_warned(&ended, culprit);
    }
    panic!("other programs take the cores");
}

/// How the run ended, and the share of the time in which the other rank could have run but had no core.
fn run_with_pauses(culprit: usize) -> (Ended, f64) {
    let job = Job::new();
    for (from, to) in LARGER {
        job.replace("model/config.json", from, to);
    }
    let steps = format!("training.steps={}", SLOW_FROM + PATIENCE);
    let args = ["model.init=random", "training.seq_len=64", "training.micro_batch_size=8", &steps];
    let args: Vec<&str> = args.iter().flat_map(|set| ["--set", set]).collect();
    let mut running = job.start(2, &args);
    running.wait_for_step(SLOW_FROM);
    let ranks = workers(&job.resolved_config());
    let (pid, other) = (ranks[culprit].pid, ranks[1 - culprit].pid);
    let is_over = AtomicBool::new(false);
    let (start, first_wait) = (Instant::now(), waited_for_core(other).unwrap_or_default());
    let (ended, others_wait) = std::thread::scope(|scope| {
        let pauses = scope.spawn(|| {
            let mut others_wait = 0.0;
            while !is_over.load(Ordering::Relaxed) {
                send_if_alive(pid, Signal::STOP);
                std::thread::sleep(STOPPED);
                send_if_alive(pid, Signal::CONT);
                std::thread::sleep(RUNS);
                // While it lives.
                if let Some(waited) = waited_for_core(other) {
                    others_wait = (waited - first_wait).as_secs_f64() / start.elapsed().as_secs_f64();
                }
            }
            others_wait
        });
        let ended = running.wait();
        is_over.store(true, Ordering::Relaxed);
        (ended, pauses.join().expect("it only sends signals"))
    });
    assert_eq!(ended.status, 0, "{ended:?}");
    (ended, others_wait)
}

/// How long the process's first thread, which computes, has been ready to run without a core (proc(5), schedstat).
fn waited_for_core(pid: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    Some(Duration::from_nanos(text.split(' ').nth(1)?.parse().ok()?))
}

/// No rank is slow: that a busy machine delays one now and then is no reason to warn.
fn healthy(num_windows: usize) {
    let job = Job::new();
    let ended = job.finish(2, &["--set", &format!("training.steps={}", num_windows * WINDOW)]);
    assert_eq!(warnings(&ended), Vec::<&str>::new());
}
