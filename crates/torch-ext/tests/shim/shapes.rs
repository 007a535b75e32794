//! Random shapes, strides and offsets against plain operations: what a block, a vector or a thread leaves over.

use fsdp_torch_ext::kernels::{rms_norm, rms_norm_backward, rope, silu_mul, silu_mul_backward};
use fsdp_torch_ext::{causal_attention, causal_attention_backward, grad};
use tch::{Device, Kind, Tensor};

use crate::close::assert_close;
use crate::seeded;

/// A number from `low` to `high`.
fn draw(low: i64, high: i64) -> i64 {
    Tensor::randint_low(low, high + 1, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0])
}

fn pick<T: Copy>(from: &[T]) -> T {
    from[draw(0, from.len() as i64 - 1) as usize]
}

/// Random values [n, width]: contiguous, or columns of a wider matrix at any offset.
fn rows(n: i64, width: i64, kind: Kind) -> Tensor {
    let (before, behind) = (pick(&[0, 0, 1, 5]), pick(&[0, 3]));
    let wide = Tensor::randn([n, before + width + behind], (Kind::Float, Device::Cpu));
    wide.to_kind(kind).narrow(1, before, width)
}

fn exact(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double).set_requires_grad(true)
}

#[test]
fn row_kernels_at_random_shapes() {
    let _guard = seeded(31);
    for round in 0..80 {
        let (kind, tolerance) = pick(&[(Kind::Float, 4e-6), (Kind::BFloat16, 2e-2), (Kind::Half, 2e-3)]);
        let (n, half) = (draw(0, 70), draw(1, 40));
        let width = 2 * half * draw(1, 3);
        tch::set_num_threads(draw(1, 2) as i32);
        let what = format!("round {round}: {kind:?} [{n}, {width}]");
        let [x, y, dy] = [(); 3].map(|()| rows(n, width, kind));

        let weight = Tensor::randn([width], (Kind::Float, Device::Cpu));
        let (norm, rstd) = rms_norm(&x, &weight, 1e-5).unwrap();
        let (dx, dw) = rms_norm_backward(&dy, &x, &weight, &rstd).unwrap();
        let (x64, w64, dy64) = (exact(&x), exact(&weight), dy.to_kind(Kind::Double));
        let plain = &x64 * (x64.square().mean_dim([-1i64].as_slice(), true, None) + 1e-5).rsqrt() * &w64;
        let grads = grad(&[&plain], &[&x64, &w64], &[&dy64], false, false).unwrap();
        assert_close(&norm, &plain.detach(), tolerance, &format!("{what} norm"));
        assert_close(&dx, grads[0].as_ref().unwrap(), 2.0 * tolerance, &format!("{what} norm's dx"));
        assert_close(&dw, grads[1].as_ref().unwrap(), 9.0 * tolerance, &format!("{what} norm's dw"));

        let h = silu_mul(&x, &y).unwrap();
        let (dgate, dup) = silu_mul_backward(&dy, &x, &y).unwrap();
        let (x64, y64) = (exact(&x), exact(&y));
        let plain = x64.silu() * &y64;
        let grads = grad(&[&plain], &[&x64, &y64], &[&dy64], false, false).unwrap();
        assert_close(&h, &plain.detach(), tolerance, &format!("{what} silu"));
        assert_close(&dgate, grads[0].as_ref().unwrap(), 2.0 * tolerance, &format!("{what} dgate"));
        assert_close(&dup, grads[1].as_ref().unwrap(), 2.0 * tolerance, &format!("{what} dup"));

        let angles = Tensor::randn([n.max(1), half], (Kind::Float, Device::Cpu));
        let (cos, sin) = (angles.cos(), angles.sin());
        let turned = rope(&x, &cos, &sin, false).unwrap();
        let heads = x.to_kind(Kind::Double).reshape([n, width / (2 * half), 2, half]);
        let (a, b) = (heads.select(2, 0), heads.select(2, 1));
        let [c, s] = [&cos, &sin].map(|t| t.narrow(0, 0, n).unsqueeze(1));
        let plain = Tensor::stack(&[&a * &c - &b * &s, &b * &c + &a * &s], 2).reshape([n, width]);
        assert_close(&turned, &plain, tolerance, &format!("{what} rope"));
    }
}

#[test]
fn causal_attention_at_random_shapes() {
    let _guard = seeded(32);
    for round in 0..60 {
        let (kind, tolerance) = pick(&[(Kind::BFloat16, 3e-2), (Kind::BFloat16, 3e-2), (Kind::Float, 2e-5)]);
        let (b, g, group, d) = (draw(1, 2), draw(1, 2), draw(1, 3), pick(&[1, 2, 6, 7, 16, 33, 48, 80]));
        let t = pick(&[1, 2, 31, 63, 64, 65, 127, 128, 129, 190]);
        let window = pick(&[None, None, Some(1), Some(2), Some(63), Some(64), Some(65), Some(128), Some(i64::MAX)]);
        let scale = pick(&[0.3, 1.0 / (d as f64).sqrt()]);
        tch::set_num_threads(draw(1, 2) as i32);
        let h = g * group;
        let what = format!("round {round}: {kind:?} B {b} H {h} G {g} T {t} D {d} window {window:?} scale {scale}");
        // Any even or odd row stride and offset.
        let wide = rows(b * t, (h + 2 * g) * d, kind);
        let part = |first: i64, heads: i64| wide.narrow(1, first * d, heads * d).view([b, t, heads, d]).transpose(1, 2);
        let (q, k, v) = (part(0, h), part(h, g), part(h + g, g));
        let grad_out = Tensor::randn([b, h, t, d], (kind, Device::Cpu));

        let (out, lse) = causal_attention(&q, &k, &v, scale, window).expect(&what);
        let (dq, dk, dv) = causal_attention_backward(&grad_out, &q, &k, &v, &out, &lse, scale, window).expect(&what);

        let [q, k, v] = [q, k, v].map(|x| exact(&x));
        let repeat = |x: &Tensor| x.repeat_interleave_self_int(group, 1, None);
        let seen = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(0).triu(1 - window.unwrap_or(t).min(t));
        let scores = q.matmul(&repeat(&k).transpose(-1, -2)) * scale;
        let scores = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
        let plain = scores.softmax(-1, Kind::Double).matmul(&repeat(&v));
        let grads = grad(&[&plain], &[&q, &k, &v], &[&grad_out.to_kind(Kind::Double)], false, false).unwrap();
        assert_close(&out, &plain.detach(), tolerance, &format!("{what} out"));
        let plain_lse = scores.logsumexp([-1i64].as_slice(), false).detach();
        assert_close(&lse, &plain_lse, 2e-3, &format!("{what} logsumexp"));
        for (name, got, expected) in [("dq", dq, &grads[0]), ("dk", dk, &grads[1]), ("dv", dv, &grads[2])] {
            assert_close(&got, expected.as_ref().unwrap(), 2.0 * tolerance, &format!("{what} {name}"));
        }
    }
}
