use fsdp_torch_ext::{flash_attention_cpu, flash_attention_cpu_backward, grad};
use tch::{Device, Kind, Tensor};

use crate::close::assert_close;

/// Plain attention in f64: output and logsumexp.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, hidden: &Tensor) -> (Tensor, Tensor) {
    let scores = (q.matmul(&k.transpose(-1, -2)) * scale).masked_fill(hidden, f64::NEG_INFINITY);
    (scores.softmax(-1, Kind::Double).matmul(v), scores.logsumexp([-1i64].as_slice(), false))
}

#[test]
fn flash_attention_is_attention_forward_and_backward() {
    tch::manual_seed(3);
    let (b, h, d) = (2, 3, 16);
    // (positions of q, of k, causal, with a mask, scale)
    let table = [
        (65, 65, true, false, None),
        (33, 33, true, false, Some(0.3)),
        (17, 40, false, true, None),
        (17, 40, false, false, None),
        (1, 1, true, false, None),
    ];
    // libtorch's exp is a coarser one for 16-bit inputs.
    for (kind, tolerance, lse_tolerance) in [(Kind::Float, 2e-6, 2e-6), (Kind::BFloat16, 3e-2, 2e-4)] {
        for (t, s, is_causal, masked, scale) in table {
            let what = format!("{kind:?} T {t} S {s} causal {is_causal} masked {masked}");
            // Views of [B, T, H, D], as a projection gives them.
            let draw = |n: i64| Tensor::randn([b, n, h, d], (kind, Device::Cpu)).transpose(1, 2);
            let (q, k, v, g) = (draw(t), draw(s), draw(s), draw(t));
            let hidden = if is_causal {
                Tensor::ones([t, s], (Kind::Bool, Device::Cpu)).triu(1)
            } else {
                Tensor::rand([t, s], (Kind::Float, Device::Cpu)).gt(if masked { 0.7 } else { 2.0 })
            };
            let mask =
                masked.then(|| Tensor::zeros([t, s], (kind, Device::Cpu)).masked_fill(&hidden, f64::NEG_INFINITY));

            let (out, lse) = flash_attention_cpu(&q, &k, &v, is_causal, scale, mask.as_ref()).unwrap();
            let (dq, dk, dv) =
                flash_attention_cpu_backward(&g, &q, &k, &v, &out, &lse, is_causal, mask.as_ref(), scale).unwrap();

            let exact: Vec<_> = [&q, &k, &v].iter().map(|x| x.to_kind(Kind::Double).set_requires_grad(true)).collect();
            let scale = scale.unwrap_or(1.0 / (d as f64).sqrt());
            let (out_exact, lse_exact) = plain(&exact[0], &exact[1], &exact[2], scale, &hidden);
            let g = g.to_kind(Kind::Double);
            let grads = grad(&[&out_exact], &[&exact[0], &exact[1], &exact[2]], &[&g], false, false).unwrap();
            assert_close(&out, &out_exact.detach(), tolerance, &format!("{what} out"));
            assert_close(&lse, &lse_exact.detach(), lse_tolerance, &format!("{what} logsumexp"));
            for (name, got, expected) in [("dq", dq, &grads[0]), ("dk", dk, &grads[1]), ("dv", dv, &grads[2])] {
                assert_close(&got, expected.as_ref().unwrap(), tolerance, &format!("{what} {name}"));
            }
        }
    }
}

#[test]
fn what_flash_attention_cannot_do_is_an_error() {
    let new = |size: [i64; 4], kind| Tensor::ones(size, (kind, Device::Cpu));
    let q = new([1, 2, 4, 8], Kind::Float);
    let forward = |k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal| {
        flash_attention_cpu(&q, k, v, causal, None, mask).map(drop)
    };
    let backward =
        |g: &Tensor, lse: &Tensor| flash_attention_cpu_backward(g, &q, &q, &q, &q, lse, true, None, None).map(drop);
    let (bf16, short) = (new([1, 2, 4, 8], Kind::BFloat16), new([1, 2, 3, 8], Kind::Float));
    let ids = new([1, 2, 4, 8], Kind::Int64);
    let lse = Tensor::ones([1, 2, 4], (Kind::Float, Device::Cpu));
    let table = [
        ("dtypes", forward(&bf16, &q, None, true), "BFloat16"),
        ("integers", flash_attention_cpu(&ids, &ids, &ids, true, None, None).map(drop), "type"),
        ("dimensions", forward(&q.view([2, 4, 8]), &q, None, true), "q and k: expected"),
        ("head width", forward(&new([1, 2, 4, 9], Kind::Float), &q, None, true), "q and k: expected"),
        ("number of heads", forward(&new([1, 1, 4, 8], Kind::Float), &q, None, true), "q and k: expected"),
        ("length of v", forward(&q, &short, None, true), "v: expected the shape of k"),
        (
            "mask shape",
            forward(&q, &q, Some(&Tensor::ones([4, 3], (Kind::Float, Device::Cpu))), false),
            "mask: expected",
        ),
        ("two masks", forward(&q, &q, Some(&Tensor::ones([4, 4], (Kind::Float, Device::Cpu))), true), "is_causal"),
        ("grad_out", backward(&short, &lse), "grad_out: expected the shape of q"),
        ("logsumexp", backward(&q, &lse.narrow(2, 0, 3)), "logsumexp: expected"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.contains(part), "{what}: {error}");
    }
}
