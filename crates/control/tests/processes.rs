//! Launcher and ranks as real processes: this test binary starts itself in the role that `FSDP_TEST_ROLE` names.
//!
//! A "launcher" starts one "rank" and prints its pid; the test kills the launcher and watches the rank.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fsdp_control::env::{StartedBy, WorkerEnv};
use fsdp_control::error_file::{ErrorKind, ErrorRecord};
use fsdp_control::lifeline::{self, Lifeline, Loss};
use fsdp_control::progress::{Op, Progress};
use fsdp_control::stop::StopFlag;
use fsdp_control::store::{Store, StoreServer};
use fsdp_control::{ExitStatus, failures};
use rustix::process::{Pid, Signal};

const LONG: Duration = Duration::from_secs(10);

/// This binary in another role. `FSDP_TEST_ROLE` says which; see `role`.
fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["role", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("FSDP_TEST_ROLE", role).stdout(Stdio::piped());
    command
}

fn spawn_rank(role: &str, lifeline: &Lifeline, progress: &Progress) -> Child {
    let env = WorkerEnv {
        started_by: StartedBy::Launcher,
        run_id: None,
        rank: 0,
        local_rank: 0,
        world_size: 1,
        local_world_size: 1,
        group_rank: 0,
        master_addr: "127.0.0.1".into(),
        master_port: 1,
        lifeline_fd: Some(lifeline.inherit_fd()),
        progress_fd: Some(progress.inherit_fd()),
        terminal_width: None,
    };
    let mut command = command(role);
    command.envs(env.vars());
    lifeline::prepare_child(&mut command, &[lifeline.inherit_fd(), progress.inherit_fd()]);
    command.spawn().unwrap()
}

/// Not a test of its own: what the processes run that the tests start.
#[test]
#[ignore = "started by the other tests"]
fn role() {
    match std::env::var("FSDP_TEST_ROLE").unwrap_or_default().as_str() {
        role @ ("launcher-lifeline" | "launcher-signal" | "launcher-drops") => {
            let (lifeline, progress) = (Lifeline::new().unwrap(), Progress::create(1).unwrap());
            let rank_role = if role == "launcher-signal" { "rank-signal" } else { "rank-lifeline" };
            let mut rank = spawn_rank(rank_role, &lifeline, &progress);
            wait_for_line(&mut rank, "ready");
            println!("rank {}", rank.id());
            if role == "launcher-drops" {
                drop(lifeline);
                rank.wait().unwrap();
                println!("rank ended");
            }
            std::thread::sleep(LONG);
        }
        // A child leaves a child of its own behind; both are this process's to reap.
        "reaper" => {
            lifeline::become_subreaper().unwrap();
            let shell = Command::new("sh").args(["-c", "sleep 60 >/dev/null 2>&1 & echo $!"]).output().unwrap();
            let orphan = String::from_utf8(shell.stdout).unwrap();
            let orphan = Pid::from_raw(orphan.trim().parse().unwrap()).unwrap();
            rustix::process::kill_process(orphan, Signal::KILL).unwrap();
            let ended = rustix::process::waitpid(Some(orphan), rustix::process::WaitOptions::empty()).unwrap().unwrap();
            println!("reaped {}", ended.0 == orphan);
        }
        // Only the lifeline, as for a child's child, which the death signal does not reach.
        "rank-lifeline" => {
            rustix::process::set_parent_process_death_signal(None).unwrap();
            lifeline::watch(WorkerEnv::from_env().unwrap().lifeline_fd.unwrap()).unwrap();
            println!("ready");
            std::thread::sleep(LONG);
        }
        // Only the death signal: nobody watches the lifeline.
        "rank-signal" => {
            println!("ready");
            std::thread::sleep(LONG);
        }
        "rank-reports" => {
            let env = WorkerEnv::from_env().unwrap();
            let progress = Progress::attach(env.progress_fd.unwrap(), env.local_rank).unwrap();
            progress.set_step(3);
            progress.enter(Op::Barrier, 9, "head", 0);
            assert_eq!(rustix::process::getpgid(None).unwrap(), rustix::process::getpid(), "own process group");
            println!("ready");
            std::thread::sleep(LONG);
        }
        "rank-stops" => {
            println!("ready");
            std::io::stdin().read_exact(&mut [0]).unwrap();
            let stop = StopFlag::install().unwrap();
            let start = Instant::now();
            while !stop.is_set() && start.elapsed() < LONG {
                std::thread::sleep(Duration::from_millis(1));
            }
            println!("stopped by {}", stop.signal_name().unwrap());
        }
        "store" => {
            let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
            println!("port {}", server.local_addr().port());
            std::thread::sleep(LONG);
        }
        // Ranks that no launcher started: the store is their lifeline.
        role @ ("store-rank" | "store-rank-stuck" | "store-rank-over") => {
            let env = WorkerEnv::from_env().unwrap();
            let addr = (env.master_addr.as_str(), env.master_port);
            let will = ErrorRecord::new(env.rank, 0, ErrorKind::Signal, "gone".into(), ExitStatus::Failed);
            let is_stuck = role == "store-rank-stuck";
            let lifeline = lifeline::watch_store(addr, LONG, Duration::from_millis(200), &will, move |loss| {
                let what = match loss {
                    Loss::Store(_) => "the store".to_owned(),
                    Loss::Ranks(records) => {
                        let cause = failures::first_cause(&records).unwrap();
                        format!("rank {}, {}", cause.rank, cause.message)
                    }
                };
                println!("lost {what}");
                if is_stuck {
                    std::thread::sleep(LONG);
                }
                ExitStatus::Stopped
            });
            let lifeline = lifeline.unwrap();
            println!("ready");
            if role == "store-rank-over" {
                lifeline.let_go();
                println!("let go");
            }
            std::thread::sleep(LONG);
        }
        other => panic!("no role {other:?}"),
    }
}

/// A rank whose store is at `port`.
fn spawn_store_rank(role: &str, rank: usize, port: u16) -> Child {
    let env = WorkerEnv {
        started_by: StartedBy::Launcher,
        run_id: None,
        rank,
        local_rank: rank,
        world_size: 8,
        local_world_size: 8,
        group_rank: 0,
        master_addr: "127.0.0.1".into(),
        master_port: port,
        lifeline_fd: None,
        progress_fd: None,
        terminal_width: None,
    };
    let mut rank = command(role).envs(env.vars()).spawn().unwrap();
    wait_for_line(&mut rank, "ready");
    rank
}

/// The child's status, which must come within a few seconds.
fn status_of(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(start.elapsed() < Duration::from_secs(5), "it lives on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The first line of the child's output that starts with `start` (test harness lines come before it).
fn wait_for_line(child: &mut Child, start: &str) -> String {
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let found = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(start)));
    found.unwrap_or_else(|| panic!("the child ended without {start:?}")).unwrap()
}

fn is_running(pid: Pid) -> bool {
    // A zombie has ended; its new parent may be slow to reap it.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.rsplit(") ").next().unwrap().starts_with('Z'))
}

#[test]
fn ranks_die_with_a_killed_launcher() {
    for role in ["launcher-lifeline", "launcher-signal"] {
        let mut launcher = command(role).spawn().unwrap();
        let line = wait_for_line(&mut launcher, "rank ");
        let rank = Pid::from_raw(line.rsplit(' ').next().unwrap().parse().unwrap()).unwrap();
        assert!(is_running(rank));
        launcher.kill().unwrap();
        let start = Instant::now();
        launcher.wait().unwrap();
        while is_running(rank) {
            assert!(start.elapsed() < Duration::from_secs(2), "{role}: the rank lives on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn dropping_the_lifeline_ends_the_ranks() {
    let mut launcher = command("launcher-drops").spawn().unwrap();
    wait_for_line(&mut launcher, "rank ended");
    launcher.kill().unwrap();
    launcher.wait().unwrap();
}

#[test]
fn progress_is_seen_across_processes() {
    let (lifeline, progress) = (Lifeline::new().unwrap(), Progress::create(1).unwrap());
    let mut rank = spawn_rank("rank-reports", &lifeline, &progress);
    wait_for_line(&mut rank, "ready");
    let seen = progress.snapshot(0);
    assert_eq!((seen.step, seen.seq, seen.op, seen.inside, seen.unit.as_str()), (3, 9, Op::Barrier, true, "head"));
    rank.kill().unwrap();
    rank.wait().unwrap();
}

#[test]
fn orphans_come_to_the_subreaper() {
    let mut reaper = command("reaper").spawn().unwrap();
    wait_for_line(&mut reaper, "reaped true");
    assert!(reaper.wait().unwrap().success());
}

/// A signal arrives before the rank has its handlers, and must neither kill it nor be lost.
#[test]
fn an_early_signal_is_kept_until_the_handlers_are_there() {
    for (signal, name) in [(Signal::USR1, "SIGUSR1"), (Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP")] {
        let mut command = command("rank-stops");
        lifeline::prepare_child(command.stdin(Stdio::piped()), &[]);
        let mut rank = command.spawn().unwrap();
        wait_for_line(&mut rank, "ready");
        rustix::process::kill_process(Pid::from_child(&rank), signal).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        std::io::Write::write_all(rank.stdin.as_mut().unwrap(), b"\n").unwrap();
        wait_for_line(&mut rank, &format!("stopped by {name}"));
        assert!(rank.wait().unwrap().success());
    }
}

#[test]
fn each_stop_signal_sets_the_flag() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR2] {
        let mut command = command("rank-stops");
        lifeline::prepare_child(command.stdin(Stdio::piped()), &[]);
        let mut rank = command.spawn().unwrap();
        wait_for_line(&mut rank, "ready");
        std::io::Write::write_all(rank.stdin.as_mut().unwrap(), b"\n").unwrap();
        std::thread::sleep(Duration::from_millis(50)); // the handlers are there
        rustix::process::kill_process(Pid::from_child(&rank), signal).unwrap();
        wait_for_line(&mut rank, "stopped by SIG");
        assert!(rank.wait().unwrap().success());
    }
}

#[test]
fn ranks_without_a_launcher_die_with_the_store() {
    let mut store = command("store").spawn().unwrap();
    let port = wait_for_line(&mut store, "port ").rsplit(' ').next().unwrap().parse().unwrap();
    let mut rank = spawn_store_rank("store-rank", 1, port);
    let mut stuck = spawn_store_rank("store-rank-stuck", 2, port);
    let mut over = spawn_store_rank("store-rank-over", 3, port);
    wait_for_line(&mut over, "let go");
    store.kill().unwrap();
    store.wait().unwrap();
    wait_for_line(&mut rank, "lost the store");
    assert_eq!(status_of(&mut rank), Some(75), "the status that its last words gave");
    assert_eq!(status_of(&mut stuck), Some(1), "last words that do not end");
    assert_eq!(over.try_wait().unwrap(), None, "a rank that has let go ends by itself");
    over.kill().unwrap();
    over.wait().unwrap();
}

#[test]
fn ranks_without_a_launcher_die_with_each_other_and_know_who_was_first() {
    let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
    let port = server.local_addr().port();
    let (mut victim, mut survivor) = (spawn_store_rank("store-rank", 5, port), spawn_store_rank("store-rank", 1, port));
    // One that ends in order is no failure.
    let mut over = spawn_store_rank("store-rank-over", 3, port);
    wait_for_line(&mut over, "let go");
    over.kill().unwrap();
    over.wait().unwrap();
    let mut store = Store::connect(("127.0.0.1", port), LONG).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(failures::list(&mut store).unwrap(), []);
    assert_eq!(survivor.try_wait().unwrap(), None);

    victim.kill().unwrap();
    victim.wait().unwrap();
    wait_for_line(&mut survivor, "lost rank 5, gone");
    assert_eq!(status_of(&mut survivor), Some(75));
}
