//! Signals that ask a run to stop: to the launcher, to ranks, to all of them, and again.

use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Job, Running};
use fsdp_tests_behaviour::processes::{send, send_if_alive, workers};
use rustix::process::Signal;

use crate::kills::{LONG, sleep_randomly};
use crate::tally::{Tally, Times};

const SIGNALS: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2];

/// What the launcher gives the ranks.
const GRACE: Duration = Duration::from_secs(25);

#[derive(Debug, Clone, Copy)]
enum To {
    Launcher,
    OneRank,
    AllRanks,
    /// As schedulers do.
    Everybody,
    LauncherTwice,
    /// Before ranks train, or hardly after.
    EarlyLauncher,
}

const TARGETS: [To; 6] = [To::Launcher, To::OneRank, To::AllRanks, To::Everybody, To::LauncherTwice, To::EarlyLauncher];

/// Row 8: each signal to each of them, in turn.
pub fn of_runs(tally: &mut Tally, n: usize) {
    let times = Times::default();
    let pairs = TARGETS.iter().flat_map(|to| SIGNALS.iter().map(move |signal| (*to, *signal)));
    for (to, signal) in pairs.cycle().take(n) {
        tally.check(format_args!("{signal:?} to {to:?}"), || {
            let job = Job::new();
            let mut running = job.start(4, LONG);
            match to {
                To::EarlyLauncher => sleep_randomly(500),
                _ => {
                    running.wait_for_step(5);
                    sleep_randomly(100);
                }
            }
            let start = Instant::now();
            deliver(&job, &running, to, signal);
            let ended = running.wait();
            let took = start.elapsed();
            times.add(took);
            assert_eq!(ended.status, 75, "{ended:?}");
            assert!(took < GRACE, "{took:?}: {ended:?}");
            job.assert_no_survivors(Duration::ZERO);
            let num_steps = job.steps().len();
            assert!(num_steps > 0 || matches!(to, To::EarlyLauncher), "{ended:?}");
            let again = job.finish(4, &["--set", &format!("training.steps={}", num_steps + 3)]);
            if num_steps > 0 {
                assert!(ended.stderr.contains("run the same command again"), "{ended:?}");
                assert!(ended.stderr.contains(&format!("step-{num_steps:08}")), "{ended:?}");
                assert!(again.stderr.contains(&format!("resuming after step {num_steps}")), "{again:?}");
            }
            assert_eq!(job.steps().len(), num_steps + 3);
        });
    }
    tally.note(format!("exit {times}"));
}

fn deliver(job: &Job, running: &Running<'_>, to: To, signal: Signal) {
    let ranks = workers(&job.resolved_config());
    match to {
        To::Launcher | To::EarlyLauncher => running.send(signal),
        To::OneRank => send(fastrand::choice(&ranks).expect("ranks").pid, signal),
        To::AllRanks => {
            for rank in ranks {
                send_if_alive(rank.pid, signal);
            }
        }
        // The first may have ended before the last hears of it.
        To::Everybody => {
            running.send(signal);
            for rank in ranks {
                send_if_alive(rank.pid, signal);
            }
        }
        To::LauncherTwice => {
            running.send(signal);
            std::thread::sleep(Duration::from_millis(fastrand::u64(1..100)));
            send_if_alive(running.pid(), signal);
        }
    }
}
