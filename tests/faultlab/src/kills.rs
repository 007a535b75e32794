//! Ranks that are killed, alone or amid victims, and launchers that are.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fsdp_tests_behaviour::job::{Job, Running};
use fsdp_tests_behaviour::processes::{assert_none_left, send, send_if_alive, workers};
use rustix::process::Signal;

use crate::report::{assert_named, assert_recoverable};
use crate::tally::{Tally, Times};

/// So many steps that whatever is to happen happens before the end.
pub const LONG: &[&str] = &["--set", "training.steps=1000000"];

/// The longest that the end of a run may take after a rank was killed.
const END: Duration = Duration::from_secs(3);

/// Everybody is gone so long after the launcher.
const SURVIVAL: Duration = Duration::from_secs(2);

/// Starts a job amid whose steps something is to happen, with or without a checkpoint until then.
pub fn start_training<'a>(job: &'a Job, num_ranks: usize, saves: bool, args: &[&str]) -> Running<'a> {
    let every = format!("checkpoint.every_steps={}", if saves { 20 } else { 0 });
    let mut running = job.start(num_ranks, &[LONG, &["--set", &every], args].concat());
    running.wait_for_step(if saves { 30 } else { 3 });
    running.wait_until("the first checkpoint", |job| !saves || !job.checkpoints().is_empty());
    running
}

/// Sleeps for a random time, which is no longer than `max_millis`.
pub fn sleep_randomly(max_millis: u64) {
    std::thread::sleep(Duration::from_micros(fastrand::u64(0..1000 * max_millis)));
}

/// Waits for a moment of the wall clock's second that is late: there clocks of whole seconds take victims to be first.
fn wait_for_late_in_a_second() {
    let wanted = fastrand::u64(940..990);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as u64 % 1000;
    std::thread::sleep(Duration::from_millis((wanted + 1000 - now) % 1000));
}

/// Row 1: one of four ranks, amid a step, at any time; with and without a checkpoint.
pub fn of_ranks(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for i in 0..n {
        let victim = fastrand::usize(0..4);
        let (is_late, saves) = (i % 2 == 0, i % 4 < 2);
        tally.check(format_args!("rank {victim}, late in a second: {is_late}, with checkpoints: {saves}"), || {
            let job = Job::new();
            let running = start_training(&job, 4, saves, &[]);
            match is_late {
                true => wait_for_late_in_a_second(),
                false => sleep_randomly(300),
            }
            let pid = workers(&job.resolved_config())[victim].pid;
            send(pid, Signal::KILL);
            let killed = Instant::now();
            let ended = running.wait();
            let took = killed.elapsed();
            times.add(took);
            assert_named(&ended, victim, &[&format!("pid {pid}"), "was killed by SIGKILL", " at step "]);
            assert_recoverable(&job, &ended);
            assert!(took <= END, "{took:?}: {ended:?}");
        });
    }
    tally.note(format!("exit {times}"));
}

/// Row 3: the victims' ends are seen before the culprit's.
pub fn amid_victims(tally: &mut Tally, n: usize) {
    for i in 0..n {
        let num_ranks = 2 + i % 3;
        let culprit = fastrand::usize(0..num_ranks);
        match i % 2 {
            0 => tally.check(format_args!("rank {culprit} of {num_ranks}, the launcher asleep"), || {
                behind_a_sleeping_launcher(num_ranks, culprit);
            }),
            _ => tally.check(format_args!("rank {culprit} of {num_ranks}, given up before it is killed"), || {
                after_victims_gave_up(num_ranks, culprit);
            }),
        }
    }
}

/// The launcher wakes up to find everybody dead.
fn behind_a_sleeping_launcher(num_ranks: usize, culprit: usize) {
    let job = Job::new();
    let running = start_training(&job, num_ranks, true, &[]);
    let pid = workers(&job.resolved_config())[culprit].pid;
    running.send(Signal::STOP);
    send(pid, Signal::KILL);
    assert_none_left(&job.resolved_config(), Duration::from_secs(10));
    running.send(Signal::CONT);
    let ended = running.wait();
    assert_named(&ended, culprit, &[&format!("pid {pid}"), "was killed by SIGKILL"]);
    assert_recoverable(&job, &ended);
}

/// Ranks that wait for the culprit give up, and report, before it dies.
fn after_victims_gave_up(num_ranks: usize, culprit: usize) {
    let job = Job::new();
    let running = start_training(&job, num_ranks, true, &["--set", "fsdp.timeout_secs=1"]);
    let pid = workers(&job.resolved_config())[culprit].pid;
    send(pid, Signal::STOP);
    let records = || (0..num_ranks).filter(|rank| job.path(&format!("out/logs/error-rank-{rank}.json")).exists());
    while records().next().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    // The launcher may have killed it already, as it is suspended.
    send_if_alive(pid, Signal::KILL);
    let ended = running.wait();
    assert_named(&ended, culprit, &[&format!("pid {pid}")]);
    assert_recoverable(&job, &ended);
}

/// Row 7: the launcher, at any time of its run; ranks and their children go with it.
pub fn of_launchers(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for i in 0..n {
        let leaves = ["", "child", "", "daemon"][i % 4];
        let is_suspended = i % 4 == 2;
        tally.check(format_args!("a rank leaves {leaves:?}, is suspended: {is_suspended}"), || {
            let job = Job::new();
            let running = match leaves {
                "" => job.start(4, LONG),
                _ => {
                    let fault = format!("rank={},step=2,do={leaves}", fastrand::usize(0..4));
                    let mut running = job.spawn(job.faulty_command(4, LONG, &fault));
                    running.wait_for_step(3);
                    running
                }
            };
            sleep_randomly(1500);
            if is_suspended && let Some(rank) = fastrand::choice(&workers(&job.resolved_config())) {
                send(rank.pid, Signal::STOP);
            }
            running.send(Signal::KILL);
            let killed = Instant::now();
            assert_eq!(running.wait().status, 128 + 9);
            job.assert_no_survivors(SURVIVAL);
            times.add(killed.elapsed());
            // The folder is free, and nothing in it is half done.
            job.finish(4, &["--set", "checkpoint.every_steps=10"]);
        });
    }
    tally.note(format!("the last was gone after {times}"));
}
