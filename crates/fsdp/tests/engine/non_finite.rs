//! A step that is not finite names its first place, the same on all ranks, and changes nothing.

use std::time::Duration;

use fsdp::{Engine, EngineConfig, EngineError, MicroBatch, NonFinite, Pace, StateKind};
use fsdp_plan::Dtype;
use tch::Device;

use crate::job::{Dtypes, GLOBAL_BATCH, Job, SEQ_LEN, TIED, UNTIED, fp32, state, state_bits, train_step, write_params};
use crate::ranks::{World, run};

#[test]
fn what_is_not_finite_is_named_and_changes_nothing() {
    (1..=3).for_each(|world_size| drop(run("non_finite", world_size)));
}

pub fn rank(world: &mut World) {
    weights(world);
    outputs(world);
    sequences(world);
    gradients(world);
    skipped(world);
    paces(world);
    no_valid_token(world);
}

/// Sets elements of this rank's pieces of a parameter.
fn set(engine: &mut Engine, name: &str, value: impl Fn(usize, f32) -> f32) {
    write_params(engine, |piece, values| {
        if piece.name == name {
            values.iter_mut().enumerate().for_each(|(i, x)| *x = value(piece.start + i, *x));
        }
    });
}

fn fails(world: &World, job: &Job, engine: &mut Engine) -> NonFinite {
    let before = (state_bits(engine), engine.progress().unwrap().0);
    let error = train_step(engine, job.batches(world, 0), job.lr).unwrap_err();
    assert_eq!((state_bits(engine), engine.progress().unwrap().0), before, "{error}");
    match error {
        EngineError::NonFinite(place) => place,
        error => panic!("{error}"),
    }
}

/// One NaN in one rank's shard: rank, unit and parameter.
fn weights(world: &mut World) {
    for (model, bad) in [(TIED, f32::NAN), (UNTIED, f32::INFINITY)] {
        for victim in 0..world.size {
            let job = Job::new(model);
            let mut engine = job.engine(world);
            // The last piece of the second block that the victim holds.
            let piece = engine.pieces().iter().rfind(|piece| piece.unit == 2).cloned();
            let piece = piece.expect("each rank has a part of each unit");
            let (name, at) = if world.rank == victim { (piece.name, piece.start) } else { (String::new(), 0) };
            set(&mut engine, &name, |i, x| if i == at { bad } else { x });
            match fails(world, &job, &mut engine) {
                NonFinite::Weight { rank, unit, param } => {
                    assert_eq!((rank, unit.as_str()), (victim, "layers.1"));
                    assert!(world.rank != victim || param == name, "{param}, expected {name}");
                    assert!(param.starts_with("model.layers.1."), "{param}");
                }
                other => panic!("{other}"),
            }
        }
    }
}

/// Finite weights whose products are not: the first unit whose output shows it.
fn outputs(world: &mut World) {
    let accumulation = if world.size == 3 { 2 } else { 3 };
    for (compute, dtypes, large, huge) in
        [(Dtype::Fp32, fp32 as Dtypes, 1e20, 3e38), (Dtype::Fp16, fp16 as Dtypes, 1e3, 6e4)]
    {
        for (params, value, expected) in [
            (
                &["model.layers.2.self_attn.v_proj.weight", "model.layers.2.self_attn.o_proj.weight"][..],
                large,
                "layers.2",
            ),
            (&["model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"], large, "layers.0"),
            (&["lm_head.weight"], huge, "head"),
        ] {
            let job = Job { compute, dtypes, accumulation, ..Job::new(UNTIED) };
            let mut engine = job.engine(world);
            let fresh = state(&engine, StateKind::Param);
            params.iter().for_each(|param| set(&mut engine, param, |i, _| if i % 3 == 0 { -value } else { value }));
            let place = fails(world, &job, &mut engine);
            match place {
                NonFinite::Output { unit, at } => {
                    assert_eq!((unit.as_str(), at.rank, at.microbatch), (expected, 0, 0), "{params:?} in {compute}");
                    assert!(!at.sequences.is_empty(), "{params:?} in {compute}");
                }
                other => panic!("{other}"),
            }
            // The engine is as good as before: with the old weights back it trains as a new one.
            let mut fresh = fresh.as_slice();
            write_params(&mut engine, |_, values| {
                let (own, rest) = fresh.split_at(values.len());
                values.copy_from_slice(own);
                fresh = rest;
            });
            let loss = job.step(world, &mut engine, 0).loss;
            let mut other = job.engine(world);
            assert_eq!(loss, job.step(world, &mut other, 0).loss);
        }
    }
    // A weight that its param dtype cannot hold.
    let job = Job { compute: Dtype::Fp16, dtypes: fp16, ..Job::new(TIED) };
    let mut engine = job.engine(world);
    set(&mut engine, "model.embed_tokens.weight", |_, _| 1e5);
    match fails(world, &job, &mut engine) {
        NonFinite::Output { unit, at } => {
            let all: Vec<usize> = (0..GLOBAL_BATCH / world.size).collect();
            assert_eq!((unit.as_str(), at.rank, at.sequences), ("embed_tokens", 0, all));
        }
        other => panic!("{other}"),
    }
}

/// A token that one sequence of one rank's second microbatch has alone: that sequence is named on all ranks.
fn sequences(world: &mut World) {
    const TOKEN: usize = 39;
    let culprit = world.size - 1;
    let job = Job { accumulation: 2, ..poisoned_token_job() };
    let mut engine = job.engine(world);
    poison(&mut engine, TOKEN, 40);
    let batches = job.batches(world, 0);
    if world.rank == culprit {
        let _ = batches[1].ids.narrow(0, SEQ_LEN as i64, 2).fill_(TOKEN as i64);
    }
    match train_step(&mut engine, batches, job.lr).unwrap_err() {
        EngineError::NonFinite(place) => {
            let at = place.sequences().unwrap_or_else(|| panic!("{place}"));
            assert_eq!((at.rank, at.microbatch, at.sequences.as_slice()), (culprit, 1, &[1][..]), "{place}");
        }
        error => panic!("{error}"),
    }
}

/// Its norms divide by numbers that are almost 0.
fn poisoned_token_job() -> Job {
    Job::new(
        r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "initializer_range": 1}"#,
    )
}

/// Gives a token an embedding whose products overflow.
fn poison(engine: &mut Engine, token: usize, vocab_size: usize) {
    write_params(engine, |piece, values| {
        if piece.name == "model.embed_tokens.weight" {
            let hidden = piece.shape.iter().product::<usize>() / vocab_size;
            for (i, x) in values.iter_mut().enumerate() {
                if (piece.start + i) / hidden == token {
                    *x = 3e38;
                }
            }
        }
    });
}

/// Where such steps are to be left out, each says so, changes nothing, and the next one trains.
fn skipped(world: &mut World) {
    const TOKEN: usize = 39;
    let job = poisoned_token_job();
    let mut engine = job.engine_with(world, |config| EngineConfig { skip_non_finite: true, ..config });
    poison(&mut engine, TOKEN, 40);
    let before = state_bits(&engine);
    for _ in 0..2 {
        let batches = job.batches(world, 0);
        let _ = batches[0].ids.narrow(0, 0, 2).fill_(TOKEN as i64);
        let report = train_step(&mut engine, batches, job.lr).unwrap();
        assert!(report.non_finite.is_some());
        assert_eq!(state_bits(&engine), before);
    }
    let report = job.step(world, &mut engine, 0);
    assert!(report.non_finite.is_none() && report.loss.is_finite());
    assert_ne!(state_bits(&engine), before);
    assert_eq!(engine.progress().unwrap().0, 1, "steps that were left out do not count");
}

/// Every rank hears how long each was busy.
fn paces(world: &mut World) {
    let job = Job::new(TIED);
    let mut engine = job.engine(world);
    let pace = |rank: usize| Pace {
        busy: Duration::from_millis(10 * rank as u64 + 3),
        data: Duration::from_micros(rank as u64),
    };
    let started = engine.start_step(job.batches(world, 0), job.lr, false, pace(world.rank)).unwrap();
    let report = engine.finish_step(started).unwrap();
    assert_eq!(report.paces, (0..world.size).map(pace).collect::<Vec<_>>());
}

fn fp16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Fp16, Dtype::Fp32)
}

/// Weights, outputs and loss are finite, the norm of a gradient is not.
fn gradients(world: &mut World) {
    // Norms over tiny rows have huge gradients.
    let model = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-45,
        "initializer_range": 1}"#;
    let job = Job::new(model);
    let mut engine = job.engine(world);
    set(&mut engine, "model.embed_tokens.weight", |i, _| (i % 5) as f32 * 1e-22);
    match fails(world, &job, &mut engine) {
        NonFinite::Gradient { unit, param, .. } => {
            assert_eq!((unit.as_str(), param.as_str()), ("embed_tokens", "model.embed_tokens.weight"));
        }
        other => panic!("{other}"),
    }
}

fn no_valid_token(world: &mut World) {
    let job = Job::new(TIED);
    let mut engine = job.engine(world);
    let before = state_bits(&engine);
    let num_tokens = GLOBAL_BATCH / world.size * SEQ_LEN;
    let nothing = MicroBatch::new(&vec![1; num_tokens], &vec![-100; num_tokens], 0, Device::Cpu).unwrap();
    let error = train_step(&mut engine, vec![nothing], job.lr).unwrap_err();
    assert!(matches!(error, EngineError::NoValidToken), "{error}");
    assert_eq!(state_bits(&engine), before);
    assert!(job.step(world, &mut engine, 0).loss.is_finite(), "the engine goes on");
}
