use fsdp_torch_ext::{
    causal_attention, causal_attention_backward, flash_attention_cpu, flash_attention_cpu_backward, grad,
};
use tch::{Device, Kind, Tensor};

use crate::close::{assert_close, assert_same};
use crate::seeded;

/// Plain attention in f64: output and logsumexp.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, hidden: &Tensor) -> (Tensor, Tensor) {
    let scores = (q.matmul(&k.transpose(-1, -2)) * scale).masked_fill(hidden, f64::NEG_INFINITY);
    (scores.softmax(-1, Kind::Double).matmul(v), scores.logsumexp([-1i64].as_slice(), false))
}

#[test]
fn flash_attention_is_attention_forward_and_backward() {
    let _guard = seeded(11);
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
    for (kind, tolerance, lse_tolerance) in [(Kind::Float, 4e-6, 2e-6), (Kind::BFloat16, 3e-2, 2e-4)] {
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
fn causal_attention_is_attention_forward_and_backward() {
    let _guard = seeded(12);
    // (query heads, key heads, positions, head width, window)
    let table = [
        (2, 2, 1, 16, None),
        (4, 2, 63, 8, None),
        (4, 1, 64, 64, None),
        (3, 3, 65, 34, None),
        (2, 1, 200, 32, None),
        (2, 1, 200, 32, Some(1)),
        (2, 2, 200, 32, Some(50)),
        (2, 2, 200, 32, Some(64)),
        (2, 2, 129, 32, Some(1000)),
    ];
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        for (heads, key_heads, t, d, window) in table {
            let what = format!("{kind:?} heads {heads} {key_heads} T {t} D {d} window {window:?}");
            // Slices of one [B, T, heads, D], as a fused projection gives them.
            let all = Tensor::randn([2, t, heads + 2 * key_heads, d], (kind, Device::Cpu)).transpose(1, 2);
            let q = all.narrow(1, 0, heads);
            let [k, v] = [0, 1].map(|i| all.narrow(1, heads + i * key_heads, key_heads));
            let g = Tensor::randn([2, heads, t, d], (kind, Device::Cpu));
            let scale = 0.2;
            let [one, two] = [1, 2].map(|threads| {
                tch::set_num_threads(threads);
                let (out, lse) = causal_attention(&q, &k, &v, scale, window).unwrap();
                let (dq, dk, dv) = causal_attention_backward(&g, &q, &k, &v, &out, &lse, scale, window).unwrap();
                [out, lse, dq, dk, dv]
            });

            let exact: Vec<_> = [&q, &k, &v].iter().map(|x| x.to_kind(Kind::Double).set_requires_grad(true)).collect();
            let repeat = |t: &Tensor| t.repeat_interleave_self_int(heads / key_heads, 1, None);
            let near = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(0).triu(1 - window.unwrap_or(t));
            let (out, lse) = plain(&exact[0], &repeat(&exact[1]), &repeat(&exact[2]), scale, &near.logical_not());
            let inputs: Vec<_> = exact.iter().collect();
            let grads = grad(&[&out], &inputs, &[&g.to_kind(Kind::Double)], false, false).unwrap();
            let mut expected = vec![out.detach(), lse.detach()];
            expected.extend(grads.into_iter().flatten());
            for (i, name) in ["out", "logsumexp", "dq", "dk", "dv"].into_iter().enumerate() {
                let tolerance = if i == 1 { 4e-6 } else { tolerance };
                assert_close(&one[i], &expected[i], tolerance, &format!("{what} {name}"));
                // libtorch's backward shares out sums in another way for another number of threads.
                if kind == Kind::BFloat16 {
                    assert_same(&two[i], &one[i], &format!("{what} {name}, threads"));
                }
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
    let empty = |kind| {
        let q = new([1, 2, 4, 0], kind);
        causal_attention(&q, &q, &q, 1.0, None).map(drop)
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
        ("no keys", forward(&new([1, 2, 0, 8], Kind::Float), &new([1, 2, 0, 8], Kind::Float), None, false), "elements"),
        ("no width", empty(Kind::Float), "elements"),
        ("no width in bf16", empty(Kind::BFloat16), "elements"),
        ("strides", forward(&new([1, 2, 8, 4], Kind::Float).transpose(2, 3), &q, None, true), "contiguous last"),
        (
            "strides of grad_out",
            backward(&new([1, 1, 1, 1], Kind::Float).expand([1, 2, 4, 8], false), &lse),
            "contiguous last",
        ),
        ("length of v", forward(&q, &short, None, true), "v: expected the shape of k"),
        (
            "mask shape",
            forward(&q, &q, Some(&Tensor::ones([4, 3], (Kind::Float, Device::Cpu))), false),
            "mask: expected",
        ),
        ("two masks", forward(&q, &q, Some(&Tensor::ones([4, 4], (Kind::Float, Device::Cpu))), true), "is_causal"),
        ("grad_out", backward(&short, &lse), "grad_out: expected the shape of q"),
        ("window", causal_attention(&q, &q, &q, 1.0, Some(0)).map(drop), "at least 1"),
        ("scale", causal_attention(&q, &q, &q, -1.0, None).map(drop), "above 0"),
        ("causal heads", causal_attention(&bf16, &bf16.repeat([1, 2, 1, 1]), &bf16, 1.0, None).map(drop), "dividing H"),
        ("causal v", causal_attention(&bf16, &bf16, &bf16.narrow(2, 0, 3), 1.0, None).map(drop), "v: expected"),
        ("causal dtypes", causal_attention(&bf16, &q, &bf16, 1.0, None).map(drop), "k: expected bfloat16"),
        ("causal lse", causal_attention_backward(&bf16, &bf16, &bf16, &bf16, &bf16, &bf16, 1.0, None).map(drop), "lse"),
        ("logsumexp", backward(&q, &lse.narrow(2, 0, 3)), "logsumexp: expected"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.contains(part), "{what}: {error}");
    }
}
