//! A run that meets one fault after another, and ends with the bits of a run that met none.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::processes::workers;
use rustix::process::{Pid, Signal, kill_process};

use crate::saves::{debris, newest_step};
use crate::tally::Tally;

const RANKS: usize = 2;
/// Eight microbatches make steps that are long enough for faults to come within one.
const ARGS: &[&str] = &["--set", "training.grad_accumulation=8", "--set", "fsdp.timeout_secs=3"];

/// From this many seconds on faults come each 20 to 60 s, else ten times as often.
const LONG_SECS: usize = 300;

/// The faults, by their rows of the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KilledRank,
    SuspendedRank,
    Signal,
    KilledInSave,
}

/// A launcher, killed when dropped.
#[derive(Debug)]
struct Launcher(Child);

impl Drop for Launcher {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Launcher {
    fn start(job: &Job, args: &[&str], number: usize) -> Self {
        let mut command = job.command(RANKS, args);
        let output = |name: &str| File::create(job.path(&format!("{name}-{number}"))).expect("a folder of the test");
        Launcher(command.stdout(output("stdout")).stderr(output("stderr")).spawn().expect("the launcher"))
    }

    /// The exit status if it ends within `patience`.
    fn wait(&mut self, patience: Duration, until: impl Fn() -> bool) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < patience && !until() {
            if let Some(status) = self.0.try_wait().expect("a child") {
                return Some(status.code().unwrap_or_else(|| 128 + status.signal().expect("an exit or a signal")));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        None
    }

    /// Whether there was someone to meet the fault.
    fn meet(&mut self, job: &Job, fault: Fault) -> bool {
        let launcher = self.0.id() as i32;
        let rank = workers(&job.resolved_config()).get(fastrand::usize(0..RANKS)).map(|worker| worker.pid);
        let (pid, signal) = match fault {
            Fault::KilledRank => (rank, Signal::KILL),
            Fault::SuspendedRank => (rank, Signal::STOP),
            Fault::Signal => {
                let signals = [Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2];
                (if fastrand::bool() { Some(launcher) } else { rank }, signals[fastrand::usize(0..4)])
            }
            Fault::KilledInSave => {
                let left = debris(job);
                self.wait(Duration::from_secs(2), || debris(job).iter().any(|name| !left.contains(name)));
                (if fastrand::u8(0..3) == 0 { Some(launcher) } else { rank }, Signal::KILL)
            }
        };
        pid.and_then(Pid::from_raw).is_some_and(|pid| kill_process(pid, signal).is_ok())
    }
}

/// Steps in a second of a run without faults.
fn steps_a_second() -> f64 {
    let job = Job::new();
    job.finish(RANKS, &[ARGS, &["--set", "training.steps=100"]].concat());
    let mut times: Vec<f64> = job.steps().iter().filter_map(|line| line["step_time_s"].as_f64()).collect();
    times.sort_by(f64::total_cmp);
    1.0 / times[times.len() / 2]
}

/// Row 30: faults for `secs` seconds of a run that takes about as long without them.
pub fn soaked(tally: &mut Tally, secs: usize) {
    let num_steps = (secs as f64 * steps_a_second()) as u64;
    let steps = format!("training.steps={num_steps}");
    let args = [ARGS, &["--max-restarts", "100", "--set", &steps]].concat();
    let (mut met, mut num_starts) = (BTreeMap::new(), 0);
    let started = Instant::now();
    tally.check(format_args!("{secs} seconds"), || {
        let whole = Job::new();
        let mut unbroken = Launcher::start(&whole, &args, 0);
        let patience = Duration::from_secs(60 + 5 * secs as u64);
        assert_eq!(unbroken.wait(patience, || false), Some(0), "{}", whole.read("stderr-0"));

        let job = Job::new();
        let args = [&args[..], &["--set", "checkpoint.every_steps=10"]].concat();
        let scale = if secs < LONG_SECS { 0.1 } else { 1.0 };
        let started = Instant::now();
        loop {
            let mut launcher = Launcher::start(&job, &args, num_starts);
            let stderr = format!("stderr-{num_starts}");
            num_starts += 1;
            let status = loop {
                let pause = match started.elapsed().as_secs() < secs as u64 {
                    true => Duration::from_secs_f64(scale * (20.0 + 40.0 * fastrand::f64())),
                    false => patience,
                };
                if let Some(status) = launcher.wait(pause, || false) {
                    break status;
                }
                assert!(started.elapsed() < patience, "still not at the end: {met:?}: {}", job.read(&stderr));
                let faults = [Fault::KilledRank, Fault::SuspendedRank, Fault::Signal, Fault::KilledInSave];
                let fault = faults[fastrand::usize(0..4)];
                *met.entry(fault).or_insert(0) += usize::from(launcher.meet(&job, fault));
            };
            job.assert_no_survivors(Duration::from_secs(2));
            newest_step(&job);
            match status {
                0 => break,
                // Stopped, or killed: the same command again.
                75 | 137 => {}
                _ => panic!("status {status} after {met:?}: {}", job.read(&stderr)),
            }
        }
        assert!(job.curve() == whole.curve(), "another curve, after {met:?}");
        assert!(job.exported() == whole.exported(), "another model, after {met:?}");
    });
    tally.note(format!(
        "{met:?} over {num_steps} steps, {:.0} s, started {num_starts} times",
        started.elapsed().as_secs_f64()
    ));
}
