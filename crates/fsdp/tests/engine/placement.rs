//! Where state is kept and among whom it is sharded does not change what comes out.

use fsdp::{EngineError, Lane, NonFinite, Pace};
use fsdp_plan::{Dtype, Offload, Step};

use crate::job::{Dtypes, Job, ODD, QWEN3, TIED, UNTIED, distance, fp32, params, write_params};
use crate::ranks::{Carrier, World, nccl_double, run};

const STEPS: usize = 5;

fn bf16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Bf16, Dtype::Fp32)
}

/// Moments, and master weights too, that pass through the device in chunks.
#[test]
fn offloading_changes_no_bit() {
    (1..=3).for_each(|world_size| drop(run("offload", world_size)));
}

pub fn rank_offload(world: &mut World) {
    for model in [TIED, UNTIED, QWEN3] {
        for (compute, dtypes) in [(Dtype::Fp32, fp32 as Dtypes), (Dtype::Bf16, bf16)] {
            let job = Job { compute, dtypes, ..Job::new(model) };
            let expected = job.train(world, STEPS);
            for offload in [Offload::Optimizer, Offload::Master] {
                assert_eq!(Job { offload, ..job }.train(world, STEPS), expected, "{offload:?} in {compute}");
            }
        }
    }
}

/// Replicas of shards give what shards over all ranks give, up to rounding, and every replica the same bits.
#[test]
fn replicas_train_as_one() {
    (2..=4).for_each(|world_size| drop(run("replicas", world_size)));
}

pub fn rank_replicas(world: &mut World) {
    for model in [TIED, UNTIED, ODD] {
        let job = Job { accumulation: if world.size == 4 { 1 } else { 2 }, ..Job::new(model) };
        let full = job.train(world, STEPS);
        let world_size = world.size;
        let alone = Job { is_hybrid: true, ..job }.train(world, STEPS);
        assert_eq!(alone, full, "one replica is none");
        for num_replicas in (2..=world_size).filter(|n| world_size.is_multiple_of(*n)) {
            let job = Job { num_replicas, ..job };
            let hybrid = job.train(world, STEPS);
            assert!(distance(&hybrid.losses, &full.losses) < 1e-6, "{num_replicas} replicas: {hybrid:?} {full:?}");
            assert!(distance(&hybrid.norms, &full.norms) < 1e-5, "{num_replicas} replicas: {hybrid:?} {full:?}");
            assert_eq!(job.train(world, STEPS), hybrid, "a rerun");
        }
    }
}

/// The back end of GPUs, on a double of its library that works on the CPU, and the way through the host's memory: the
/// engine asks for the same collectives, and comes to the same numbers.
#[test]
fn other_carriers_give_the_same_training() {
    if nccl_double().is_none() {
        println!("nccl is left out: its double is not built; `cargo test --workspace` builds it");
    }
    (1..=3).for_each(|world_size| drop(run("carriers", world_size)));
}

pub fn rank_carriers(world: &mut World) {
    for model in [TIED, UNTIED] {
        let job = Job { accumulation: 2, ..Job::new(model) };
        for job in [job, Job { num_replicas: world.size, ..job }, Job { prefetch: 2, recompute: false, ..job }] {
            world.carrier = Carrier::Shm;
            let expected = job.train(world, STEPS);
            for carrier in [Carrier::Staged, Carrier::NcclDouble] {
                if carrier == Carrier::NcclDouble && nccl_double().is_none() {
                    continue;
                }
                world.carrier = carrier;
                let got = job.train(world, STEPS);
                assert!(distance(&got.losses, &expected.losses) < 1e-6, "{carrier:?}: {got:?} {expected:?}");
                assert!(distance(&got.norms, &expected.norms) < 1e-5, "{carrier:?}: {got:?} {expected:?}");
                let (a, b): (Vec<f64>, Vec<f64>) =
                    got.params.iter().zip(&expected.params).map(|(a, b)| (f64::from(*a), f64::from(*b))).unzip();
                assert!(distance(&a, &b) < 1e-5, "{carrier:?}");
            }
        }
    }
}

/// Steps may be started before the last one's verdict is read. Where one was not finite, none of them changes anything.
#[test]
fn steps_may_be_started_ahead_of_the_verdict() {
    (1..=2).for_each(|world_size| drop(run("ahead", world_size)));
}

pub fn rank_ahead(world: &mut World) {
    let job = Job::new(UNTIED);
    let expected = job.train(world, STEPS);
    let mut engine = job.engine(world);
    let started: Vec<_> = (0..STEPS)
        .map(|step| engine.start_step(job.batches(world, step), job.lr, step == 3, Pace::default()).unwrap())
        .collect();
    let reports: Vec<_> = started.into_iter().map(|step| engine.finish_step(step).unwrap()).collect();
    assert_eq!(reports.iter().map(|r| r.loss).collect::<Vec<_>>(), expected.losses);
    assert_eq!(reports.iter().map(|r| r.stop).collect::<Vec<_>>(), [false, false, false, true, false]);
    assert_eq!(params(&mut engine), expected.params);

    // A gradient that overflows, then good ones: the bad step is named although its gradients are gone.
    let tiny_eps = UNTIED.replace("\"initializer_range\"", "\"rms_norm_eps\": 1e-45, \"initializer_range\"");
    let job = Job::new(Box::leak(tiny_eps.into_boxed_str()));
    let mut engine = job.engine(world);
    write_params(&mut engine, |piece, values| {
        if piece.name == "model.embed_tokens.weight" {
            values.iter_mut().enumerate().for_each(|(i, x)| *x = ((piece.start + i) % 5) as f32 * 1e-22);
        }
    });
    let before = params(&mut engine);
    let [bad, next] =
        [0, 1].map(|step| engine.start_step(job.batches(world, step), job.lr, false, Pace::default()).unwrap());
    match engine.finish_step(bad).unwrap_err() {
        EngineError::NonFinite(NonFinite::Gradient { unit, .. }) => assert_eq!(unit, "embed_tokens"),
        other => panic!("{other}"),
    }
    drop(next);
    assert_eq!(params(&mut engine), before);
    assert_eq!(engine.progress().unwrap().0, 0);
}

/// A traced step has every computation and collective of the program, in the right order.
#[test]
fn the_timeline_has_the_whole_program() {
    (1..=2).for_each(|world_size| drop(run("timeline", world_size)));
}

pub fn rank_timeline(world: &mut World) {
    let job = Job { accumulation: 2, ..Job::new(UNTIED) };
    let mut engine = job.engine(world);
    job.step(world, &mut engine, 0);
    assert_eq!(engine.take_timeline().unwrap(), []);
    engine.start_timeline().unwrap();
    job.step(world, &mut engine, 1);
    let spans = engine.take_timeline().unwrap();
    let units: Vec<String> = engine.plan().units.iter().map(|unit| unit.name.clone()).collect();

    assert!(spans.iter().all(|s| s.start_us >= 0.0 && s.end_us >= s.start_us), "{spans:?}");
    let of = |lane: Lane| spans.iter().filter(|s| s.lane == lane).collect::<Vec<_>>();
    let mut gathered: Vec<(f64, &str)> = of(Lane::Gather).iter().map(|s| (s.start_us, s.name.as_str())).collect();
    gathered.sort_by(|a, b| a.0.total_cmp(&b.0));
    let expected = engine.plan().training.iter().filter_map(|step| match step {
        Step::StartUnshard(u) => Some(units[*u].as_str()),
        _ => None,
    });
    assert_eq!(gathered.iter().map(|(_, name)| *name).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    let num_reduces = engine.plan().training.iter().filter(|step| matches!(step, Step::StartReduce(_))).count();
    assert_eq!(of(Lane::Reduce).len(), num_reduces);
    for name in ["forward layers.2", "backward layers.2", "loss head", "backward embed_tokens", "attention core"] {
        assert!(of(Lane::Compute).iter().any(|s| s.name == name), "{name}");
    }
    // Segments are inside of their unit, and a unit's gather ends before its forward.
    let forward = of(Lane::Compute).into_iter().find(|s| s.name == "forward layers.2").unwrap();
    let inside =
        |s: &&&fsdp::Span| s.start_us >= forward.start_us && s.end_us <= forward.end_us && s.name != forward.name;
    let segments = of(Lane::Compute);
    let segments: Vec<&str> = segments.iter().filter(inside).map(|s| s.name.as_str()).collect();
    assert_eq!(segments, ["attention input", "attention core", "rest", "down product"]);
    let gather = of(Lane::Gather).into_iter().find(|s| s.name == "layers.2").unwrap();
    assert!(gather.end_us <= forward.start_us, "{gather:?} {forward:?}");
    // It starts before the block in front of it computes: that is the overlap. (Two ranks may wait for each other.)
    let before = of(Lane::Compute).into_iter().find(|s| s.name == "forward layers.1").unwrap();
    assert!(world.size > 1 || gather.start_us <= before.start_us, "{gather:?} {before:?}");
}
