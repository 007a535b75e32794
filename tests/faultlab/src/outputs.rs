//! Readers that are gone or do not read, and no room for logs: training goes on, and who fails is told all the same.

use std::io::PipeReader;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::processes::{send, workers};
use rustix::process::Signal;

use crate::kills::LONG;
use crate::report::{assert_named, assert_recoverable};
use crate::tally::{Tally, Times};
use crate::tmpfs::Tmpfs;

/// For 1000 steps, and for the launcher to give up on its readers.
const PROMPTLY: Duration = Duration::from_secs(30);

/// What it is, and what runs it.
type Case = (&'static str, fn(&Times));

/// Row 29: in turn.
pub fn lost(tally: &mut Tally, n: usize) {
    let times = Times::default();
    let cases: [Case; 4] = [
        ("the readers of stdout and stderr are gone", |times| no_readers(times, false)),
        ("so they are, and a rank is killed", |times| no_readers(times, true)),
        ("nobody reads the pipes", slow_readers),
        ("the disk of the logs is full, and a rank is killed", no_room_for_logs),
    ];
    let is_refused = Tmpfs::is_refused();
    let num_cases = if is_refused.is_some() { cases.len() - 1 } else { cases.len() };
    for (name, case) in cases.into_iter().take(num_cases).cycle().take(n.max(num_cases)) {
        tally.check(name, || case(&times));
    }
    tally.note(format!("whole runs without a reader, of 20 and 1000 steps, took {times}"));
    if let Some(reason) = is_refused {
        tally.skip(format!("logs on a full disk: no tmpfs here: {reason}"));
    }
}

/// Waits with nothing but the process.
fn wait(mut launcher: Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = launcher.try_wait().expect("a child") {
            return status;
        }
        if start.elapsed() > PROMPTLY {
            launcher.kill().expect("a child");
            launcher.wait().expect("a child");
            panic!("the launcher does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Starts `command` with pipes for both outputs; their readers.
fn spawn(mut command: Command) -> (Child, [PipeReader; 2]) {
    let (out, into_out) = std::io::pipe().expect("a pipe");
    let (err, into_err) = std::io::pipe().expect("a pipe");
    let child = command.stdout(into_out).stderr(into_err).spawn().expect("the launcher");
    (child, [out, err])
}

fn no_readers(times: &Times, is_killed: bool) {
    let job = Job::new();
    let args: &[&str] = &["--set", "metrics.log_every=1", "--set", "checkpoint.every_steps=5"];
    let start = Instant::now();
    let (launcher, readers) = spawn(job.command(2, &[if is_killed { LONG } else { &[] }, args].concat()));
    drop(readers);
    if is_killed {
        while job.checkpoints().is_empty() {
            assert!(start.elapsed() < PROMPTLY, "no checkpoint");
            std::thread::sleep(Duration::from_millis(2));
        }
        send(workers(&job.resolved_config())[1].pid, Signal::KILL);
    }
    let status = wait(launcher).code();
    job.assert_no_survivors(Duration::ZERO);
    match is_killed {
        true => assert_eq!(status, Some(75)),
        false => {
            times.add(start.elapsed());
            assert_eq!((status, job.steps().len()), (Some(0), 20));
            assert!(job.path("out/hf/model.safetensors").exists());
        }
    }
    assert!(!job.read("out/logs/rank-0.log").contains("panic"), "{}", job.read("out/logs/rank-0.log"));
}

/// More is said than the pipe holds.
fn slow_readers(times: &Times) {
    let job = Job::new();
    let start = Instant::now();
    let steps = ["--set", "metrics.log_every=1", "--set", "training.steps=1000"];
    let (launcher, _readers) = spawn(job.command(2, &steps));
    let status = wait(launcher);
    times.add(start.elapsed());
    assert_eq!((status.code(), job.steps().len()), (Some(0), 1000));
    job.assert_no_survivors(Duration::ZERO);
}

/// A log that cannot be written is no reason to stop, nor to be silent.
fn no_room_for_logs(_: &Times) {
    let job = Job::new();
    std::fs::create_dir_all(job.path("out/logs")).expect("a folder of the test");
    let disk = Tmpfs::mount(&job.path("out/logs"), 1 << 20);
    disk.fill();
    let ended = job.finish(2, &["--set", "metrics.log_every=1"]);
    assert_eq!(job.steps().len(), 20, "{ended:?}");

    let mut running = job.start(3, &[LONG, &["--set", "checkpoint.every_steps=30"]].concat());
    running.wait_for_step(40);
    let pid = workers(&job.resolved_config())[1].pid;
    send(pid, Signal::KILL);
    let ended = running.wait();
    assert_named(&ended, 1, &[&format!("pid {pid}"), "was killed by SIGKILL"]);
    assert_recoverable(&job, &ended);
}
