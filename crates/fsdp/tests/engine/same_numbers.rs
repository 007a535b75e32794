//! How the work is split and when it is done does not change what comes out.

use std::time::Duration;

use fsdp_plan::Dtype;
use rustix::process::Signal;

use crate::job::{Job, ODD, QWEN2, QWEN3, Run, TIED, UNTIED, distance, params};
use crate::ranks::{World, report, run, start};

const STEPS: usize = 5;

/// Any number of ranks and microbatches gives the same losses, norms and weights, up to rounding.
#[test]
fn every_split_of_the_batch_gives_the_same_training() {
    let mut expected: Option<Vec<Vec<f64>>> = None;
    for world_size in 1..=4 {
        let results = run("splits", world_size);
        assert!(results.iter().all(|lines| lines == &results[0]), "ranks differ");
        let got: Vec<Vec<f64>> =
            results[0].iter().map(|line| line.split(' ').map(|x| x.parse().unwrap()).collect()).collect();
        let expected = expected.get_or_insert_with(|| got.clone());
        for (i, got) in got.iter().enumerate() {
            // Three lines a run; a model's two runs are both held against its first one on one rank.
            let off = distance(got, &expected[i / 6 * 6 + i % 3]);
            assert!(off < 1e-5, "run {i} on {world_size} ranks is off by {off:.1e}");
        }
    }
}

pub fn rank_splits(world: &mut World) {
    for model in [TIED, UNTIED, QWEN2, QWEN3, ODD] {
        for accumulation in [1, 3] {
            // Twelve sequences do not divide by 3 x 3 ranks: nothing to compare there.
            let accumulation = if 12 % (accumulation * world.size) == 0 { accumulation } else { 2 };
            let run = Job { accumulation, ..Job::new(model) }.train(world, STEPS);
            for values in [run.losses, run.norms, run.params.iter().map(|x| f64::from(*x)).collect()] {
                report(values.iter().map(f64::to_string).collect::<Vec<_>>().join(" "));
            }
        }
    }
}

/// The norm of gradients of millions of elements is as exact as that of few, whatever the shards.
#[test]
fn the_norm_of_large_gradients_is_the_same_on_any_shards() {
    let norms = [1, 4].map(|world_size| run("large", world_size)[0][0].parse::<f64>().unwrap());
    assert!((norms[0] / norms[1] - 1.0).abs() < 2e-6, "{norms:?}");
}

pub fn rank_large(world: &mut World) {
    // A tied head: every element of its 5 million has a gradient.
    let model = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 40000, "hidden_size": 128,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": true}"#;
    let job = Job::new(model);
    let mut engine = job.engine(world);
    report(job.step(world, &mut engine, 0).grad_norm);
}

/// A rerun, recompute, prefetch, resident blocks and interleaved validation change no bit.
#[test]
fn what_must_not_matter_changes_no_bit() {
    (1..=3).for_each(|world_size| drop(run("same bits", world_size)));
}

pub fn rank_same_bits(world: &mut World) {
    fn bf16(_: &str) -> (Dtype, Dtype) {
        (Dtype::Bf16, Dtype::Fp32)
    }
    for model in [TIED, UNTIED, QWEN3] {
        for job in [Job::new(model), Job { compute: Dtype::Bf16, dtypes: bf16, accumulation: 2, ..Job::new(model) }] {
            let first = job.train(world, STEPS);
            for (what, other) in [
                ("a rerun", job),
                ("no recompute", Job { recompute: false, ..job }),
                ("no prefetch", Job { prefetch: 0, ..job }),
                ("no prefetch, no recompute", Job { prefetch: 0, recompute: false, ..job }),
                ("prefetch of everything", Job { prefetch: 9, ..job }),
                ("one resident block", Job { resident_units: 1, ..job }),
                ("one resident block, no prefetch", Job { resident_units: 1, prefetch: 0, ..job }),
                ("only resident blocks", Job { resident_units: 9, ..job }),
            ] {
                assert_eq!(other.train(world, STEPS), first, "{what}");
            }
            assert_eq!(with_validation(world, &job), first, "validation in between");
        }
    }
}

/// Trains with forward passes between the steps, which must see the same model.
fn with_validation(world: &mut World, job: &Job) -> Run {
    let mut engine = job.engine(world);
    let mut run = Run { losses: vec![], norms: vec![], params: vec![] };
    for step in 0..STEPS {
        let batches = job.batches(world, step);
        let (mut sum, mut num_tokens) = (0.0, 0);
        for batch in &batches {
            let (loss_sum, tokens) = engine.evaluate(batch).unwrap();
            (sum, num_tokens) = (sum + loss_sum, num_tokens + tokens);
        }
        let next = engine.next_tokens(&batches[0], &[0, 3]).unwrap();
        assert!(next.len() == 2 && next.iter().all(|id| (0..40).contains(id)), "{next:?}");
        let report = job.step(world, &mut engine, step);
        assert_eq!(report.num_tokens, num_tokens);
        let loss = sum / num_tokens as f64;
        assert!((loss - report.loss).abs() <= 1e-12 * loss, "validation says {loss}, training {}", report.loss);
        run.losses.push(report.loss);
        run.norms.push(report.grad_norm);
    }
    run.params = params(&mut engine);
    run
}

/// Ranks that are suspended at random moments wait for each other, and come to the same bits.
#[test]
fn delays_change_no_bit() {
    let expected = run("many steps", 3);
    let mut ranks = start("many steps", 3);
    let mut random = 1u64;
    let mut num_delays = 0;
    while ranks.are_running() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (rank, ms) = ((random >> 40) as usize % 3, (random >> 50) % 8);
        ranks.signal(rank, Signal::STOP);
        std::thread::sleep(Duration::from_millis(ms));
        ranks.signal(rank, Signal::CONT);
        std::thread::sleep(Duration::from_millis(1));
        num_delays += 1;
    }
    assert!(num_delays > 20, "{num_delays} delays are no test");
    assert_eq!(ranks.wait("many steps"), expected);
}

pub fn rank_many_steps(world: &mut World) {
    for prefetch in [0, 1, 2] {
        for model in [UNTIED, TIED] {
            let run = Job { prefetch, accumulation: 2, ..Job::new(model) }.train(world, 20);
            let bits = run.params.iter().fold(0u64, |digest, x| digest.rotate_left(5) ^ u64::from(x.to_bits()));
            report(format!("{bits:x} {:?}", run.losses));
        }
    }
}
