//! Ranks that crash: by a signal, by a panic, or with a status of their own.

use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Ended, Job};
use fsdp_tests_behaviour::processes::{send, send_if_alive, workers};
use rustix::process::Signal;

use crate::kills::{LONG, sleep_randomly, start_training};
use crate::report::{assert_named, assert_recoverable};
use crate::tally::{Tally, Times};

/// How a rank ends, and what is said of it.
#[derive(Debug, Clone, Copy)]
enum Crash {
    By(Signal, &'static str),
    /// A fault of the worker.
    Itself(&'static str, &'static [&'static str]),
}

const CRASHES: &[Crash] = &[
    Crash::By(Signal::SEGV, "was killed by SIGSEGV"),
    Crash::Itself("panic", &["panicked at step 5: panic at ", "faults.rs:", "a fault that was asked for"]),
    Crash::By(Signal::ABORT, "was killed by SIGABRT"),
    Crash::Itself("exit=7", &["exited with status 7 at step 5"]),
    Crash::By(Signal::BUS, "was killed by SIGBUS"),
    Crash::Itself("abort", &["was killed by SIGABRT at step 5"]),
    Crash::By(Signal::FPE, "was killed by SIGFPE"),
    // A status that means something else when the launcher has it.
    Crash::Itself("exit=75", &["exited with status 75 at step 5"]),
    Crash::By(Signal::ILL, "was killed by SIGILL"),
    Crash::Itself("exit=0", &["exited with status 0 at step 5"]),
];

/// Row 2: one of four ranks.
pub fn of_ranks(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for crash in CRASHES.iter().cycle().take(n) {
        let victim = fastrand::usize(0..4);
        tally.check(format_args!("rank {victim}: {crash:?}"), || match *crash {
            Crash::By(signal, says) => {
                let job = Job::new();
                let running = start_training(&job, 4, true, &[]);
                sleep_randomly(100);
                let pid = workers(&job.resolved_config())[victim].pid;
                send(pid, signal);
                let sent = Instant::now();
                // At the first SIGSEGV or SIGBUS that no access has caused, the standard library's handler takes itself
                // away and goes on: a real one would come again at once. Two that come before it has run are one.
                for _ in 0..50 {
                    std::thread::sleep(Duration::from_millis(2));
                    if !send_if_alive(pid, signal) {
                        break;
                    }
                }
                let ended = running.wait();
                times.add(sent.elapsed());
                assert_named(&ended, victim, &[&format!("pid {pid}"), says, " at step "]);
                assert_recoverable(&job, &ended);
            }
            Crash::Itself(fault, says) => {
                let job = Job::new();
                let ended = run_with(&job, &format!("rank={victim},step=5,do={fault}"));
                assert_named(&ended, victim, says);
                assert_recoverable(&job, &ended);
            }
        });
    }
    tally.note(format!("exit after a signal {times}"));
}

/// Four ranks with a checkpoint each second step.
fn run_with(job: &Job, fault: &str) -> Ended {
    job.spawn(job.faulty_command(4, &[LONG, &["--set", "checkpoint.every_steps=2"]].concat(), fault)).wait()
}
