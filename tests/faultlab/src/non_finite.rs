//! Numbers that are not finite: the run stops before the update, says where, and leaves a state that is as good as before.

use std::path::PathBuf;

use fsdp_checkpoint::sharded::Checkpoint;
use fsdp_tests_behaviour::job::{Ended, Job};
use fsdp_tests_behaviour::model;
use safetensors::tensor::Dtype;

use crate::report::assert_named;
use crate::resume::assert_same_state;
use crate::tally::Tally;

const ARGS: &[&str] =
    &["--set", "training.steps=20", "--set", "checkpoint.every_steps=1", "--set", "data.shuffle=false"];
const SKIP: &[&str] = &["--set", "training.on_nonfinite=skip"];
const FP32: &[&str] = &["--set", "precision.param=fp32"];

/// So many steps in a row are left out before the run ends.
const MAX_LEFT_OUT: u64 = 10;

/// A token that one sample has, and no other.
const TOKEN: usize = 47;
/// With 2 ranks and 4 sequences a step it is the second sequence of rank 0 in step 5, and comes again in the next epoch.
const LINE: usize = 18;
const STEPS_OF_LINE: [u64; 2] = [5, 13];

/// Row 15.
pub fn stopped(tally: &mut Tally, n: usize) {
    let whole = with_tokens_of_all_shards();
    whole.finish(2, &[ARGS, &["--set", "checkpoint.keep=100"]].concat());
    for i in 0..n {
        let (victim, step) = (fastrand::usize(0..2), fastrand::u64(2..20));
        let args = [ARGS, if i % 5 == 4 { SKIP } else { &[] }].concat();
        match i % 5 {
            0 | 4 => tally.check(format_args!("NaN in the weights of rank {victim} from step {step} on"), || {
                weights(&args, &whole, victim, step);
            }),
            1 => tally.check("infinity in the model's file", || poisoned_model(&args)),
            2 => tally.check("a rate that lets the weights grow", || diverging(&args)),
            _ => tally.check("a sample that overflows", || poisoned_sample(&args)),
        }
    }
}

fn checkpoint(job: &Job, step: u64) -> PathBuf {
    job.path(&format!("out/checkpoints/step-{step:08}"))
}

/// The run is not to be run again, and nothing of step `step` is kept.
#[track_caller]
fn assert_stopped(job: &Job, ended: &Ended, step: u64) {
    assert_eq!(ended.status, 93, "{ended:?}");
    job.assert_no_survivors(std::time::Duration::ZERO);
    assert!(ended.stderr.contains("the weights are unchanged"), "{ended:?}");
    assert_eq!(job.checkpoints().last().cloned(), (step > 1).then(|| format!("step-{:08}", step - 1)), "{ended:?}");
    for name in job.checkpoints() {
        let saved = Checkpoint::open(&job.path("out/checkpoints").join(name)).expect("a whole checkpoint");
        assert!(saved.manifest().files.iter().all(|file| file.num_nonfinite == 0), "a poisoned checkpoint");
    }
}

/// A job whose samples all have the tokens of the first rows of each rank's shard of the embedding, which is where the
/// fault is: else some steps would not meet it.
fn with_tokens_of_all_shards() -> Job {
    let job = Job::new();
    job.replace("job.toml", "seq_len = 8", "seq_len = 16");
    job.replace("train.jsonl", "[", "[0, 24, ");
    job
}

/// One rank has NaN in its shard from `step` on. No step could be left out that would mend it.
fn weights(args: &[&str], whole: &Job, victim: usize, step: u64) {
    let job = with_tokens_of_all_shards();
    let ended = job.spawn(job.faulty_command(2, args, &format!("rank={victim},step={step},do=nan"))).wait();
    assert_named(&ended, victim, &["not finite", "in the weight ", "of unit ", &format!(" at step {step}: ")]);
    assert_stopped(&job, &ended, step);
    assert_same_state(&checkpoint(&job, step - 1), &checkpoint(whole, step - 1));
    assert_eq!(job.curve(), whole.curve()[..step as usize - 1]);
    // Without the fault the checkpoint goes on to the same end.
    job.finish(2, args);
    job.assert_bits_of(whole);
}

fn poisoned_model(args: &[&str]) {
    let job = Job::new();
    let names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"];
    let name = names[fastrand::usize(0..3)];
    edit_model(&job, name, |i, x| if i == 11 { f32::INFINITY } else { x });
    let ended = job.run(2, args);
    assert!(ended.stderr.contains(&format!("in the weight {name} of unit ")), "{ended:?}");
    assert!(ended.stderr.contains(" at step 1: "), "{ended:?}");
    assert_stopped(&job, &ended, 1);
}

fn diverging(args: &[&str]) {
    let job = Job::new();
    let ended = job.run(2, &[args, &["--set", "optimizer.lr=1e30"]].concat());
    let step = job.steps().len() as u64 + 1;
    for part in ["not finite", "unit ", "rank ", &format!(" at step {step}: ")] {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
    assert_stopped(&job, &ended, step);
}

/// Values of the model's tensor `name`, each by its index.
fn edit_model(job: &Job, name: &str, edit: impl Fn(usize, f32) -> f32) {
    let mut tensors = model::tensors(&job.path("model"), Dtype::F32);
    let bytes = &mut tensors.get_mut(name).expect("a tensor of the model").bytes;
    for (i, value) in bytes.chunks_exact_mut(4).enumerate() {
        let now = edit(i, f32::from_le_bytes(value.try_into().expect("four bytes")));
        value.copy_from_slice(&now.to_le_bytes());
    }
    model::write(&job.path("model/model.safetensors"), &tensors);
}

/// The sample is named; or its steps are left out, counted, and the others train, unless all are such.
fn poisoned_sample(args: &[&str]) {
    let args = [args, FP32].concat();
    let skips = [&args[..], SKIP].concat();
    let job = with_poisoned_token(|line| line == LINE);
    let ended = job.run(2, &args);
    assert_named(&ended, 0, &["not finite", "unit ", &format!("train.jsonl:{LINE};"), " at step 5: "]);
    assert_stopped(&job, &ended, 5);

    let job = with_poisoned_token(|line| line == LINE);
    let ended = job.finish(2, &skips);
    assert_eq!(skipped(&job), STEPS_OF_LINE, "{ended:?}");
    for step in STEPS_OF_LINE {
        assert!(ended.stderr.contains(&format!("step {step} is left out: ")), "{ended:?}");
    }

    let job = with_poisoned_token(|_| true);
    let ended = job.run(2, &skips);
    assert!(ended.stderr.contains(&format!(" at step {MAX_LEFT_OUT}: ")), "{ended:?}");
    assert_stopped(&job, &ended, MAX_LEFT_OUT);
    assert_eq!(skipped(&job).len() as u64, MAX_LEFT_OUT, "{ended:?}");
}

/// A job with a token whose embedding overflows, in the samples of these lines.
fn with_poisoned_token(has_it: impl Fn(usize) -> bool) -> Job {
    let job = Job::new();
    let text = job.read("train.jsonl").replace("47", "46");
    let lines = text.lines().enumerate().map(|(i, line)| match has_it(i + 1) {
        true => format!("{{\"input_ids\": [3, {TOKEN}, 5, 6, 7]}}\n"),
        false => format!("{line}\n"),
    });
    job.write("train.jsonl", lines.collect::<String>());
    let hidden = 16;
    edit_model(&job, "model.embed_tokens.weight", |i, x| if i / hidden == TOKEN { 3e38 } else { x });
    job
}

/// The steps that were left out.
fn skipped(job: &Job) -> Vec<u64> {
    let lines = job.read("out/metrics.jsonl");
    let lines = lines.lines().filter(|line| line.contains("\"skipped\":true"));
    lines.filter_map(|line| line.split_once("\"step\":")?.1.split_once(',')?.0.parse().ok()).collect()
}
