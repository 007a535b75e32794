//! Real launcher, real processes, real signals: who is named, what is left, which status comes back.

mod job;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use job::{Job, end, named, send};
use rustix::process::{Pid, Signal, kill_process};

/// A terminal: the end of who sits at it, and the end of programs.
fn open_terminal() -> (OwnedFd, File) {
    let terminal = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    rustix::pty::grantpt(&terminal).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
    let programs = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    (terminal, programs)
}

#[test]
fn a_finished_run_exits_0_and_leaves_its_config() {
    let job = Job::new(5);
    let ended = job.run(3, "0 2 stdout=hello;0 2 print=progress;1 3 print=words", &["--set", "training.seed=7"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stdout, "rank 0 says hello\n");
    assert_eq!(ended.stderr, "rank 0 says progress\n");
    assert_eq!(job.read("out/logs/rank-1.out"), "rank 1 says words\n");
    assert!(!job.path("out/logs/rank-0.out").exists() && !job.path("out/logs/rank-2.out").exists());
    assert!(job.read("out/config.toml").contains("seed = 7\n"));
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn ranks_get_their_place_threads_and_a_process_group_of_their_own() {
    let job = Job::new(1);
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(job.run(2, "", &[]).status, 0);
    for rank in 0..2 {
        let started = job.read(&format!("out/started-{rank}"));
        let pid = started.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
        for part in [
            format!("group={pid} "),
            format!("threads={} ", (cores / 2).max(1)),
            format!("rank: {rank}, local_rank: {rank}, world_size: 2, local_world_size: 2, group_rank: 0"),
        ] {
            assert!(started.contains(&part), "{part:?} is not in {started}");
        }
    }
    let mut command = job.command(&["job.toml", "--nproc-per-node=1"]);
    assert_eq!(end(command.env("OMP_NUM_THREADS", "7").spawn().unwrap()).status, 0);
    assert!(job.read("out/started-0").contains("threads=7 "));
}

/// Whatever kills a rank and whenever: that rank is named, not one of those that then miss it.
#[test]
fn the_first_failure_is_named_over_repeated_kills() {
    let job = Job::new(1000);
    for round in 0..24 {
        let _ = std::fs::remove_dir_all(job.path("out"));
        let (culprit, step) = (round % 4, 1 + round % 5);
        let (action, says) = [
            ("signal=9", "was killed by SIGKILL"),
            ("signal=4", "was killed by SIGILL"),
            ("exit=3", "exited with status 3"),
            ("exit=1", "exited with status 1"),
            ("fail=1", "failed"),
            ("signal=6", "was killed by SIGABRT"),
        ][round % 6];
        let ended = job.run(4, &format!("{culprit} {step} {action}"), &[]);
        assert_eq!(ended.status, 1, "round {round}: {ended:?}");
        assert_eq!(named(&ended.stderr), [culprit.to_string()], "round {round}: {ended:?}");
        assert!(ended.stderr.contains(says) && ended.stderr.contains(&format!("at step {step}")), "{ended:?}");
        assert!(ended.took < Duration::from_secs(5), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// The same with kills from outside at any moment of a second.
#[test]
fn a_rank_killed_from_outside_is_named() {
    let job = Job::new(1_000_000);
    for round in 0..8 {
        let _ = std::fs::remove_dir_all(job.path("out"));
        let child = job.start(4, "", &[]);
        let pids = job.wait_for_ranks(4);
        std::thread::sleep(Duration::from_millis(37 * round));
        let culprit = round as usize % 4;
        send(pids[culprit] as u32, Signal::KILL);
        let ended = end(child);
        assert_eq!(ended.status, 1, "{ended:?}");
        assert_eq!(named(&ended.stderr), [culprit.to_string()], "{ended:?}");
        assert!(ended.took < Duration::from_secs(3), "{ended:?}");
        assert!(ended.stderr.contains(&format!("pid {}", pids[culprit])), "{ended:?}");
        let record = job.read(&format!("out/logs/error-rank-{culprit}.json"));
        assert!(record.contains("\"kind\": \"signal\"") && record.contains("\"primary\": true"), "{record}");
    }
}

#[test]
fn a_failed_ranks_status_and_last_lines_come_through() {
    let job = Job::new(100);
    for (script, args, status) in [
        ("1 3 print=words;1 4 fail=2", &[][..], 2),
        ("1 3 print=words;1 4 fail=93", &[][..], 93),
        ("1 3 print=words;1 4 fail=1", &[][..], 1),
        ("1 3 print=words;1 4 fail=1", &["--set", "checkpoint.every_steps=2"][..], 75),
    ] {
        let _ = std::fs::remove_dir_all(job.path("out"));
        let ended = job.run(2, script, args);
        assert_eq!(ended.status, status, "{ended:?}");
        for part in ["failed at step 4: the loss is NaN", "  | rank 1 says words"] {
            assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
        }
        let says_checkpoint = ended.stderr.contains("out/checkpoints/step-00000002 is committed");
        assert_eq!(says_checkpoint, status == 75, "{ended:?}");
    }
}

/// Whatever its status says to others, a rank that is missed has failed.
#[test]
fn a_rank_that_ends_before_the_others_is_named() {
    for code in [0, 75] {
        let job = Job::new(100);
        let ended = job.run(3, &format!("1 4 exit={code}"), &[]);
        assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
        assert!(
            ended.stderr.contains(&format!(") exited with status {code} at step 4; see logs/rank-1.log")),
            "{ended:?}"
        );
        assert!(job.read("out/logs/error-rank-1.json").contains("\"kind\": \"exit\""), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_by_the_timeout_of_the_others() {
    for (script, says) in [
        ("2 3 signal=19", "it is suspended"),
        ("2 3 hang", "it is busy (phase forward_backward)"),
        ("2 3 spin", "it is busy (phase forward_backward)"),
    ] {
        let job = Job::new(100);
        let ended = job.run(3, script, &["--set", "fsdp.timeout_secs=1"]);
        assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["2".to_owned()]), "{ended:?}");
        let (host, started) = (fsdp_control::host_name(), job.read("out/started-2"));
        let pid = started.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
        for line in [
            &format!(
                "fsdp-launch: rank 2 (host {host}, pid {pid}) did not come to all_reduce number 3 for layers.0 (1.0 MiB) at \
                 step 3; {says}; its last collective was all_reduce number 2 for layers.0 (1.0 MiB)\n"
            ),
            "\n  ranks 0, 1 wait in all_reduce number 3 for layers.0 (1.0 MiB)\n",
        ] {
            assert!(ended.stderr.contains(line), "{line} is not in {ended:?}");
        }
        // Within the timeout and 2 s, the start of the run included.
        assert!(ended.took < Duration::from_secs(3), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
        let record = job.read("out/logs/error-rank-2.json");
        assert!(
            record.contains("\"kind\": \"hang\"") && record.contains("\"phase\": \"forward_backward\""),
            "{record}"
        );
    }
}

#[test]
fn a_rank_that_ignores_the_end_of_the_others_is_killed_after_the_grace() {
    let job = Job::new(100);
    let ended = job.run(3, "2 3 hang;1 3 signal=9", &[]);
    assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
    assert!(ended.took > Duration::from_secs(5) && ended.took < Duration::from_secs(9), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

/// Ranks in the rendezvous wait for the one that is gone; nothing but a time limit would end that.
#[test]
fn a_failure_before_the_first_step_ends_the_others_at_once() {
    let job = Job::new(100);
    let ended = job.run(3, "1 0 exit=3", &[]);
    assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
    assert!(ended.stderr.contains("exited with status 3 before the first step"), "{ended:?}");
    assert!(ended.took < Duration::from_secs(3), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

/// The launcher asks with SIGTERM; SIGKILL in the middle of the save is somebody else's, the machine out of memory.
#[test]
fn a_rank_killed_while_the_run_stops_is_named() {
    let job = Job::new(1_000_000);
    let child = job.start(3, "1 2 hang", &[]);
    let pids = job.wait_for_ranks(3);
    job.wait_for("out/acted-1-2");
    send(child.id(), Signal::TERM);
    std::thread::sleep(Duration::from_millis(200));
    send(pids[1] as u32, Signal::KILL);
    let ended = end(child);
    assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
    assert!(ended.stderr.contains("was killed by SIGKILL at step 2"), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn a_run_under_nohup_goes_on_after_its_terminal_is_gone() {
    let job = Job::new(1_000_000);
    let mut command = std::process::Command::new("nohup");
    command.args(["bin/fsdp-launch", "--nproc", "2", "job.toml"]).current_dir(job.dir.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    job.wait_for_ranks(2);
    send(child.id(), Signal::HUP);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(job.survivors().len(), 4, "launcher, guard and ranks");
    send(child.id(), Signal::TERM);
    assert_eq!(end(child).status, 75);
}

/// A terminal takes less than a pipe: what does not fit must not hold up the launcher.
#[test]
fn a_terminal_that_nobody_reads_does_not_hold_the_run_up() {
    let job = Job::new(10);
    let (_terminal, stderr) = open_terminal();
    let mut command = job.command(&["--nproc", "2", "job.toml"]);
    command.env("WORKER_SCRIPT", "0 3 spew=1000").stderr(Stdio::from(stderr));
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            None if start.elapsed() < Duration::from_secs(10) => std::thread::sleep(Duration::from_millis(10)),
            status => break status,
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    assert_eq!(status.expect("the launcher hangs").code(), Some(0));
}

#[test]
fn a_suspended_rank_is_killed_at_once_when_another_fails() {
    let job = Job::new(1_000_000);
    let child = job.start(3, "", &["--set", "fsdp.timeout_secs=60"]);
    let pids = job.wait_for_ranks(3);
    send(pids[2] as u32, Signal::STOP);
    send(pids[1] as u32, Signal::KILL);
    let ended = end(child);
    assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
    assert!(ended.took < Duration::from_secs(4), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

/// Nor anything that ranks have started, in whatever group, and whoever is suspended.
#[test]
fn a_killed_launcher_leaves_no_process() {
    for (round, script) in
        ["3 2 hang", "1 1 child;3 2 escape", "* 1 escape;3 2 signal=19"].iter().cycle().take(6).enumerate()
    {
        let job = Job::new(1_000_000);
        let mut child = job.start(4, script, &[]);
        job.wait_for("out/acted-3-2");
        std::thread::sleep(Duration::from_millis(round as u64 * 11));
        let num_alive = job.survivors().len();
        assert!(num_alive >= 6, "four ranks, the launcher and its guard: {num_alive}");
        child.kill().unwrap();
        child.wait().unwrap();
        job.assert_no_survivors(Duration::from_secs(2));
        // The folder's lock went with the launcher.
        assert_eq!(job.run(1, "", &["--set", "training.steps=1"]).status, 0);
    }
}

#[test]
fn signals_make_the_ranks_save_and_exit_75_however_often_they_come() {
    let twice = |signal| vec![signal, signal];
    for signals in [
        vec![Signal::TERM],
        vec![Signal::INT],
        vec![Signal::USR1],
        vec![Signal::USR2],
        vec![Signal::HUP],
        twice(Signal::TERM),
        twice(Signal::INT),
        vec![Signal::USR1, Signal::TERM, Signal::TERM, Signal::INT, Signal::INT],
    ] {
        let job = Job::new(1_000_000);
        let child = job.start(3, "", &[]);
        job.wait_for_ranks(3);
        for &signal in &signals {
            // The run may have ended before the last of them.
            let _ = kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal);
            std::thread::sleep(Duration::from_millis(3));
        }
        let ended = end(child);
        assert_eq!(ended.status, 75, "{signals:?}: {ended:?}");
        let checkpoints = job.checkpoints();
        assert_eq!(checkpoints.len(), 1, "{signals:?}: {checkpoints:?}");
        let line = format!("fsdp-launch: stopped; out/checkpoints/{} is committed", checkpoints[0]);
        assert_eq!(ended.stderr.matches(&line).count(), 1, "{signals:?}: {ended:?}");
        assert_eq!(ended.stderr.lines().count(), 2, "{signals:?}: {ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_signal_to_one_rank_or_to_all_processes_stops_the_run_as_well() {
    let signals = [Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2];
    for (signal, to_all, is_repeated) in
        signals.iter().flat_map(|&s| [(s, false, false), (s, false, true), (s, true, false), (s, true, true)])
    {
        let job = Job::new(1_000_000);
        let child = job.start(3, "", &[]);
        let pids: Vec<i32> = job.wait_for_ranks(3);
        let guard = job.survivors().into_iter().filter(|pid| *pid != child.id() as i32 && !pids.contains(pid));
        // As a scheduler does it: whoever belongs to the job.
        let all: Vec<i32> = guard.chain(pids.iter().copied()).chain([child.id() as i32]).collect();
        let to = if to_all { &all[..] } else { &pids[1..2] };
        for _ in 0..1 + usize::from(is_repeated) {
            for &pid in to {
                // It may have ended before the second one.
                let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let ended = end(child);
        assert_eq!((ended.status, job.checkpoints().len()), (75, 1), "{signal:?} {to_all} {is_repeated}: {ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// These signals set no deadline, and so only the others' time limit ends it.
#[test]
fn a_rank_that_hangs_while_the_run_stops_is_named_and_killed() {
    for signal in [Signal::USR1, Signal::USR2] {
        let job = Job::new(1_000_000);
        let child = job.start(3, "1 9 hang", &["--set", "fsdp.timeout_secs=2"]);
        job.wait_for("out/acted-1-9");
        send(child.id(), signal);
        let ended = end(child);
        assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
        assert!(ended.stderr.contains("did not come to all_reduce number 9"), "{ended:?}");
        assert!(ended.took < Duration::from_secs(6), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// Ranks that read weights hear nothing for long; there is nothing to save either.
#[test]
fn a_stop_before_the_first_step_ends_the_ranks_at_once() {
    let job = Job::new(1_000_000);
    let child = job.start(3, "2 0 hang", &[]);
    job.wait_for("out/acted-2-0");
    send(child.id(), Signal::TERM);
    let ended = end(child);
    assert_eq!(ended.status, 75, "{ended:?}");
    assert!(ended.stderr.contains("stopped before the first checkpoint"), "{ended:?}");
    assert!(ended.took < Duration::from_secs(3), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

/// From the first moment on: no status but 75, no process left.
#[test]
fn signals_while_ranks_start_end_the_run_too() {
    for delay_ms in [0, 5, 10, 15, 20, 30] {
        let job = Job::new(1_000_000);
        let child = job.start(4, "", &[]);
        job.wait_for("out/config.toml");
        std::thread::sleep(Duration::from_millis(delay_ms));
        send(child.id(), Signal::TERM);
        let ended = end(child);
        assert_eq!(ended.status, 75, "{delay_ms} ms: {ended:?}");
        assert!(ended.took < Duration::from_secs(10), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// Checks may take long; a file that is a pipe stands for a file system that does not answer.
#[test]
fn a_signal_during_the_checks_ends_them_at_once() {
    let job = Job::new(5);
    std::fs::remove_file(job.path("job.toml")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(job.path("job.toml")).status().unwrap().success());
    let child = job.start(2, "", &[]);
    std::thread::sleep(Duration::from_millis(300));
    send(child.id(), Signal::TERM);
    let ended = end(child);
    assert_eq!(ended.status, 75, "{ended:?}");
    let line = "fsdp-launch: stopped before the ranks started; run the same command again\n";
    assert_eq!(ended.stderr, line);
    assert!(ended.took < Duration::from_secs(1), "{ended:?}");
    assert!(!job.path("out").exists());
}

/// A launcher that runs inside of a rank has its own place and terminal.
#[test]
fn variables_of_ranks_do_not_leak_into_a_nested_run() {
    let job = Job::new(1);
    let mut command = job.command(&["--nproc", "1", "job.toml"]);
    command.envs([("RANK", "7"), ("WORLD_SIZE", "8"), ("FSDP_TERMINAL_WIDTH", "80"), ("FSDP_PREPARED", "1")]);
    assert_eq!(end(command.spawn().unwrap()).status, 0);
    let started = job.read("out/started-0");
    assert!(started.contains("rank: 0,") && started.contains("terminal_width: None"), "{started}");
}

/// A person who presses Ctrl-C again does not want to wait; without a terminal the second one changes nothing.
#[test]
fn a_second_ctrl_c_at_a_terminal_ends_ranks_that_hang() {
    let job = Job::new(1_000_000);
    let (_terminal, stdin) = open_terminal();
    let mut command = job.command(&["--nproc", "2", "job.toml"]);
    command.env("WORKER_SCRIPT", "1 2 hang").stdin(Stdio::from(stdin));
    let child = command.spawn().unwrap();
    job.wait_for("out/acted-1-2");
    send(child.id(), Signal::INT);
    std::thread::sleep(Duration::from_millis(200));
    send(child.id(), Signal::INT);
    let ended = end(child);
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains("killed before they had saved"), "{ended:?}");
    assert!(ended.took < Duration::from_secs(3), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn nobody_reading_stderr_does_not_hurt() {
    // Closed pipes, closed descriptors, and a reader that sleeps while rank 0 prints 20 MB.
    let job = Job::new(20);
    for (script, status) in [("0 3 print=words", 0), ("0 3 print=words;1 5 signal=9", 1)] {
        let mut child = job.start(2, script, &[]);
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(end(child).status, status);

        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "exec bin/fsdp-launch --nproc 2 job.toml >&- 2>&-"]).current_dir(job.dir.path());
        shell.env("WORKER_SCRIPT", script).stdout(Stdio::null()).stderr(Stdio::null());
        assert_eq!(end(shell.spawn().unwrap()).status, status);
    }
    let mut child = job.start(2, "0 3 spew=20000;1 4 spew=20000", &[]);
    let start = Instant::now();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(job.read("out/logs/rank-1.out").lines().count(), 20_000);
}

#[test]
fn what_ranks_started_ends_with_them_and_holds_nothing_up() {
    for (script, status) in [
        ("1 2 child", 0),
        ("1 2 escape", 0),
        ("0 2 child;0 3 escape;1 2 child;1 4 signal=9", 1),
        ("* 2 escape;1 4 exit=1", 1),
    ] {
        let job = Job::new(10);
        let ended = job.run(2, script, &[]);
        assert_eq!(ended.status, status, "{script}: {ended:?}");
        assert!(ended.took < Duration::from_secs(4), "{script}: {ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_folder_in_use_is_refused_with_its_holders_pid() {
    let job = Job::new(1_000_000);
    let child = job.start(1, "", &[]);
    job.wait_for_ranks(1);
    std::fs::remove_file(job.path("out/started-0")).unwrap();
    let second = job.run(1, "", &[]);
    assert_eq!(second.status, 2, "{second:?}");
    assert!(second.stderr.contains(&format!("in use by fsdp-launch (pid {} on host", child.id())), "{second:?}");
    assert_eq!(job.num_ranks_started(), 0);
    send(child.id(), Signal::TERM);
    assert_eq!(end(child).status, 75);
}

#[test]
fn a_port_in_use_is_named_and_no_rank_starts() {
    let job = Job::new(5);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let ended = job.run(2, "", &["--master-port", &port]);
    assert_eq!(ended.status, 2, "{ended:?}");
    let holder = format!("(pid {})", std::process::id());
    for part in [&format!("port {port}"), "in use by ", &holder] {
        assert!(ended.stderr.contains(part), "{part} is not in {ended:?}");
    }
    assert!(ended.took < Duration::from_secs(2), "{ended:?}");
    assert_eq!(job.num_ranks_started(), 0);
    drop(listener);
    assert_eq!(job.run(2, "", &["--master_port", &port]).status, 0);
}

#[test]
fn a_missing_worker_is_named() {
    let job = Job::new(5);
    std::fs::remove_file(job.path("bin/fsdp-train")).unwrap();
    let ended = job.run(2, "", &[]);
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains("bin/fsdp-train: expected the worker's binary beside fsdp-launch"), "{ended:?}");
    // A file that cannot be run is noticed when the first rank starts.
    job.write("bin/fsdp-train", "#!/nonexistent/shell\n");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(job.path("bin/fsdp-train"), executable).unwrap();
    let ended = job.run(2, "", &[]);
    assert_eq!((ended.status, &job.summary()["status"]), (1, &1.into()), "{ended:?}");
    assert!(ended.stderr.contains("cannot start rank 0"), "{ended:?}");
    // Where there is a checkpoint, the run can go on from it nevertheless.
    std::fs::create_dir_all(job.path("out/checkpoints/step-00000007")).unwrap();
    job.write("out/checkpoints/step-00000007/manifest.json", "{}");
    let ended = job.run(2, "", &[]);
    assert_eq!((ended.status, &job.summary()["status"]), (75, &75.into()), "{ended:?}");
    assert!(ended.stderr.contains("out/checkpoints/step-00000007 is committed"), "{ended:?}");
}
