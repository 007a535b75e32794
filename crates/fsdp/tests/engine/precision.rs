//! Dtypes by parameter do what they say, and fp16 finds a loss scale.

use fsdp::LossScaler;
use fsdp_plan::Dtype;

use crate::job::{Dtypes, Job, QWEN3, Run, TIED, UNTIED, distance, fp32, params, state_bits};
use crate::ranks::{World, run};

const STEPS: usize = 6;

#[test]
fn overrides_change_what_they_name_and_fp16_finds_its_scale() {
    (1..=2).for_each(|world_size| drop(run("precision", world_size)));
}

pub fn rank(world: &mut World) {
    for model in [TIED, QWEN3] {
        overrides(world, model);
    }
    fp16_trains_as_fp32(world);
    fp16_backs_off(world);
}

fn bf16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Bf16, Dtype::Fp32)
}

fn fp16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Fp16, Dtype::Fp32)
}

/// A rule: parameters whose names have this in them, and their dtypes.
fn norms_in_fp32(name: &str) -> (Dtype, Dtype) {
    if name.contains("norm") { fp32(name) } else { bf16(name) }
}

fn a_matrix_in_fp32(name: &str) -> (Dtype, Dtype) {
    if name.contains("layers.1.mlp.down_proj") { fp32(name) } else { bf16(name) }
}

fn ends_in_fp32(name: &str) -> (Dtype, Dtype) {
    if name.contains("layers") { bf16(name) } else { fp32(name) }
}

fn reduced_in_bf16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Bf16, Dtype::Bf16)
}

/// Every dtype that a config can ask for, side by side, fp16 among them, also where it is not the compute dtype's.
fn everything(name: &str) -> (Dtype, Dtype) {
    let all = [Dtype::Fp32, Dtype::Bf16, Dtype::Fp16];
    let number: usize = name.bytes().map(usize::from).sum();
    (all[number % 3], all[number / 3 % 3])
}

fn overrides(world: &mut World, model: &'static str) {
    let with =
        |world: &mut World, dtypes: Dtypes| Job { compute: Dtype::Bf16, dtypes, ..Job::new(model) }.train(world, STEPS);
    let exact = Job::new(model).train(world, STEPS);
    let plain = with(world, bf16);
    assert!(distance(&plain.losses, &exact.losses) < 0.02, "bf16 is near fp32: {plain:?}");
    assert_ne!(plain.losses[0], exact.losses[0], "bf16 is not fp32");
    // Ones are the same in both dtypes, and sums of gradients come after the first loss.
    for (dtypes, same_first_loss) in [
        (norms_in_fp32 as Dtypes, true),
        (reduced_in_bf16, true),
        (a_matrix_in_fp32, false),
        (ends_in_fp32, false),
        (everything, false),
    ] {
        let changed = with(world, dtypes);
        assert_eq!(changed.losses[0] == plain.losses[0], same_first_loss, "{changed:?}");
        assert_ne!(changed.losses[1..], plain.losses[1..], "it changes something");
        assert!(distance(&changed.losses, &exact.losses) < 0.02, "{changed:?}");
        assert!(distance(&changed.norms, &exact.norms) < 0.05, "{changed:?}");
        assert!(falls(&changed), "{changed:?}");
    }
    // The other way round: single tensors in bf16 among fp32.
    fn inverted(name: &str) -> (Dtype, Dtype) {
        if name.contains("norm") || name.contains("q_proj") { bf16(name) } else { fp32(name) }
    }
    let changed = Job { dtypes: inverted, ..Job::new(model) }.train(world, STEPS);
    assert!(distance(&changed.losses, &exact.losses) < 0.02, "{changed:?}");
}

fn falls(run: &Run) -> bool {
    run.losses[STEPS - 1] < run.losses[0]
}

fn fp16_trains_as_fp32(world: &mut World) {
    for model in [TIED, UNTIED] {
        let exact = Job::new(model).train(world, STEPS);
        let half = Job { compute: Dtype::Fp16, dtypes: fp16, ..Job::new(model) }.train(world, STEPS);
        assert!(distance(&half.losses, &exact.losses) < 2e-3, "{half:?} {exact:?}");
        assert!(
            distance(&half.norms, &exact.norms) < 2e-2,
            "the norm is that of unscaled gradients: {half:?} {exact:?}"
        );
    }
}

/// From a scale that is far too large, steps are skipped with the scale halved until gradients are finite.
fn fp16_backs_off(world: &mut World) {
    let job = Job { compute: Dtype::Fp16, dtypes: fp16, ..Job::new(TIED) };
    let mut engine = job.engine(world);
    let scale = 2.0f64.powi(40);
    engine.set_progress(0, Some(LossScaler { scale, good_steps: 7 })).unwrap();
    let before = state_bits(&engine);
    let mut num_skipped = 0;
    let first_loss = loop {
        let report = job.step(world, &mut engine, 0);
        if !report.overflowed {
            break report.loss;
        }
        num_skipped += 1;
        assert!(!report.grad_norm.is_finite() && report.loss.is_finite(), "{report:?}");
        assert_eq!(state_bits(&engine), before, "a skipped step changes nothing");
        let scaler = LossScaler { scale: scale / 2.0f64.powi(num_skipped), good_steps: 0 };
        assert_eq!(engine.progress().unwrap(), (0, Some(scaler)), "each skip halves the scale");
    };
    assert!((10..40).contains(&num_skipped), "{num_skipped} steps were skipped");
    assert_ne!(state_bits(&engine), before);
    // Then it trains: the run is the one that began with a fitting scale.
    let losses = [vec![first_loss], (1..STEPS).map(|step| job.step(world, &mut engine, step).loss).collect()].concat();
    assert_eq!(engine.progress().unwrap().0, STEPS as u64);
    let exact = Job::new(TIED).train(world, STEPS);
    assert!(distance(&losses, &exact.losses) < 2e-3, "{losses:?} {exact:?}");
    let (got, expected): (Vec<f64>, Vec<f64>) =
        params(&mut engine).into_iter().zip(exact.params).map(|(a, b)| (f64::from(a), f64::from(b))).unzip();
    assert!(distance(&got, &expected) < 1e-2);
}
