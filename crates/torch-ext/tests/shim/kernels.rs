//! Each kernel against the plain operations: in f64 for f32, and in the order and rounding of `transformers` for bf16.

use fsdp_torch_ext::grad;
use fsdp_torch_ext::kernels::{
    IGNORE_INDEX, accumulate, cross_entropy, rms_norm, rms_norm_backward, rope, rope_, silu_mul, silu_mul_backward,
};
use tch::{Device, Kind, Tensor, no_grad};

use crate::close::{assert_close, assert_same};
use crate::seeded;

const KINDS: [(Kind, f64); 3] = [(Kind::Float, 3e-6), (Kind::BFloat16, 1.2e-2), (Kind::Half, 1.5e-3)];
/// Rows and columns: odd ones, and enough to be shared out between threads.
const SIZES: [(i64, i64); 4] = [(1, 1), (3, 7), (37, 129), (2050, 64)];

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn one() -> Tensor {
    Tensor::from(1.0)
}

fn exact(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double).set_requires_grad(true)
}

/// Runs `compute` with one thread and with two, and asserts the same bits.
fn same_for_any_threads(compute: impl Fn() -> Vec<Tensor>, what: &str) -> Vec<Tensor> {
    let [one, two] = [1, 2].map(|n| {
        tch::set_num_threads(n);
        compute()
    });
    for (one, two) in one.iter().zip(&two) {
        assert_same(two, one, what);
    }
    one
}

#[test]
fn rms_norm_is_transformers_norm_and_its_gradient() {
    let _guard = seeded(15);
    for (kind, tolerance) in KINDS {
        for weight_kind in [kind, Kind::Float] {
            for (n, d) in SIZES {
                let what = format!("rms_norm {kind:?} weight {weight_kind:?} [{n}, {d}]");
                let (x, dy, eps) = (randn(&[n, d], kind), randn(&[n, d], kind), 1e-5);
                let w = randn(&[d], Kind::Float).to_kind(weight_kind);
                let out = same_for_any_threads(
                    || {
                        let (y, rstd) = rms_norm(&x, &w, eps).unwrap();
                        let (dx, dw) = rms_norm_backward(&dy, &x, &w, &rstd).unwrap();
                        vec![y, rstd, dx, dw]
                    },
                    &what,
                );
                assert_eq!([out[0].kind(), out[2].kind(), out[3].kind()], [kind, kind, Kind::Float]);

                let (x64, w64) = (exact(&x), exact(&w));
                let rstd = (x64.square().mean_dim([-1i64].as_slice(), true, None) + eps).rsqrt();
                let y = &x64 * &rstd * &w64;
                let grads = grad(&[&y], &[&x64, &w64], &[&dy.to_kind(Kind::Double)], false, false).unwrap();
                assert_close(&out[0], &y.detach(), tolerance, &format!("{what} y"));
                assert_close(&out[1], &rstd.detach().view([-1]), 1e-6, &format!("{what} rstd"));
                assert_close(&out[2], grads[0].as_ref().unwrap(), tolerance, &format!("{what} dx"));
                // A sum of n terms, each with a rounding of the normed value.
                let growth = (n as f64).sqrt();
                assert_close(&out[3], grads[1].as_ref().unwrap(), tolerance * growth, &format!("{what} dw"));

                if kind == weight_kind {
                    let normed = x.to_kind(Kind::Float);
                    let rstd = (normed.square().mean_dim([-1i64].as_slice(), true, None) + eps).rsqrt();
                    assert_mostly_same(&out[0], &(&w * (normed * rstd).to_kind(kind)), &what);
                }
            }
        }
    }
}

#[test]
fn a_mean_square_that_overflows_gives_nan_and_not_zero() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = Tensor::full([2, 8], 1.0, (kind, Device::Cpu));
        let _ = x.get(1).get(3).fill_(1e25);
        let (y, rstd) = rms_norm(&x, &Tensor::ones([8], (kind, Device::Cpu)), 1e-5).unwrap();
        assert!(rstd.double_value(&[1]).is_nan() && y.get(1).isnan().all().int64_value(&[]) == 1, "{kind:?}: {y:?}");
        assert!(y.get(0).isfinite().all().int64_value(&[]) == 1, "{kind:?}: the other row");
    }
}

/// Asserts that at most 1 % of the elements differ at all: f32 intermediates may differ in the last bit, and so the
/// rounded results where they fall on an edge.
fn assert_mostly_same(actual: &Tensor, expected: &Tensor, what: &str) {
    if actual.kind() != Kind::Float {
        let differ = actual.ne_tensor(expected).sum(Kind::Int64).int64_value(&[]);
        assert!(differ as f64 <= 0.01 * actual.numel() as f64, "{what}: {differ} of {} differ", actual.numel());
    }
}

#[test]
fn rope_rotates_pairs_of_halves_and_back() {
    let _guard = seeded(16);
    let (b, heads, half) = (3, 2, 5);
    for (kind, tolerance) in KINDS {
        for t in [1, 7, 400] {
            let what = format!("rope {kind:?} T {t}");
            let angles = randn(&[t, half], Kind::Float);
            let (cos, sin) = (angles.cos(), angles.sin());
            let x = randn(&[b * t, heads * 2 * half], kind);
            let y = same_for_any_threads(|| vec![rope(&x, &cos, &sin, false).unwrap()], &what).remove(0);

            let x64 = x.to_kind(Kind::Double).view([b, t, heads, 2 * half]);
            let (first, second) = (x64.narrow(3, 0, half), x64.narrow(3, half, half));
            let (c, s) = (cos.view([t, 1, half]), sin.view([t, 1, half]));
            let expected = Tensor::cat(&[&first * &c - &second * &s, &second * &c + &first * &s], 3);
            assert_close(&y, &expected.view([b * t, -1]), tolerance, &what);

            let back = rope(&y, &cos, &sin, true).unwrap();
            assert_close(&back, &x, 2.0 * tolerance, &format!("{what} inverse"));
            let mut in_place = x.copy();
            rope_(&mut in_place, &cos, &sin, false).unwrap();
            assert_same(&in_place, &y, &format!("{what} in place"));
            // Columns of a wider matrix, as of a fused projection of q, k and v.
            let wide = Tensor::cat(&[&x, &x], 1);
            assert_same(&rope(&wide.narrow(1, 20, 20), &cos, &sin, false).unwrap(), &y, "columns");
            rope_(&mut wide.narrow(1, 20, 20), &cos, &sin, false).unwrap();
            assert_same(&wide, &Tensor::cat(&[&x, &y], 1), "columns in place");
        }
    }
}

#[test]
fn silu_mul_is_the_gated_product_and_its_gradient() {
    let _guard = seeded(17);
    for (kind, tolerance) in KINDS {
        for (n, f) in SIZES {
            let what = format!("silu_mul {kind:?} [{n}, {f}]");
            // Gate and up as the halves of one matrix; large values saturate the sigmoid.
            let both = randn(&[n, 2 * f], kind) * 4.0;
            let (gate, up, dh) = (both.narrow(1, 0, f), both.narrow(1, f, f), randn(&[n, f], kind));
            let out = same_for_any_threads(
                || {
                    let (dgate, dup) = silu_mul_backward(&dh, &gate, &up).unwrap();
                    vec![silu_mul(&gate, &up).unwrap(), dgate, dup]
                },
                &what,
            );
            let (gate64, up64) = (exact(&gate), exact(&up));
            let h = gate64.silu() * &up64;
            let grads = grad(&[&h], &[&gate64, &up64], &[&dh.to_kind(Kind::Double)], false, false).unwrap();
            assert_close(&out[0], &h.detach(), tolerance, &format!("{what} h"));
            assert_close(&out[1], grads[0].as_ref().unwrap(), tolerance, &format!("{what} dgate"));
            assert_close(&out[2], grads[1].as_ref().unwrap(), tolerance, &format!("{what} dup"));
            assert_mostly_same(&out[0], &(gate.silu() * &up), &what);
        }
    }
    let extreme = Tensor::from_slice(&[-3e38f32, -200.0, -88.0, 88.0, 200.0, 1e30, f32::NAN]);
    let h = silu_mul(&extreme, &extreme.ones_like()).unwrap();
    assert_close(&h.narrow(0, 0, 6), &extreme.silu().narrow(0, 0, 6), 1e-6, "saturated");
    assert!(h.double_value(&[6]).is_nan());
}

#[test]
fn cross_entropy_gives_the_loss_and_leaves_its_gradient() {
    let _guard = seeded(18);
    let scale = 1.0 / 64.0;
    for (kind, _) in KINDS {
        for (n, v) in [(1, 1), (3, 7), (37, 129), (200, 4096)] {
            let what = format!("cross_entropy {kind:?} [{n}, {v}]");
            let logits = randn(&[n, v], kind) * 5.0;
            let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
            let _ = targets.narrow(0, 0, n / 3).fill_(IGNORE_INDEX);
            let out = same_for_any_threads(
                || {
                    let mut logits = logits.copy();
                    let loss = cross_entropy(&mut logits, &targets, &Tensor::from(scale)).unwrap();
                    vec![logits, loss]
                },
                &what,
            );
            let exact = exact(&logits);
            let loss = exact.cross_entropy_loss(&targets, None::<Tensor>, tch::Reduction::Sum, IGNORE_INDEX, 0.0);
            let grads = grad(&[&loss], &[&exact], &[&Tensor::from(scale)], false, false).unwrap();
            assert_close(&out[1], &loss.detach(), 1e-6, &what);
            // Gradients lie within the scale: compare them in its unit.
            let expected = grads[0].as_ref().unwrap() / scale;
            let tolerance = [4e-6, 4e-3, 6e-4][KINDS.iter().position(|k| k.0 == kind).unwrap()];
            assert_close(&(out[0].to_kind(Kind::Double) / scale), &expected, tolerance, &format!("{what} gradient"));
            let ignored = out[0].narrow(0, 0, n / 3);
            assert!(ignored.numel() == 0 || ignored.abs().max().double_value(&[]) == 0.0);
        }
    }
}

/// `exp` as the softmax of two logits sees it, over its whole range.
#[test]
fn exp_is_accurate_to_float_precision() {
    let x = Tensor::linspace(-87.0, 0.0, 1 << 20, (Kind::Float, Device::Cpu));
    // softmax([0, x])[1] = e / (1 + e), and e / (1 + e) / (1 - e / (1 + e)) = e.
    let mut logits = Tensor::stack(&[x.zeros_like(), x.copy()], 1);
    let targets = x.zeros_like().to_kind(Kind::Int64);
    let _ = cross_entropy(&mut logits, &targets, &one()).unwrap();
    let p = logits.select(1, 1).to_kind(Kind::Double);
    let e = x.to_kind(Kind::Double).exp();
    let relative = ((p / (&e / (&e + 1.0))) - 1.0).abs().max().double_value(&[]);
    println!("largest relative error of exp(x - max) / sum: {relative:e}");
    assert!(relative < 3e-7, "{relative:e}");
}

#[test]
fn a_logit_that_is_not_finite_shows_in_the_loss() {
    let _guard = seeded(19);
    for kind in [Kind::Float, Kind::BFloat16] {
        for (bad, finite) in [(f64::NAN, false), (f64::INFINITY, false), (f64::NEG_INFINITY, true)] {
            let mut logits = randn(&[2, 50], kind);
            let _ = logits.get(1).get(17).fill_(bad);
            let expected = logits.to_kind(Kind::Double).softmax(-1, None);
            let loss = cross_entropy(&mut logits, &Tensor::from_slice(&[1i64, 2]), &one()).unwrap().double_value(&[]);
            assert_eq!(loss.is_finite(), finite, "{bad} gives {loss}");
            if finite {
                assert_close(&logits.get(1).get(17), &expected.get(1).get(17), 1e-30, "no weight");
            }
        }
    }
}

#[test]
fn accumulate_adds_or_overwrites() {
    let _guard = seeded(20);
    for (kind, _) in KINDS {
        for n in [0, 1, 1000, 100_003] {
            let (dst, src) = (randn(&[n], Kind::Float), randn(&[n], kind));
            for overwrite in [false, true] {
                let what = format!("accumulate {kind:?} {n} overwrite {overwrite}");
                let run = || {
                    let mut sum = dst.copy();
                    accumulate(&mut sum, &src, overwrite).unwrap();
                    vec![sum]
                };
                let sum = same_for_any_threads(run, &what).remove(0);
                let expected = if overwrite { src.to_kind(Kind::Float) } else { &dst + src.to_kind(Kind::Float) };
                assert_same(&sum, &expected, &what);
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let _guard = seeded(21);
    let f32 = |size: &[i64]| randn(size, Kind::Float);
    let x = f32(&[4, 6]);
    let ids = |values: &[i64]| Tensor::from_slice(values);
    let bf16 = randn(&[4, 6], Kind::BFloat16);
    let w = f32(&[6]);
    let table = [
        ("weight", rms_norm(&x, &f32(&[5]), 1e-5).map(drop), "expected [6]"),
        ("weight dtype", rms_norm(&x, &randn(&[6], Kind::BFloat16), 1e-5).map(drop), "BFloat16"),
        ("dtype", rms_norm(&x.to_kind(Kind::Double), &w, 1e-5).map(drop), "Double"),
        ("transposed", rms_norm(&f32(&[6, 4]).transpose(0, 1), &w, 1e-5).map(drop), "strides"),
        ("undefined", rms_norm(&Tensor::new(), &w, 1e-5).map(drop), "undefined"),
        ("scalar", silu_mul(&f32(&[]), &f32(&[])).map(drop), "dimension"),
        ("rstd", rms_norm_backward(&x, &x, &w, &f32(&[3])).map(drop), "rstd: expected 4"),
        ("dy", rms_norm_backward(&bf16, &x, &w, &f32(&[4])).map(drop), "dy: expected"),
        ("positions", rope(&x, &f32(&[3, 3]), &f32(&[3, 3]), false).map(drop), "multiple of 3"),
        ("head width", rope(&x, &f32(&[4, 2]), &f32(&[4, 2]), false).map(drop), "width 4"),
        ("sin", rope(&x, &f32(&[4, 3]), &f32(&[2, 3]), false).map(drop), "cos and sin"),
        ("up", silu_mul(&x, &f32(&[4, 5])).map(drop), "[4, 5]"),
        ("dh", silu_mul_backward(&bf16, &x, &x).map(drop), "dh"),
        ("targets", cross_entropy(&mut x.copy(), &ids(&[0, 1]), &one()).map(drop), "expected 4"),
        ("target", cross_entropy(&mut x.copy(), &ids(&[0, 1, 6, 0]), &one()).map(drop), "got 6 in row 2"),
        ("negative", cross_entropy(&mut x.copy(), &ids(&[-1, 1, 5, 0]), &one()).map(drop), "got -1 in row 0"),
        ("scale", cross_entropy(&mut x.copy(), &ids(&[0, 1, 5, 0]), &f32(&[])).map(drop), "one f64"),
        ("dst", accumulate(&mut bf16.copy(), &x, true), "dst"),
        ("numbers", accumulate(&mut f32(&[5]), &x, true), "number of elements"),
        ("grad", silu_mul(&f32(&[2, 2]).set_requires_grad(true), &f32(&[2, 2])).map(drop), "no_grad"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.contains(part), "{what}: {error}");
    }
    let _ = no_grad(|| silu_mul(&f32(&[2, 2]).set_requires_grad(true), &f32(&[2, 2])).unwrap());
}
