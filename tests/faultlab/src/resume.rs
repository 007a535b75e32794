//! Runs that were ended go on to the bits of a run that was not, and over the same data in the same order, also on another
//! number of ranks.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use fsdp_checkpoint::sharded::Checkpoint;
use fsdp_tests_behaviour::job::Job;
use rustix::process::Signal;

use crate::mismatches::copy;
use crate::saves::{Victim, assert_finishes_as, assert_goes_on, kill, newest_step};
use crate::tally::Tally;

/// Kinds of runs: ranks, and what the state depends on.
const KINDS: &[(usize, &[&str])] = &[
    (2, &["precision.param=fp32"]),
    // Besides, the loss scale and its age.
    (2, &["precision.param=fp16"]),
    (3, &["lr_scheduler.kind=cosine", "lr_scheduler.warmup_steps=5", "training.grad_accumulation=2"]),
    // The data is begun again every eighth step, in another order.
    (1, &["training.micro_batch_size=4", "fsdp.prefetch=0"]),
    (2, &["fsdp.strategy=hybrid_shard", "fsdp.shard_size=1", "checkpoint.async=false"]),
    (2, &["validation.data=[\"train.jsonl\"]", "validation.every_steps=4", "precision.param=bf16"]),
];

/// `--set` before each.
fn set<'a>(keys: &[&'a str]) -> Vec<&'a str> {
    keys.iter().flat_map(|key| ["--set", key]).collect()
}

/// Row 27: a run is killed, or asked to stop, at any moment, and goes on.
pub fn exact(tally: &mut Tally, n: usize) {
    let (mut num_killed, mut num_stopped) = (0, 0);
    for (i, (nproc, keys)) in KINDS.iter().enumerate().take(n) {
        let args = [set(keys), set(&["training.steps=30", "checkpoint.every_steps=3"])].concat();
        let whole = Job::new();
        whole.finish(*nproc, &args);
        for number in (i..n).step_by(KINDS.len()) {
            let stops = number % 3 == 2;
            tally.check(format_args!("{nproc} ranks, {keys:?}, asked to stop: {stops}"), || {
                let job = Job::new();
                let mut running = job.start(*nproc, &args);
                // Before the first checkpoint nothing is there to go on from.
                let wanted = fastrand::u64(1..25);
                running.wait_until_or_end(|job| newest_name(job) >= wanted);
                std::thread::sleep(Duration::from_micros(fastrand::u64(0..5_000)));
                if stops {
                    running.send(Signal::TERM);
                    num_stopped += 1;
                } else {
                    num_killed += usize::from(kill(&running, &job, Victim::random(*nproc)));
                }
                let ended = running.wait();
                assert_goes_on(&job, &ended, 3);
                assert_finishes_as(&job, *nproc, &args, &whole);
            });
        }
    }
    tally.note(format!("{num_killed} killed, {num_stopped} asked to stop"));
}

/// Samples of the jobs of row 24: sample `i` has `i + 1` tokens to learn, so that the tokens of a step tell its samples.
const NUM_SAMPLES: u64 = 48;
const GLOBAL_BATCH: u64 = 12;
/// Of `GLOBAL_BATCH` samples each: four times all of the data.
const NUM_STEPS: u64 = 16;

fn ordered_job() -> Job {
    let job = Job::new();
    let lines = (0..NUM_SAMPLES).map(|i| {
        let ids: Vec<String> = (0..i + 2).map(|j| ((i * 7 + j * j) % 48).to_string()).collect();
        format!("{{\"input_ids\": [{}]}}\n", ids.join(", "))
    });
    job.write("train.jsonl", lines.collect::<String>());
    job.replace("job.toml", "seq_len = 8\nmicro_batch_size = 2", "seq_len = 64\nmicro_batch_size = 1");
    job
}

fn tokens(job: &Job) -> Vec<u64> {
    job.steps().iter().map(|line| line["tokens"].as_u64().expect("a step has tokens")).collect()
}

/// Row 24: the samples of each step are those of an unbroken run, whatever the number of ranks before and after; and data
/// that was edited meanwhile is refused.
pub fn same_order(tally: &mut Tally, n: usize) {
    // One rank that takes one sample a step tells the order itself.
    let single = ordered_job();
    let num_steps = format!("training.steps={}", NUM_STEPS * GLOBAL_BATCH);
    single.finish(1, &set(&[&num_steps, "training.global_batch_size=1"]));
    let order: Vec<u64> = tokens(&single).iter().map(|tokens| tokens - 1).collect();
    tally.check("the order of one rank", || {
        for epoch in order.chunks(NUM_SAMPLES as usize) {
            let all: BTreeSet<u64> = epoch.iter().copied().collect();
            assert_eq!(all, (0..NUM_SAMPLES).collect(), "each sample comes once an epoch");
        }
        let is_new = |pair: &[&[u64]]| pair[0] != pair[1];
        let epochs: Vec<&[u64]> = order.chunks(NUM_SAMPLES as usize).collect();
        assert!(epochs.windows(2).all(is_new), "each epoch has its own order");
    });
    let expected: Vec<u64> =
        order.chunks(GLOBAL_BATCH as usize).map(|step| step.iter().map(|sample| sample + 1).sum()).collect();
    let batch = format!("training.global_batch_size={GLOBAL_BATCH}");
    let num_steps = format!("training.steps={NUM_STEPS}");
    let args = set(&[&num_steps, &batch, "checkpoint.every_steps=1"]);
    for i in 0..n {
        // Every second time, each start has another number of ranks.
        let first = fastrand::usize(1..=4);
        let mut ranks = vec![];
        tally.check(format_args!("{first} ranks first, changing: {}", i % 2 == 1), || {
            let job = ordered_job();
            loop {
                let nproc = if i % 2 == 1 && !ranks.is_empty() { fastrand::usize(1..=4) } else { first };
                ranks.push(nproc);
                let before = newest_step(&job);
                let mut running = job.start(nproc, &args);
                let wanted = before + fastrand::u64(1..8);
                running.wait_until_or_end(|job| newest_name(job) >= wanted);
                std::thread::sleep(Duration::from_micros(fastrand::u64(0..5_000)));
                kill(&running, &job, Victim::random(nproc));
                let ended = running.wait();
                assert_goes_on(&job, &ended, before);
                if ended.status == 0 {
                    break;
                }
            }
            assert_eq!(tokens(&job), expected, "on {ranks:?} ranks");
        });
    }
    for (what, from, to) in [
        ("a token", "\"input_ids\": [7, 8", "\"input_ids\": [7, 9"),
        ("two lines in one", "}\n{\"input_ids\": [14", "}   {\"input_ids\": [14"),
        ("a line more", "{\"input_ids\": [14", "{\"input_ids\": [1, 2]}\n{\"input_ids\": [14"),
    ] {
        tally.check(format_args!("{what} of the data is edited"), || {
            let job = ordered_job();
            job.finish(2, &set(&["training.steps=2", &batch, "checkpoint.every_steps=1"]));
            job.replace("train.jsonl", from, to);
            let ended = job.run(2, &args);
            assert_eq!(ended.status, 2, "{ended:?}");
            assert_eq!(job.steps().len(), 2, "{ended:?}");
            assert!(ended.stderr.contains("train"), "{ended:?}");
        });
    }
}

/// The step in the newest checkpoint's name; unlike [`newest_step`], for a run that goes on meanwhile.
fn newest_name(job: &Job) -> u64 {
    job.checkpoints().last().map_or(0, |name| name["step-".len()..].parse().expect("digits"))
}

/// Steps before the number of ranks changes.
const BEFORE: u64 = 4;
const AFTER: u64 = 20;

/// Row 25: all pairs of 1 to 4 ranks, whatever `n` is.
///
/// Two jobs: one of common data, where sums over ranks are rounded in another order; and one where only one sample of
/// each step has something to learn, and gradients are not clipped. There the order of sums does not matter, so that all
/// must be the same bits on any number of ranks: weights and moments, before and after.
pub fn resharded(tally: &mut Tally, _n: usize) {
    let (steps, every) = (format!("training.steps={}", BEFORE + AFTER), format!("checkpoint.every_steps={BEFORE}"));
    let all = set(&["training.global_batch_size=12", &steps, &every, "checkpoint.keep=100"]);
    let wholes = [1, 2, 3, 4].map(|nproc| {
        [twelve_job(false), twelve_job(true)].map(|whole| {
            whole.finish(nproc, &all);
            whole
        })
    });
    tally.check("unbroken, one sample a step", || {
        let name = format!("out/checkpoints/step-{:08}", BEFORE + AFTER);
        for [_, whole_of_one] in &wholes[1..] {
            assert_same_state(&whole_of_one.path(&name), &wholes[0][1].path(&name));
        }
    });
    let mut largest_difference = 0.0f64;
    for from in 1..=4 {
        for to in (1..=4).filter(|to| *to != from) {
            let [whole, whole_of_one] = &wholes[from - 1];
            let name = |step: u64| format!("out/checkpoints/step-{step:08}");
            // From the checkpoint alone.
            let go_on = |whole: &Job, of_one| {
                let job = twelve_job(of_one);
                copy(&whole.path(&name(BEFORE)), &job.path(&name(BEFORE)));
                let ended = job.finish(to, &all);
                assert!(ended.stderr.contains(&format!("resuming after step {BEFORE} ")), "{ended:?}");
                job
            };
            tally.check(format_args!("{from} -> {to}: common data"), || {
                let (got, expected) = (go_on(whole, false).losses(), &whole.losses()[BEFORE as usize..]);
                assert_eq!(got.len(), expected.len());
                for (got, expected) in got.iter().zip(expected) {
                    largest_difference = largest_difference.max((got - expected).abs() / expected);
                }
                assert!(largest_difference <= 1e-5, "losses differ by {largest_difference:e} of them");
            });
            tally.check(format_args!("{from} -> {to}: one sample a step"), || {
                let (job, whole_of_one) = (go_on(whole_of_one, true), &wholes[0][1]);
                for step in (BEFORE..=BEFORE + AFTER).step_by(BEFORE as usize) {
                    assert_same_state(&job.path(&name(step)), &whole_of_one.path(&name(step)));
                }
                assert!(job.exported() == whole_of_one.exported(), "the exported models differ");
            });
        }
    }
    tally.note(format!("losses differ by at most {largest_difference:.1e} of them"));
}

/// A job for global batches of 12; `of_one`: only the sixth sequence of each has something to learn.
fn twelve_job(of_one: bool) -> Job {
    let job = Job::new();
    // Where bf16 would round the differences away that are to be seen.
    job.replace("job.toml", "micro_batch_size = 2", "micro_batch_size = 1\n[precision]\nparam = \"fp32\"");
    if of_one {
        let lines = (0..96).map(|i| {
            let ids: Vec<String> = (0..8).map(|j| ((i * 5 + j * j * 3) % 48).to_string()).collect();
            let labels = if i % 12 == 5 { ids.join(", ") } else { ["-100"; 8].join(", ") };
            format!("{{\"input_ids\": [{}], \"labels\": [{labels}]}}\n", ids.join(", "))
        });
        job.write("train.jsonl", lines.collect::<String>());
        job.replace("job.toml", "[precision]", "max_grad_norm = 0.0\n[precision]");
        job.replace("job.toml", "[data]", "[data]\nshuffle = false");
    }
    job
}

/// Every tensor of two checkpoints has the same bits, however it is cut.
#[track_caller]
pub fn assert_same_state(got: &Path, expected: &Path) {
    let open = |path: &Path| Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"));
    let (got, expected) = (open(got), open(expected));
    let tensors: BTreeSet<_> =
        expected.manifest().chunks.iter().map(|c| (c.state, &c.name, c.shape.iter().product::<usize>())).collect();
    for (state, name, numel) in tensors {
        let read = |from: &Checkpoint| {
            let mut values = vec![0.0f32; numel];
            from.read_f32(state, name, 0, &mut values).unwrap_or_else(|error| panic!("{error}"));
            values.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        };
        let (got_bits, expected_bits) = (read(&got), read(&expected));
        let num_different = got_bits.iter().zip(&expected_bits).filter(|(got, expected)| got != expected).count();
        assert_eq!(num_different, 0, "{} of {name} at {}", state.name(), got.dir().display());
    }
}
