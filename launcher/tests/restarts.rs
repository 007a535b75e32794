//! Ranks that are started anew after a failure, here and on several nodes, and how often.

mod job;

use std::time::Duration;

use job::{Ended, Job, end, free_port, send};
use rustix::process::Signal;

const EVERY_2: [&str; 2] = ["--set", "checkpoint.every_steps=2"];

fn run(job: &Job, num_ranks: usize, script: &str, max_restarts: &str, args: &[&str]) -> Ended {
    job.run(num_ranks, script, &[&["--max-restarts", max_restarts][..], args].concat())
}

fn restart_lines(ended: &Ended) -> Vec<&str> {
    ended.stderr.lines().filter(|line| line.starts_with("fsdp-launch: restart ")).collect()
}

#[test]
fn after_a_failure_all_ranks_go_on_from_the_newest_checkpoint() {
    for (script, args, cause, from) in [
        (
            "1 5 once:signal=9",
            &EVERY_2[..],
            "was killed by SIGKILL at step 5",
            "continuing from out/checkpoints/step-00000004",
        ),
        (
            "2 5 once:exit=7",
            &EVERY_2,
            "exited with status 7 at step 5",
            "continuing from out/checkpoints/step-00000004",
        ),
        (
            "0 5 once:fail=1",
            &EVERY_2,
            "failed at step 5: the loss is NaN",
            "continuing from out/checkpoints/step-00000004",
        ),
        ("1 0 once:exit=3", &[], "exited with status 3 before the first step", "starting from the beginning"),
        ("1 3 once:signal=6", &[], "was killed by SIGABRT at step 3", "starting from the beginning"),
        (
            "2 5 once:hang",
            &["--set", "fsdp.timeout_secs=1", "--set", "checkpoint.every_steps=2"],
            "did not come to all_reduce number 5 for layers.0 (1.0 MiB) at step 5",
            "continuing from out/checkpoints/step-00000004",
        ),
        // Once there is a checkpoint of this run, "never" is over.
        (
            "1 5 once:signal=9",
            &["--set", "checkpoint.every_steps=2", "--set", "checkpoint.resume=never"],
            "was killed by SIGKILL at step 5",
            "continuing from out/checkpoints/step-00000004",
        ),
    ] {
        let job = Job::new(8);
        let ended = run(&job, 3, script, "2", args);
        assert_eq!(ended.status, 0, "{script}: {ended:?}");
        let lines = restart_lines(&ended);
        let rank = script.split(' ').next().unwrap();
        assert_eq!(lines.len(), 1, "{script}: {ended:?}");
        assert!(
            lines[0].starts_with(&format!("fsdp-launch: restart 1 of 2: rank {rank} (host ")),
            "{script}: {ended:?}"
        );
        assert!(lines[0].contains(&format!(") {cause}; {from}")), "{script}: {ended:?}");
        let first_step = if from.starts_with("continuing") { 5 } else { 1 };
        let steps: Vec<u64> = job.read("out/metrics.jsonl").lines().map(step_of).collect();
        assert_eq!(steps[steps.len() - (9 - first_step)..], (first_step as u64..=8).collect::<Vec<_>>());
        for rank in 0..3 {
            assert!(job.read(&format!("out/started-{rank}")).contains("restarts=1/2 "));
        }
        job.assert_no_survivors(Duration::ZERO);

        let summary = job.summary();
        assert_eq!(summary["status"], 0, "{summary:#}");
        assert_eq!(summary["attempts"].as_array().unwrap().len(), 2, "{summary:#}");
        let [first, second] = [&summary["attempts"][0], &summary["attempts"][1]];
        let cause_in_record = &first["cause"];
        assert_eq!(cause_in_record["rank"].to_string(), rank, "{summary:#}");
        assert!(first["what"].as_str().unwrap().ends_with(cause), "{summary:#}");
        assert_eq!((&second["cause"], &second["decision"]), (&serde_json::Value::Null, &"end".into()), "{summary:#}");
        let restarted = first["decision"]["restart"]["from"].as_str();
        assert_eq!(restarted.is_some(), from.starts_with("continuing"), "{summary:#}");
        assert!(!job.path(&format!("out/logs/error-rank-{rank}.json")).exists(), "it is in the summary");
        assert!(!job.path("out/restarts.json").exists());
    }
}

fn step_of(line: &str) -> u64 {
    serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap()
}

#[test]
fn a_checkpoint_given_by_its_path_is_gone_on_from_until_there_is_a_newer_one() {
    let job = Job::new(8);
    assert_eq!(job.run(1, "", &["--set", "training.steps=3", "--set", "checkpoint.every_steps=3"]).status, 0);
    std::fs::rename(job.path("out/checkpoints"), job.path("old")).unwrap();
    let given = ["--set", "checkpoint.resume=old/step-00000003", "--set", "checkpoint.every_steps=3"];
    let ended = run(&job, 2, "1 5 once:signal=9;0 7 once:signal=9", "3", &given);
    assert_eq!(ended.status, 0, "{ended:?}");
    let lines = restart_lines(&ended);
    assert!(lines[0].ends_with("at step 5; continuing from old/step-00000003"), "{ended:?}");
    assert!(lines[1].ends_with("at step 7; continuing from out/checkpoints/step-00000006"), "{ended:?}");
}

#[test]
fn what_a_restart_cannot_help_or_nobody_wants_is_not_restarted() {
    for (script, status) in [("1 3 fail=2", 2), ("1 3 fail=93", 93), ("1 3 exit=2", 2)] {
        let job = Job::new(8);
        let ended = run(&job, 2, script, "3", &[]);
        assert_eq!((ended.status, restart_lines(&ended).len()), (status, 0), "{script}: {ended:?}");
        assert_eq!(job.summary()["attempts"].as_array().unwrap().len(), 1);
    }
    // A signal, before the failure, and after it while another rank does not end.
    for script in ["", "1 3 signal=9;0 3 hang"] {
        let job = Job::new(1_000_000);
        let child = job.start(2, script, &["--max-restarts", "3"]);
        job.wait_for_ranks(2);
        if !script.is_empty() {
            job.wait_for("out/acted-1-3");
            std::thread::sleep(Duration::from_millis(500));
        }
        send(child.id(), Signal::TERM);
        let ended = end(child);
        let status = if script.is_empty() { 75 } else { 1 };
        assert_eq!((ended.status, restart_lines(&ended).len()), (status, 0), "{script}: {ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// At whatever moment it comes, between two starts too.
#[test]
fn a_signal_ends_a_run_that_starts_again_and_again() {
    // Each start brings a step.
    let script: Vec<String> = (2..200).map(|step| format!("{} {step} once:signal=9", step % 2)).collect();
    for delay_ms in [0, 30, 70, 110, 150, 190] {
        let job = Job::new(1000);
        let args = ["--max-restarts", "1000", "--set", "checkpoint.every_steps=1"];
        let child = job.start(2, &script.join(";"), &args);
        job.wait_for("out/acted-0-4");
        std::thread::sleep(Duration::from_millis(delay_ms));
        send(child.id(), Signal::TERM);
        let ended = end(child);
        assert_eq!(ended.status, 75, "{delay_ms} ms: {ended:?}");
        assert!(ended.took < Duration::from_secs(8), "{delay_ms} ms: {ended:?}");
        assert!(restart_lines(&ended).len() < 20, "{delay_ms} ms: {ended:?}");
        assert_eq!(job.summary()["status"], 75);
        job.assert_no_survivors(Duration::ZERO);
    }
}

/// Steps 1 to 4 are new in the first start, nothing is in those after it.
#[test]
fn three_starts_without_a_new_step_end_the_run_for_good() {
    let job = Job::new(8);
    let ended = run(&job, 2, "1 5 signal=9", "10", &EVERY_2);
    assert_eq!((ended.status, restart_lines(&ended).len()), (93, 3), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap();
    assert!(last.starts_with("fsdp-launch: 3 starts in a row failed without a new step"), "{ended:?}");
    assert!(last.contains("delete out/restarts.json to try again"), "{ended:?}");
    assert_eq!(job.summary()["status"], 93);
    // Not another rank until somebody has looked.
    std::fs::remove_file(job.path("out/started-0")).unwrap();
    let left = || ["summary.json", "error-rank-1.json"].map(|name| job.read(&format!("out/logs/{name}")));
    let before = left();
    assert!(before.iter().all(|text| !text.is_empty()), "{before:?}");
    let ended = run(&job, 2, "", "10", &EVERY_2);
    assert_eq!(left(), before, "they say why");
    assert_eq!((ended.status, job.path("out/started-0").exists()), (93, false), "{ended:?}");
    assert!(
        ended.stderr.contains("was killed by SIGKILL at step 5; find the cause, then delete this file"),
        "{ended:?}"
    );
    std::fs::remove_file(job.path("out/restarts.json")).unwrap();
    assert_eq!(run(&job, 2, "", "0", &EVERY_2).status, 0);
}

/// As where a scheduler's requeue or a shell's loop starts the command again.
#[test]
fn starts_are_counted_across_commands() {
    let job = Job::new(8);
    let statuses: Vec<i32> = (0..4).map(|_| run(&job, 2, "1 5 signal=9", "0", &EVERY_2).status).collect();
    assert_eq!(statuses, [75, 75, 75, 93]);

    // Whoever kills the launcher kills no hope.
    let job = Job::new(1_000_000);
    for _ in 0..4 {
        let mut child = job.start(2, "0 3 hang", &[]);
        job.wait_for("out/acted-0-3");
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_file(job.path("out/acted-0-3")).unwrap();
        job.assert_no_survivors(Duration::from_secs(2));
    }

    // Nor does whoever stops it.
    let job = Job::new(1_000_000);
    for _ in 0..4 {
        let child = job.start(2, "", &[]);
        job.wait_for_ranks(2);
        send(child.id(), Signal::TERM);
        assert_eq!(end(child).status, 75);
    }
    assert!(!job.path("out/restarts.json").exists());
}

#[test]
fn launchers_of_several_nodes_start_their_ranks_anew_together() {
    for (script, cause) in [
        ("2 5 once:signal=9", "rank 2 ("),
        ("0 5 once:exit=7;1 7 once:signal=6", "rank 0 ("),
        ("2 0 once:exit=3", "rank 2 ("),
    ] {
        let job = Job::new(8);
        let port = free_port();
        // The head's number counts.
        let args = [&["--max-restarts", "2"][..], &EVERY_2].concat();
        let children = [job.start_node(0, port, 1, script, &args), job.start_node(1, port, 2, script, &EVERY_2)];
        let ended = children.map(end);
        let num = script.matches("once").count();
        for ended in &ended {
            assert_eq!((ended.status, restart_lines(ended).len()), (0, num), "{script}: {ended:?}");
            assert!(restart_lines(ended)[0].starts_with(&format!("fsdp-launch: restart 1 of 2: {cause}")), "{ended:?}");
        }
        for rank in 0..3 {
            let started = job.read(&format!("out/started-{rank}"));
            assert!(started.contains(&format!("restarts={num}/2 ")), "{started}");
        }
        let summary = job.summary();
        assert_eq!(summary["nodes"].as_array().unwrap().len(), 2, "{summary:#}");
        assert_eq!(summary["attempts"].as_array().unwrap().len(), num + 1, "{summary:#}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_lost_node_ends_the_run_and_a_signal_to_any_launcher_does() {
    let start = |job: &Job, script: &str| {
        let port = free_port();
        let args = ["--max-restarts", "3"];
        [job.start_node(0, port, 1, script, &args), job.start_node(1, port, 1, script, &args)]
    };
    let job = Job::new(1_000_000);
    let [head, mut other] = start(&job, "");
    job.wait_for_ranks(2);
    other.kill().unwrap();
    other.wait().unwrap();
    let ended = end(head);
    assert_eq!((ended.status, restart_lines(&ended).len()), (1, 0), "{ended:?}");
    assert_eq!(job.summary()["attempts"][0]["cause"], serde_json::Value::Null);
    assert!(job.summary()["attempts"][0]["what"].as_str().unwrap().contains("is lost"), "{:#}", job.summary());
    job.assert_no_survivors(Duration::from_secs(2));

    // To node 1, whose rank has ended, while node 0's does not.
    let job = Job::new(1_000_000);
    let [head, other] = start(&job, "1 3 signal=9;0 3 hang");
    job.wait_for("out/acted-1-3");
    std::thread::sleep(Duration::from_millis(700));
    send(other.id(), Signal::TERM);
    for ended in [head, other].map(end) {
        assert_eq!((ended.status, restart_lines(&ended).len()), (1, 0), "{ended:?}");
    }
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn an_mpirun_is_started_anew_too() {
    if std::process::Command::new("mpirun").arg("--version").output().is_err() {
        return println!("skipped: mpirun (Debian: openmpi-bin) is not here");
    }
    let job = Job::new(8);
    let ended = run(&job, 3, "1 5 once:fail=1", "1", &[&["--backend", "mpi"][..], &EVERY_2].concat());
    assert_eq!((ended.status, restart_lines(&ended).len()), (0, 1), "{ended:?}");
    assert!(restart_lines(&ended)[0].contains("rank 1 (host "), "{ended:?}");
    assert!(job.read("out/started-1").contains("restarts=1/1 "), "{}", job.read("out/started-1"));
    job.assert_no_survivors(Duration::from_secs(1));
}

#[test]
fn a_launcher_killed_in_a_later_start_leaves_no_process() {
    let job = Job::new(1_000_000);
    let mut child = job.start(3, "1 3 once:signal=9;* 4 child;* 4 escape;0 5 hang", &["--max-restarts", "1"]);
    job.wait_for("out/acted-0-5");
    child.kill().unwrap();
    child.wait().unwrap();
    job.assert_no_survivors(Duration::from_secs(2));
}
