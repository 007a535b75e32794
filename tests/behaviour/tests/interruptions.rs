//! Ranks and launchers that are killed, signals, damaged checkpoints, and running the same command again.

use std::time::Duration;

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::processes::{assert_none_left, send, workers};
use rustix::process::Signal;

/// Ended ranks are reaped by then.
const PROMPTLY: Duration = Duration::from_secs(2);

/// So many steps that whatever is to happen happens before the end.
const LONG: &[&str] = &["--set", "training.steps=1000000"];

/// Both jobs have the same curve and the same exported bytes.
#[track_caller]
fn assert_same_bits(got: &Job, expected: &Job) {
    assert_eq!(got.curve(), expected.curve());
    assert!(got.exported() == expected.exported(), "the exported models differ");
}

#[test]
fn a_killed_rank_is_named_and_ends_the_run() {
    for (victim, every_steps, expected) in [(0, 0, 1), (1, 0, 1), (2, 20, 75), (0, 20, 75)] {
        let job = Job::new();
        let every = format!("checkpoint.every_steps={every_steps}");
        let mut running = job.start(3, &[LONG, &["--set", &every]].concat());
        running.wait_for_step(30);
        running.wait_until("the first checkpoint", |job| every_steps == 0 || !job.checkpoints().is_empty());
        let ranks = workers(&job.resolved_config());
        assert_eq!(ranks.iter().map(|w| w.rank).collect::<Vec<_>>(), [0, 1, 2]);
        send(ranks[victim].pid, Signal::KILL);
        let ended = running.wait();
        assert_eq!(ended.status, expected, "{ended:?}");
        let named = format!("fsdp-launch: rank {victim} (");
        let first = ended.stderr.lines().find(|line| line.starts_with("fsdp-launch: ")).unwrap_or_default();
        assert!(first.starts_with(&named) && first.contains("was killed by SIGKILL"), "{ended:?}");
        assert!(first.contains(&format!("pid {}", ranks[victim].pid)), "{ended:?}");
        let advice = if expected == 75 { "run the same command again" } else { "no checkpoint is committed" };
        assert!(ended.stderr.contains(advice), "{ended:?}");
        assert_none_left(&job.resolved_config(), Duration::ZERO);
    }
}

#[test]
fn a_run_whose_rank_was_killed_goes_on_to_the_same_bits() {
    // In fp16 the state has a loss scale too.
    let settings =
        ["--set", "training.steps=400", "--set", "checkpoint.every_steps=25", "--set", "precision.param=fp16"];
    let (whole, killed) = (Job::new(), Job::new());
    whole.finish(2, &settings);
    let mut running = killed.start(2, &settings);
    running.wait_for_step(60);
    let ranks = workers(&killed.resolved_config());
    send(ranks[1].pid, Signal::KILL);
    let ended = running.wait();
    assert_eq!(ended.status, 75, "{ended:?}");
    assert!(killed.steps().len() < 400, "killed too late to be a test");
    let ended = killed.finish(2, &settings);
    assert!(ended.stderr.contains("resuming after step"), "{ended:?}");
    assert_same_bits(&killed, &whole);
}

#[test]
fn signals_to_the_launcher_have_the_step_finished_and_saved() {
    for signal in [Signal::TERM, Signal::INT] {
        let job = Job::new();
        let mut running = job.start(2, LONG);
        running.wait_for_step(10);
        running.send(signal);
        let ended = running.wait();
        assert_eq!(ended.status, 75, "{ended:?}");
        let num_steps = job.steps().len();
        assert_eq!(job.checkpoints(), [format!("step-{num_steps:08}")], "the last step is the one saved");
        assert!(ended.stderr.contains("run the same command again"), "{ended:?}");
        assert_none_left(&job.resolved_config(), Duration::ZERO);

        // Going on, and the same without a stop.
        let steps = format!("training.steps={}", num_steps + 7);
        job.finish(2, &["--set", &steps]);
        let whole = Job::new();
        whole.finish(2, &["--set", &steps]);
        assert_same_bits(&job, &whole);
    }
}

#[test]
fn a_stop_does_not_wait_for_the_end_of_a_validation() {
    let job = Job::new();
    let line = job.read("train.jsonl").lines().next().unwrap().to_owned() + "\n";
    // Far longer than the test.
    job.write("valid.jsonl", line.repeat(2_000_000));
    let settings = ["--set", "validation.data=[\"valid.jsonl\"]", "--set", "validation.every_steps=3"];
    let mut running = job.start(2, &[LONG, &settings].concat());
    running.wait_for_step(3);
    std::thread::sleep(Duration::from_millis(300));
    running.send(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.status, 75, "{ended:?}");
    assert_eq!(job.checkpoints(), ["step-00000003"]);
    assert_eq!(job.steps().len(), 3);
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    let job = Job::new();
    for _ in 0..3 {
        let mut running = job.start(3, LONG);
        running.wait_until("three ranks", |job| workers(&job.resolved_config()).len() == 3);
        running.send(Signal::KILL);
        let ended = running.wait();
        assert_eq!(ended.status, 128 + 9);
        assert_none_left(&job.resolved_config(), PROMPTLY);
    }
    // Also in the middle of steps.
    let mut running = job.start(3, LONG);
    running.wait_for_step(20);
    running.send(Signal::KILL);
    running.wait();
    assert_none_left(&job.resolved_config(), PROMPTLY);
    // The folder is free again.
    job.finish(2, &[]);
}

#[test]
fn a_second_run_over_the_same_folder_is_refused() {
    let job = Job::new();
    let mut running = job.start(2, LONG);
    running.wait_for_step(3);
    let ended = job.run(2, &[]);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(
        ended.stderr.contains("in use by fsdp-launch") && ended.stderr.contains(&running.pid().to_string()),
        "{ended:?}"
    );
    let num_steps = job.steps().len() as u64;
    running.wait_for_step(num_steps + 3);
    running.send(Signal::TERM);
    assert_eq!(running.wait().status, 75);
}

#[test]
fn a_finished_run_is_done_at_once() {
    let job = Job::new();
    let settings = ["--set", "checkpoint.every_steps=10", "--set", "validation.data=[\"train.jsonl\"]"];
    job.finish(2, &settings);
    let before = (job.read("out/metrics.jsonl"), job.exported(), job.checkpoints());
    let ended = job.finish(2, &settings);
    assert!(ended.stderr.contains("nothing to do"), "{ended:?}");
    assert!((job.read("out/metrics.jsonl"), job.exported(), job.checkpoints()) == before);
    // An export that is missing is made again, with nothing trained.
    std::fs::remove_dir_all(job.path("out/hf")).unwrap();
    job.finish(2, &settings);
    assert!(job.exported() == before.1);
    assert_eq!(job.read("out/metrics.jsonl"), before.0);
    // So is one in another dtype.
    job.finish(2, &[&settings[..], &["--set", "output.dtype=bf16"]].concat());
    assert!(job.exported()["model.safetensors"].len() < before.1["model.safetensors"].len());
}

#[test]
fn a_finished_run_without_checkpoints_is_done_at_once_too() {
    let job = Job::new();
    let settings = ["--set", "checkpoint.every_steps=0"];
    job.finish(2, &settings);
    let before = (job.read("out/metrics.jsonl"), job.exported());
    let ended = job.finish(2, &settings);
    assert!(ended.stderr.contains("nothing to do"), "{ended:?}");
    assert!((job.read("out/metrics.jsonl"), job.exported()) == before);
    // Another job in the same folder is one that starts at the beginning.
    job.finish(2, &[&settings[..], &["--set", "optimizer.lr=0.01"]].concat());
    assert!(job.exported() != before.1);
}

#[test]
fn an_export_of_a_shorter_run_is_not_taken_for_a_longer_ones() {
    let (job, whole) = (Job::new(), Job::new());
    let shorter = ["--set", "checkpoint.every_steps=10", "--set", "training.steps=10"];
    let longer = ["--set", "checkpoint.every_steps=10"];
    job.finish(2, &shorter);
    // A folder in the place of a file that is copied: the longer run saves its last step, and then cannot export.
    std::fs::create_dir(job.path("model/generation_config.json")).unwrap();
    let ended = job.run(2, &longer);
    assert_eq!(ended.status, 75, "{ended:?}");
    assert!(ended.stderr.contains("generation_config.json"), "{ended:?}");
    std::fs::remove_dir(job.path("model/generation_config.json")).unwrap();
    job.finish(2, &longer);
    whole.finish(2, &longer);
    assert_same_bits(&job, &whole);
}

#[test]
fn what_does_not_continue_a_checkpoint_is_refused_with_both_values() {
    let job = Job::new();
    let every = ["--set", "checkpoint.every_steps=10"];
    job.finish(2, &every);
    for (args, says) in [
        (&["--set", "optimizer.lr=0.002"][..], &["[optimizer] lr", "0.001", "0.002", "step-00000020"][..]),
        (&["--set", "checkpoint.resume=never"], &["[checkpoint] resume", "never", "step-00000020"]),
        (&["--set", "precision.param=fp32"], &["[precision] param", "\"bf16\"", "\"fp32\""]),
    ] {
        let ended = job.run(2, &[&every, args].concat());
        assert_eq!(ended.status, 2, "{args:?}: {ended:?}");
        assert!(says.iter().all(|part| ended.stderr.contains(part)), "{args:?}: {ended:?}");
        assert_eq!(job.steps().len(), 20, "{args:?} leaves the run alone");
    }
    for (nproc, args, says) in [
        (
            3,
            &every[..],
            "trained with 4 sequences a step, which do not divide evenly into microbatches of 2 on 3 ranks",
        ),
        (2, &[&every, &["--set", "training.steps=15"][..]].concat(), "expected at least the 20 that are done, got 15"),
    ] {
        let ended = job.run(nproc, args);
        assert!(ended.status == 2 && ended.stderr.contains(says), "{args:?}: {ended:?}");
        assert_eq!(job.steps().len(), 20, "{args:?} leaves the run alone");
    }
    // The data is another.
    job.replace("train.jsonl", "\n", " \n");
    let ended = job.run(2, &[&every, &["--set", "training.steps=30"][..]].concat());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("training data changed"), "{ended:?}");
}

#[test]
fn a_run_goes_on_from_a_named_checkpoint_in_another_folder() {
    let settings = ["--set", "checkpoint.every_steps=10", "--set", "training.steps=20"];
    let (job, whole) = (Job::new(), Job::new());
    job.finish(2, &["--set", "checkpoint.every_steps=5", "--set", "training.steps=20"]);
    let from = "checkpoint.resume=out/checkpoints/step-00000015";
    let ended = job.run(2, &[&settings[..], &["--set", from]].concat());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("step-00000020") && ended.stderr.contains("[checkpoint] resume"), "{ended:?}");

    std::fs::rename(job.path("out"), job.path("earlier")).unwrap();
    let from = "checkpoint.resume=earlier/checkpoints/step-00000015";
    job.finish(2, &[&settings[..], &["--set", from]].concat());
    whole.finish(2, &settings);
    assert_eq!(job.curve(), whole.curve()[15..]);
    assert!(job.exported() == whole.exported());
}

/// Changes one byte of a checkpoint.
fn damage(job: &Job, checkpoint: &str) {
    let folder = job.path("out/checkpoints").join(checkpoint);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    files.sort();
    let path = files.last().expect("a rank's file");
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_left_for_the_one_before_it() {
    let settings = ["--set", "checkpoint.every_steps=5", "--set", "training.steps=20"];
    let longer = ["--set", "checkpoint.every_steps=5", "--set", "training.steps=23"];
    let (job, whole) = (Job::new(), Job::new());
    whole.finish(2, &longer);
    job.finish(2, &settings);
    assert_eq!(job.checkpoints(), ["step-00000015", "step-00000020"]);
    damage(&job, "step-00000020");
    let ended = job.finish(2, &longer);
    let loud = ended.stderr.lines().find(|line| line.contains("step-00000020") && line.contains("damaged"));
    assert!(loud.is_some_and(|line| line.contains("not used")), "{ended:?}");
    assert!(ended.stderr.contains("resuming after step 15"), "{ended:?}");
    assert!(job.path("out/checkpoints/step-00000020.damaged-1").is_dir());
    assert_same_bits(&job, &whole);

    // Without any whole one, nothing is started over.
    let checkpoints = job.checkpoints();
    checkpoints.iter().for_each(|name| damage(&job, name));
    let ended = job.run(2, &["--set", "checkpoint.every_steps=5", "--set", "training.steps=40"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("not started over") && ended.stderr.contains(&checkpoints[1]), "{ended:?}");
    assert_eq!(job.steps().len(), 23);
}

#[test]
fn a_run_that_diverges_is_not_to_be_run_again() {
    for param in ["bf16", "fp32", "fp16"] {
        let job = Job::new();
        let precision = format!("precision.param={param}");
        let ended =
            job.run(2, &["--set", "optimizer.lr=1e30", "--set", &precision, "--set", "checkpoint.every_steps=1"]);
        assert_eq!(ended.status, 93, "{param}: {ended:?}");
        let step = format!("at step {}: ", job.steps().len() + 1);
        for part in ["not finite", "unit ", "the weights are unchanged", &step] {
            assert!(ended.stderr.contains(part), "{param}: {part:?} is not in {ended:?}");
        }
    }
}
