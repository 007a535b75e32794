//! The kernels by libtorch's operations, which GPUs run, against the fused ones, on CPU.

use fsdp_torch_ext::kernels::{IGNORE_INDEX, Kernels};
use tch::{Device, Kind, Tensor, no_grad};

use crate::close::{assert_close, assert_same};
use crate::seeded;

/// A rounding or two apart.
const KINDS: [(Kind, f64); 3] = [(Kind::Float, 2e-6), (Kind::BFloat16, 1.6e-2), (Kind::Half, 2e-3)];

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn pair<T>(compute: impl Fn(Kernels) -> T) -> [T; 2] {
    [Kernels::Plain, Kernels::Fused].map(compute)
}

#[test]
fn plain_rms_norm_is_the_fused_one() {
    let _guard = seeded(41);
    for (kind, tolerance) in KINDS {
        for weight_kind in [kind, Kind::Float] {
            for (n, d) in [(1, 1), (37, 129), (300, 64)] {
                let what = format!("{kind:?} weight {weight_kind:?} [{n}, {d}]");
                let (x, w) = (randn(&[n, d], kind), randn(&[d], weight_kind));
                let [(y, rstd), (fused_y, fused_rstd)] = pair(|by| by.rms_norm(&x, &w, 1e-5).unwrap());
                assert_eq!((y.kind(), rstd.kind(), rstd.size()), (kind, Kind::Float, vec![n]), "{what}");
                assert_close(&y, &fused_y, tolerance, &what);
                assert_close(&rstd, &fused_rstd, 1e-6, &what);
            }
        }
    }
    // libtorch has the backward on GPUs alone, and must not take another way here unseen.
    let x = randn(&[2, 4], Kind::Float);
    let error = Kernels::Plain.rms_norm_backward(&x, &x, &x.get(0), &x.select(1, 0)).unwrap_err();
    assert!(error.message.contains("_fused_rms_norm_backward"), "{error}");
}

#[test]
fn plain_rope_is_the_fused_one() {
    let _guard = seeded(42);
    for (kind, tolerance) in KINDS {
        for (b, t, heads, half) in [(1, 1, 1, 1), (3, 7, 2, 5), (2, 100, 4, 32)] {
            let angles = randn(&[t, half], Kind::Float);
            let (cos, sin) = (angles.cos(), angles.sin());
            // Columns of a wider matrix.
            let x = randn(&[b * t, heads * 2 * half + 3], kind).narrow(1, 2, heads * 2 * half);
            for inverse in [false, true] {
                let [plain, fused] = pair(|by| by.rope(&x, &cos, &sin, inverse).unwrap());
                assert!(plain.kind() == kind && plain.is_contiguous());
                assert_close(&plain, &fused, tolerance, &format!("{kind:?} {b} {t} {heads} {half} {inverse}"));
            }
        }
    }
}

#[test]
fn plain_silu_mul_is_the_fused_one() {
    let _guard = seeded(43);
    for (kind, tolerance) in KINDS {
        for (n, f) in [(1, 1), (37, 129), (300, 64)] {
            let what = format!("{kind:?} [{n}, {f}]");
            let both = randn(&[n, 2 * f], kind) * 4.0;
            let (gate, up, dh) = (both.narrow(1, 0, f), both.narrow(1, f, f), randn(&[n, f], kind));
            let [h, fused] = pair(|by| by.silu_mul(&gate, &up).unwrap());
            assert_close(&h, &fused, tolerance, &what);
            let [(dgate, dup), fused] = pair(|by| by.silu_mul_backward(&dh, &gate, &up).unwrap());
            assert_close(&dgate, &fused.0, tolerance, &format!("{what} dgate"));
            assert_close(&dup, &fused.1, tolerance, &format!("{what} dup"));
        }
    }
}

#[test]
fn plain_cross_entropy_is_the_fused_one() {
    let _guard = seeded(44);
    let scale = 1.0 / 64.0;
    for (kind, _) in KINDS {
        // The last one has more logits than are in f32 at a time.
        for (n, v) in [(1, 1), (3, 7), (37, 129), (17, 1 << 20)] {
            if (n, kind) == (17, Kind::Half) {
                continue;
            }
            let what = format!("{kind:?} [{n}, {v}]");
            let logits = randn(&[n, v], kind) * 5.0;
            let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
            let _ = targets.narrow(0, 0, n / 3).fill_(IGNORE_INDEX);
            let [(plain, loss), (fused, fused_loss)] = pair(|by| {
                let mut logits = logits.copy();
                let loss = by.cross_entropy(&mut logits, &targets, &Tensor::from(scale)).unwrap();
                (logits, loss)
            });
            assert_eq!((loss.kind(), loss.size()), (Kind::Double, vec![]), "{what}");
            assert_close(&loss, &fused_loss, 1e-6, &what);
            let tolerance = [4e-6, 4e-3, 6e-4][KINDS.iter().position(|k| k.0 == kind).unwrap()];
            let in_units = |t: &Tensor| t.to_kind(Kind::Double) / scale;
            assert_close(&in_units(&plain), &in_units(&fused), tolerance, &format!("{what} gradient"));
            let ignored = plain.narrow(0, 0, n / 3);
            assert!(ignored.numel() == 0 || ignored.abs().max().double_value(&[]) == 0.0, "{what}");
        }
    }
    // Nothing valid; then a logit that is no number, in a row that counts.
    let mut logits = randn(&[3, 5], Kind::Float);
    let ignored = Tensor::from_slice(&[IGNORE_INDEX; 3]);
    let loss = Kernels::Plain.cross_entropy(&mut logits, &ignored, &Tensor::from(1.0)).unwrap();
    assert_same(&loss, &Tensor::from(0.0), "nothing valid");
    assert_same(&logits, &logits.zeros_like(), "nothing valid");
    let mut logits = Tensor::full([1, 5], f64::NAN, (Kind::Float, Device::Cpu));
    let loss = Kernels::Plain.cross_entropy(&mut logits, &Tensor::from_slice(&[1i64]), &Tensor::from(1.0)).unwrap();
    assert!(loss.double_value(&[]).is_nan());
}

#[test]
fn operands_that_do_not_fit_plain_kernels_are_errors() {
    let _guard = seeded(45);
    let by = Kernels::Plain;
    let f32 = |size: &[i64]| randn(size, Kind::Float);
    let (x, bf16) = (f32(&[4, 6]), randn(&[4, 6], Kind::BFloat16));
    let one = Tensor::from(1.0);
    let table = [
        ("weight", by.rms_norm(&x, &f32(&[5]), 1e-5).map(drop), "expected [6]"),
        ("weight dtype", by.rms_norm(&x, &randn(&[6], Kind::BFloat16), 1e-5).map(drop), "BFloat16"),
        ("dtype", by.rms_norm(&x.to_kind(Kind::Double), &f32(&[6]), 1e-5).map(drop), "Double"),
        ("rstd", by.rms_norm_backward(&x, &x, &f32(&[6]), &f32(&[3])).map(drop), "rstd: expected 4"),
        ("dy", by.rms_norm_backward(&bf16, &x, &f32(&[6]), &f32(&[4])).map(drop), "dy: expected"),
        ("positions", by.rope(&x, &f32(&[3, 3]), &f32(&[3, 3]), false).map(drop), "multiple of 3"),
        ("head width", by.rope(&x, &f32(&[4, 2]), &f32(&[4, 2]), false).map(drop), "width 4"),
        ("sin", by.rope(&x, &f32(&[4, 3]), &f32(&[2, 3]), false).map(drop), "cos and sin"),
        (
            "cos dtype",
            by.rope(&x, &randn(&[4, 3], Kind::Half), &f32(&[4, 3]), false).map(drop),
            "cos: expected float32",
        ),
        ("up", by.silu_mul(&x, &f32(&[1, 6])).map(drop), "[1, 6]"),
        ("dh", by.silu_mul_backward(&bf16, &x, &x).map(drop), "dh"),
        ("targets", by.cross_entropy(&mut x.copy(), &Tensor::from_slice(&[0i64]), &one).map(drop), "expected 4"),
        ("scale", by.cross_entropy(&mut x.copy(), &Tensor::from_slice(&[0i64; 4]), &f32(&[])).map(drop), "one f64"),
        ("grad", by.silu_mul(&f32(&[2, 2]).set_requires_grad(true), &f32(&[2, 2])).map(drop), "no_grad"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.contains(part), "{what}: {error}");
    }
    let h = no_grad(|| by.silu_mul(&f32(&[2, 2]).set_requires_grad(true), &f32(&[2, 2])).unwrap());
    assert!(!h.requires_grad());
}
