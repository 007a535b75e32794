//! Times the fused CPU kernels against the plain operations they replace, and two ways to compute causal attention.
//!
//! `cargo run --release -p fsdp-torch-ext --example kernels [THREADS]`

use std::time::Instant;

use fsdp_torch_ext::kernels::{
    accumulate, cross_entropy, rms_norm, rms_norm_backward, rope, silu_mul, silu_mul_backward,
};
use fsdp_torch_ext::{
    causal_attention, causal_attention_backward, flash_attention_cpu, flash_attention_cpu_backward, tune_malloc,
};
use tch::{Device, Kind, Tensor};

// Tokens, model width, hidden width, vocabulary; then sequences, heads, positions, head width.
const N: i64 = 1024;
const D: i64 = 512;
const F: i64 = 1408;
const V: i64 = 4096;
const B: i64 = 2;
const H: i64 = 8;
const T: i64 = 512;
const HEAD: i64 = 64;
const ROUNDS: usize = 25;

fn main() {
    tune_malloc();
    let threads = std::env::args().nth(1).map_or(1, |n| n.parse().expect("THREADS is a number"));
    tch::set_num_threads(threads);
    println!("N {N}, D {D}, F {F}, V {V}, {threads} thread(s); milliseconds, best of {ROUNDS}");
    tch::no_grad(|| {
        for kind in [Kind::BFloat16, Kind::Float] {
            println!("{kind:?}");
            compare_kernels(kind);
        }
        println!("causal attention, B {B}, H {H}, T {T}, head width {HEAD}, BFloat16");
        compare_attention();
    });
}

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// Fewest milliseconds of each; in turns, so that a busy moment of the machine meets both.
fn fastest<const K: usize>(mut runs: [&mut dyn FnMut(); K]) -> [f64; K] {
    let mut times = [(); K].map(|()| Vec::new());
    for _ in 0..ROUNDS {
        for (run, times) in runs.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.map(|mut t| {
        t.sort_by(f64::total_cmp);
        t[0]
    })
}

fn compare(what: &str, mut kernel: impl FnMut(), mut plain: impl FnMut()) {
    let [kernel, plain] = fastest([&mut kernel, &mut plain]);
    println!("  {what:<26} kernel {kernel:8.3}  plain {plain:8.3}  ratio {:5.1}", plain / kernel);
}

fn compare_kernels(kind: Kind) {
    let (x, dy, w) = (randn(&[N, D], kind), randn(&[N, D], kind), randn(&[D], kind));
    let mean_square = |x: &Tensor| x.square().mean_dim([-1i64].as_slice(), true, None);
    let (_, rstd) = rms_norm(&x, &w, 1e-5).unwrap();
    compare(
        "rms_norm",
        || drop(rms_norm(&x, &w, 1e-5).unwrap()),
        || {
            let wide = x.to_kind(Kind::Float);
            let rstd = (mean_square(&wide) + 1e-5).rsqrt();
            drop(&w * (wide * rstd).to_kind(kind));
        },
    );
    compare(
        "rms_norm_backward",
        || drop(rms_norm_backward(&dy, &x, &w, &rstd).unwrap()),
        || {
            let normed = x.to_kind(Kind::Float) * rstd.view([-1, 1]);
            let dw = (dy.to_kind(Kind::Float) * &normed).sum_dim_intlist([0i64].as_slice(), false, None);
            let d_normed = (&dy * &w).to_kind(Kind::Float);
            let mean = (&d_normed * &normed).mean_dim([-1i64].as_slice(), true, None);
            drop((((d_normed - normed * mean) * rstd.view([-1, 1])).to_kind(kind), dw));
        },
    );
    let angles = randn(&[T, HEAD / 2], Kind::Float);
    let (cos, sin) = (angles.cos(), angles.sin());
    let both = |t: &Tensor| Tensor::cat(&[t, t], 1).view([1, T, 1, HEAD]).to_kind(kind);
    let (cos_full, sin_full) = (both(&cos), both(&sin));
    compare(
        "rope",
        || drop(rope(&x, &cos, &sin, false).unwrap()),
        || {
            let x = x.view([B, T, H, HEAD]);
            let half = HEAD / 2;
            let rotated = Tensor::cat(&[x.narrow(3, half, half).neg(), x.narrow(3, 0, half)], 3);
            drop(&x * &cos_full + rotated * &sin_full);
        },
    );
    let [gate, up, dh] = [(); 3].map(|()| randn(&[N, F], kind));
    compare("silu_mul", || drop(silu_mul(&gate, &up).unwrap()), || drop(gate.silu() * &up));
    compare(
        "silu_mul_backward",
        || drop(silu_mul_backward(&dh, &gate, &up).unwrap()),
        || drop((&dh * gate.silu(), (&dh * &up).silu_backward(&gate))),
    );
    let targets = Tensor::randint(V, [N], (Kind::Int64, Device::Cpu));
    let logits = randn(&[N, V], kind);
    let (mut work, scale) = (logits.copy(), Tensor::from(0.01));
    compare(
        "cross_entropy (and copy)",
        || {
            work.copy_(&logits);
            let _ = cross_entropy(&mut work, &targets, &scale).unwrap();
        },
        || {
            let log_p = logits.to_kind(Kind::Float).log_softmax(-1, None);
            let loss = log_p.nll_loss(&targets) * N as f64;
            let minus = Tensor::full([N, 1], -1.0, (Kind::Float, Device::Cpu));
            let d = (log_p.exp().scatter_add(1, &targets.unsqueeze(1), &minus) * 0.01).to_kind(kind);
            drop((loss.double_value(&[]), d));
        },
    );
    let src = randn(&[3 << 20], kind);
    let mut dst = src.to_kind(Kind::Float);
    let mut dst_plain = dst.copy();
    compare("accumulate 3 Mi", || accumulate(&mut dst, &src, false).unwrap(), || drop(dst_plain.g_add_(&src)));
    compare("overwrite 3 Mi", || accumulate(&mut dst, &src, true).unwrap(), || dst_plain.copy_(&src));
    // What fusing a residual addition into rms_norm could save at most.
    let [add] = fastest([&mut || drop(&x + &dy)]);
    println!("  plain addition of [N, D]   {add:8.3}");
}

fn compare_attention() {
    let kind = Kind::BFloat16;
    // Views of [B, T, H, HEAD], as the projections give them.
    let [q, k, v, g] = [(); 4].map(|()| randn(&[B, T, H, HEAD], kind).transpose(1, 2));
    let (out, lse) = flash_attention_cpu(&q, &k, &v, true, None, None).unwrap();
    let times = fastest([&mut || drop(flash_attention_cpu(&q, &k, &v, true, None, None).unwrap()), &mut || {
        drop(flash_attention_cpu_backward(&g, &q, &k, &v, &out, &lse, true, None, None).unwrap())
    }]);
    println!(
        "  flash                  forward {:8.3}  backward {:8.3}  sum {:8.3}",
        times[0],
        times[1],
        times[0] + times[1]
    );
    let scale = (HEAD as f64).powf(-0.5);
    let (out, lse) = causal_attention(&q, &k, &v, scale, None).unwrap();
    let times = fastest([&mut || drop(causal_attention(&q, &k, &v, scale, None).unwrap()), &mut || {
        drop(causal_attention_backward(&g, &q, &k, &v, &out, &lse, scale, None).unwrap())
    }]);
    println!(
        "  causal_attention       forward {:8.3}  backward {:8.3}  sum {:8.3}",
        times[0],
        times[1],
        times[0] + times[1]
    );
    for block in [64, 128, 256, 512] {
        let [q, k, v, g] = [&q, &k, &v, &g].map(|t| t.reshape([B * H, T, HEAD]));
        let out = blocked_forward(&q, &k, &v, block);
        let times = fastest([&mut || drop(blocked_forward(&q, &k, &v, block)), &mut || {
            drop(blocked_backward(&g, &q, &k, &v, &out, block))
        }]);
        println!(
            "  products, {block:>3} queries  forward {:8.3}  backward {:8.3}  sum {:8.3}",
            times[0],
            times[1],
            times[0] + times[1]
        );
    }
}

/// Probabilities of the queries from `start` on, over the keys they may see: products in bf16, softmax in f32.
fn probabilities(q: &Tensor, k: &Tensor, start: i64, block: i64) -> Tensor {
    let seen = start + block;
    let scores = q.narrow(1, start, block).bmm(&k.narrow(1, 0, seen).transpose(1, 2)).to_kind(Kind::Float);
    let mask = Tensor::full([block, seen], f64::NEG_INFINITY, (Kind::Float, Device::Cpu)).triu(start + 1);
    (scores * (HEAD as f64).powf(-0.5) + mask).softmax(-1, None)
}

fn blocked_forward(q: &Tensor, k: &Tensor, v: &Tensor, block: i64) -> Tensor {
    let blocks: Vec<_> = (0..T / block)
        .map(|i| {
            let p = probabilities(q, k, i * block, block).to_kind(q.kind());
            p.bmm(&v.narrow(1, 0, (i + 1) * block))
        })
        .collect();
    Tensor::cat(&blocks, 1)
}

fn blocked_backward(g: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, out: &Tensor, block: i64) -> [Tensor; 3] {
    let scale = (HEAD as f64).powf(-0.5);
    let [dq, dk, dv] = [(); 3].map(|()| Tensor::zeros_like(q).to_kind(Kind::Float));
    for i in 0..T / block {
        let (start, seen) = (i * block, (i + 1) * block);
        let p = probabilities(q, k, start, block);
        let rows = |t: &Tensor| t.narrow(1, start, block);
        let dp = rows(g).bmm(&v.narrow(1, 0, seen).transpose(1, 2)).to_kind(Kind::Float);
        let dot = (rows(g).to_kind(Kind::Float) * rows(out).to_kind(Kind::Float)).sum_dim_intlist(
            [-1i64].as_slice(),
            true,
            None,
        );
        let ds = ((dp - dot) * &p * scale).to_kind(q.kind());
        let _ = dv.narrow(1, 0, seen).g_add_(&p.to_kind(q.kind()).transpose(1, 2).bmm(&rows(g)));
        rows(&dq).copy_(&ds.bmm(&k.narrow(1, 0, seen)));
        let _ = dk.narrow(1, 0, seen).g_add_(&ds.transpose(1, 2).bmm(&rows(q)));
    }
    [dq, dk, dv].map(|t| t.to_kind(q.kind()))
}
