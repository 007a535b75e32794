//! Saves that are killed at any moment or call, that lose power, or that the disk refuses. Whatever happens, the newest
//! committed checkpoint is whole, and the same command goes on to the bits of a run that nothing happened to.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fsdp_checkpoint::faults::power_loss::{
    Explored, Exported, Violation, check_exports, check_saves, record_exports, record_saves,
};
use fsdp_checkpoint::faults::sample;
use fsdp_checkpoint::sharded::{list, newest_valid};
use fsdp_tests_behaviour::job::{Ended, Job, Running, built};
use fsdp_tests_behaviour::processes::{assert_none_left, workers};
use rustix::process::{Pid, Signal, kill_process};

use crate::strace::{self, Sampled};
use crate::tally::Tally;

/// The ranks of a killed launcher are gone by then.
const PROMPTLY: Duration = Duration::from_secs(2);

/// How often a run is killed, at most, before it may end. One that fails three times without a new step is given up.
const MAX_KILLS: usize = 2;

/// A run of 20 steps that saves every second one.
const SAVING: &[&str] = &["--set", "training.steps=20", "--set", "checkpoint.every_steps=2"];

/// The same with 8 steps: three checkpoints are committed besides the first, and two deleted.
pub const SHORT: &[&str] = &["--set", "training.steps=8", "--set", "checkpoint.every_steps=2"];

pub const SHORT_STEPS: u64 = 8;

pub const IN_STEP: &[&str] = &["--set", "checkpoint.async=false"];
pub const BEHIND: &[&str] = &["--set", "checkpoint.async=true"];

/// Who is killed.
#[derive(Debug, Clone, Copy)]
pub enum Victim {
    Rank(usize),
    Launcher,
}

impl Victim {
    pub fn random(num_ranks: usize) -> Self {
        match fastrand::usize(0..=num_ranks) {
            rank if rank < num_ranks => Victim::Rank(rank),
            _ => Victim::Launcher,
        }
    }
}

/// The step of the newest checkpoint under `out/checkpoints`, which is whole, as are all others there; 0 without any.
#[track_caller]
pub fn newest_step(job: &Job) -> u64 {
    let newest = newest_valid(&job.path("out/checkpoints")).expect("a readable folder");
    assert!(newest.skipped.is_empty(), "committed and not whole: {:?}", newest.skipped);
    newest.checkpoint.map_or(0, |checkpoint| checkpoint.manifest().step)
}

/// What is neither a committed checkpoint nor set aside as damaged.
pub fn debris(job: &Job) -> Vec<String> {
    let entries = std::fs::read_dir(job.path("out/checkpoints")).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(".tmp-") || name.starts_with(".trash-")).collect()
}

/// Whether there still was someone to kill.
pub fn kill(running: &Running<'_>, job: &Job, victim: Victim) -> bool {
    let pid = match victim {
        Victim::Launcher => Some(running.pid()),
        Victim::Rank(rank) => workers(&job.resolved_config()).iter().find(|w| w.rank == rank).map(|w| w.pid),
    };
    pid.and_then(Pid::from_raw).is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
}

/// What must hold after a run that was killed, or was not in time.
#[track_caller]
pub fn assert_goes_on(job: &Job, ended: &Ended, committed_before: u64) {
    assert_none_left(&job.resolved_config(), if ended.status == 128 + 9 { PROMPTLY } else { Duration::ZERO });
    let step = newest_step(job);
    assert!(step >= committed_before, "step {committed_before} was committed, {step} is there: {ended:?}");
    let expected = if step > 0 { 75 } else { 1 };
    assert!([0, 128 + 9, expected].contains(&ended.status), "with the checkpoint of step {step}: {ended:?}");
}

/// The same command to the end, from the newest checkpoint on; the bits are those of `whole`.
#[track_caller]
pub fn assert_finishes_as(job: &Job, nproc: usize, args: &[&str], whole: &Job) {
    let step = newest_step(job);
    let ended = job.finish(nproc, args);
    let resumed = ended.stderr.contains(&format!("resuming after step {step} "));
    assert!(step == 0 || resumed, "step {step} was there to go on from: {ended:?}");
    assert_eq!(debris(job), [""; 0], "what was left unfinished is removed");
    job.assert_bits_of(whole);
}

/// Row 10: a rank or the launcher is killed at random moments, every second time amid a save.
pub fn killed(tally: &mut Tally, n: usize) {
    let whole = Job::new();
    let took = whole.finish(2, &[SAVING, IN_STEP].concat()).took;
    let (mut num_kills, mut num_amid) = (0, 0);
    for i in 0..n {
        let args = [SAVING, if i % 2 == 0 { BEHIND } else { IN_STEP }].concat();
        let amid_save = i % 4 < 2;
        tally.check(format_args!("{}, amid a save: {amid_save}", args.join(" ")), || {
            let job = Job::new();
            for _ in 0..MAX_KILLS {
                let victim = Victim::random(2);
                let before = newest_step(&job);
                let (left, num_committed) = (debris(&job), fastrand::usize(0..3));
                let mut running = job.start(2, &args);
                // The sweep of what an earlier kill left is no save.
                let saves = |job: &Job| debris(job).iter().any(|name| !left.contains(name));
                if amid_save {
                    running.wait_until_or_end(|job| job.checkpoints().len() >= num_committed && saves(job));
                    std::thread::sleep(Duration::from_micros(fastrand::u64(0..3_000)));
                } else {
                    std::thread::sleep(took.mul_f64(fastrand::f64()));
                }
                num_amid += usize::from(saves(&job));
                num_kills += usize::from(kill(&running, &job, victim));
                let ended = running.wait();
                assert_goes_on(&job, &ended, before);
                if ended.status == 0 {
                    break;
                }
            }
            assert_finishes_as(&job, 2, &args, &whole);
        });
    }
    tally.note(format!("{num_kills} kills, {num_amid} of them amid a save"));
}

/// Row 11: SIGKILL at each call of the checkpoint crate's loop of saves, and at about `n` calls of a real rank.
pub fn killed_at_calls(tally: &mut Tally, n: usize) {
    if let Some(reason) = strace::is_missing() {
        tally.skip(reason);
        return;
    }
    each_call_of_the_loop(tally);
    let whole = Job::new();
    whole.finish(2, &[SHORT, IN_STEP].concat());
    let (mut num_calls, mut num_hit) = (0, 0);
    for mode in [IN_STEP, BEHIND] {
        let args = [SHORT, mode].concat();
        let sampled = Sampled::of_saves(2, &args, 0, n.div_ceil(2));
        num_calls += sampled.num_calls;
        for call in &sampled.calls {
            let inject = call.inject("signal=KILL");
            tally.check(format_args!("{}: {inject}: {}", mode[1], call.line), || {
                let job = Job::new();
                let ended = job.spawn(strace::command(&job, 2, &args, 0, std::slice::from_ref(&inject))).wait();
                let trace = job.read("trace");
                let last = strace::calls(&trace).pop().expect("a call");
                num_hit += usize::from(last.line.contains("/out/checkpoints"));
                assert!(ended.stderr.contains("SIGKILL"), "{ended:?}");
                assert_goes_on(&job, &ended, last_renamed(&trace));
                assert_finishes_as(&job, 2, &args, &whole);
            });
        }
    }
    tally.note(format!("a real rank: {num_hit} of {num_calls} calls of its saves"));
}

/// The loop saves so many steps, of which it keeps the last two.
const LOOP_STEPS: u64 = 4;

fn each_call_of_the_loop(tally: &mut Tally) {
    let run = |root: &Path, first: u64, strace_args: &[String]| {
        let mut command = Command::new("strace");
        command.args(["-f", "-y", "-o"]).arg(root.with_extension("trace")).arg("-e");
        command.arg(format!("trace={}", strace::CALLS)).args(strace_args).arg(built("examples/save_loop")).arg(root);
        command.args([first, LOOP_STEPS, 2].map(|number| number.to_string())).output().expect("strace")
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let root = folder.path().join("loop");
    assert!(run(&root, 1, &[]).status.success(), "the loop of saves ends by itself");
    let trace = std::fs::read_to_string(root.with_extension("trace")).expect("a trace");
    let mut calls = strace::calls(&trace);
    calls.retain(|call| call.is_first && call.line.contains("/loop"));
    for call in &calls {
        tally.check(format_args!("the loop: {}", call.line), || {
            std::fs::remove_dir_all(&root).expect("a folder of the test");
            let killed = run(&root, 1, &["-e".into(), format!("inject={}", call.inject("signal=KILL"))]);
            assert_eq!(killed.status.signal(), Some(9), "{killed:?}");
            let committed =
                String::from_utf8_lossy(&killed.stdout).lines().last().map_or(0, |l| l.parse().expect("a step"));
            let newest = check_loop(&root);
            assert!(newest >= committed, "step {committed} was committed, {newest} is there");
            let again = run(&root, newest + 1, &[]);
            assert!(again.status.success(), "{again:?}");
            assert_eq!(check_loop(&root), newest.max(LOOP_STEPS));
            let names = std::fs::read_dir(&root).expect("a folder of the test").count();
            assert!(names <= 3, "{names} names are left");
        });
    }
    tally.note(format!("the loop: all {} calls", calls.len()));
}

/// The newest step, all of whose values are right, as are those of all other checkpoints; 0 without any.
fn check_loop(root: &Path) -> u64 {
    let all = list(root).expect("a readable folder");
    for (step, path) in &all {
        assert_eq!(sample::check(path), Ok(*step));
    }
    all.last().map_or(0, |(step, _)| *step)
}

/// Row 12: power is lost at every operation of runs that save and export, in a file system in memory.
pub fn power_lost(tally: &mut Tally, n: usize) {
    for _ in 0..n {
        let seed = fastrand::u64(..);
        let scratch = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let explored = |tally: &mut Tally, what: &str, explored: Result<Explored, Violation>| {
            let told = match &explored {
                Ok(Explored { num_operations, num_states, .. }) => {
                    format!("{what}: {num_states} states after {num_operations} operations")
                }
                Err(found) => found.to_string(),
            };
            tally.check(format_args!("seed {seed}: {told}"), || assert!(explored.is_ok(), "{told}"));
            tally.note(told);
        };
        explored(tally, "saves", record_saves().explore(seed, scratch.path(), check_saves));
        for can_exchange in [true, false] {
            let source = tempfile::tempdir().expect("a temporary folder");
            let check = |expected: &Exported, disk: &Path| check_exports(expected, can_exchange, disk);
            let run = record_exports(can_exchange, source.path());
            let what = if can_exchange { "exports" } else { "exports without exchange" };
            explored(tally, what, run.explore(seed, scratch.path(), check));
        }
    }
}

/// The step of the last checkpoint that a trace has committed.
fn last_renamed(trace: &str) -> u64 {
    let committed = trace.lines().filter(|line| line.contains("rename") && line.ends_with("= 0"));
    let steps = committed.filter_map(|line| line.rsplit_once("/step-")?.1.get(..8)?.parse().ok());
    steps.max().unwrap_or(0)
}
