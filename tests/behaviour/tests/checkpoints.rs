//! What checkpoints are good for besides resuming the same run, seen through the real commands.

use std::process::Command;

use fsdp_tests_behaviour::job::{Ended, Job, built};

/// The launcher's command `args` in the job's folder.
fn launcher(job: &Job, args: &[&str]) -> (i32, String) {
    let out = Command::new(built("fsdp-launch")).current_dir(job.path("")).args(args).output().expect("the launcher");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().expect("an exit"), text)
}

#[test]
fn an_export_of_a_checkpoint_has_the_bytes_of_the_runs_own() {
    let job = Job::new();
    job.finish(2, &["--set", "checkpoint.every_steps=10"]);
    let (status, text) = launcher(&job, &["export", "out", "exported"]);
    assert_eq!(status, 0, "{text}");
    for (name, bytes) in job.exported() {
        assert!(std::fs::read(job.path("exported").join(&name)).is_ok_and(|got| got == bytes), "{name} differs");
    }
}

#[test]
fn inspect_finds_what_is_damaged() {
    let job = Job::new();
    job.finish(2, &["--set", "checkpoint.every_steps=10"]);
    let checkpoint = "out/checkpoints/step-00000020";
    let (status, text) = launcher(&job, &["inspect", checkpoint]);
    assert!(status == 0 && text.contains("verified"), "{text}");
    let shard = job.path(checkpoint).join("rank-00001-of-00002.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let (status, text) = launcher(&job, &["inspect", checkpoint]);
    assert!(status == 2 && text.contains("rank-00001-of-00002.safetensors"), "{text}");
}

#[test]
fn saving_behind_the_steps_changes_no_bit() {
    let [behind, between] = ["true", "false"].map(|is_async| {
        let job = Job::new();
        job.finish(2, &["--set", "checkpoint.every_steps=3", "--set", &format!("checkpoint.async={is_async}")]);
        job
    });
    behind.assert_bits_of(&between);
    assert_eq!(behind.checkpoints(), between.checkpoints());
    let values = |job: &Job| std::fs::read(job.path("out/checkpoints/step-00000020/rank-00000-of-00002.safetensors"));
    let without_header = |bytes: Vec<u8>| {
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header_bytes..].to_vec()
    };
    assert!(without_header(values(&behind).unwrap()) == without_header(values(&between).unwrap()));
}

#[test]
fn the_newest_and_those_of_keep_every_stay() {
    let job = Job::new();
    let Ended { stderr, .. } =
        job.finish(2, &["--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep_every=6"]);
    let expected = ["step-00000006", "step-00000012", "step-00000018", "step-00000020"];
    assert_eq!(job.checkpoints(), expected, "{stderr}");
}

/// The batch of a step is kept, so the losses are the same up to rounding; and back again.
#[test]
fn another_number_of_ranks_goes_on_with_the_same_batches() {
    let whole = Job::new();
    let settings = ["--set", "precision.param=fp32", "--set", "checkpoint.every_steps=5"];
    let until = |steps| [&settings[..], &["--set", steps]].concat();
    whole.finish(2, &until("training.steps=20"));
    let job = Job::new();
    job.finish(2, &until("training.steps=8"));
    job.finish(1, &until("training.steps=14"));
    job.finish(2, &until("training.steps=20"));
    job.assert_losses_of(&whole);
}
