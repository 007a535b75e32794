//! Compares what a GPU computes with the CPU: every kernel, every way to attend, the products that add in fp32, the
//! fused optimizer. A line each: name, largest error, limit, `ok` or `FAIL`. Status 1 where one fails; without a GPU it
//! says so and ends with 0.
//!
//! `cargo run --release -p fsdp-torch-ext --example gpu_kernels`
//!
//! An error is that of an element over `max(1, |expected|)`. CPU references work on the same rounded inputs in f32 (for
//! attention f64), so limits are a rounding or two of the dtype.

use std::process::ExitCode;

use fsdp_torch_ext::kernels::{self, IGNORE_INDEX};
use fsdp_torch_ext::{
    AdamW, Event, Stream, accelerator, causal_attention, causal_attention_backward, foreach_norm, fused_adamw, grad,
    pinned,
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const GPU: Device = Device::Cuda(0);
/// With the error that two roundings to it make.
const KINDS: [(Kind, f64); 3] = [(Kind::Float, 2e-5), (Kind::BFloat16, 2e-2), (Kind::Half, 2.5e-3)];

fn main() -> ExitCode {
    match accelerator::driver_device_count() {
        Ok(0) => println!("no GPU: the driver sees none"),
        Err(error) => println!("no GPU: {}", error.message),
        Ok(_) => return compare_all(),
    }
    ExitCode::SUCCESS
}

fn compare_all() -> ExitCode {
    if let Err(error) = accelerator::load_cuda() {
        println!("{error}");
        return ExitCode::FAILURE;
    }
    match accelerator::device_info(0) {
        Ok(info) => println!("{info:?}"),
        Err(error) => println!("{error}"),
    }
    tch::manual_seed(1);
    let mut table = Table { failed: 0 };
    tch::no_grad(|| {
        for (kind, limit) in KINDS {
            norms(&mut table, kind, limit);
            rows(&mut table, kind, limit);
            losses(&mut table, kind);
            products(&mut table, kind);
        }
        optimizer(&mut table);
        streams(&mut table);
    });
    for (kind, limit) in KINDS {
        attention(&mut table, kind, limit);
    }
    ExitCode::from(u8::from(table.failed > 0))
}

struct Table {
    failed: usize,
}

impl Table {
    fn line(&mut self, name: &str, error: f64, limit: f64) {
        // NaN fails.
        let ok = error <= limit;
        self.failed += usize::from(!ok);
        println!("{name}  {error:.1e}  {limit:.1e}  {}", if ok { "ok" } else { "FAIL" });
    }

    fn compare(&mut self, name: &str, got: &Tensor, expected: &Tensor, limit: f64) {
        let (got, expected) = (got.to_device(CPU).to_kind(Kind::Double), expected.to_kind(Kind::Double));
        if got.size() != expected.size() {
            println!("{name}: size {:?}, expected {:?}", got.size(), expected.size());
            return self.line(name, f64::INFINITY, limit);
        }
        let error = ((&got - &expected).abs() / expected.abs().clamp_min(1.0)).max();
        self.line(name, error.double_value(&[]), limit);
    }

    /// What cannot be computed fails too.
    fn error(&mut self, name: &str, error: &dyn std::fmt::Display) {
        println!("{name}: {error}");
        self.line(name, f64::INFINITY, 0.0);
    }
}

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, CPU)).to_kind(kind)
}

fn gpu(t: &Tensor) -> Tensor {
    t.to_device(GPU)
}

fn norms(table: &mut Table, kind: Kind, limit: f64) {
    for weight_kind in if kind == Kind::Float { vec![kind] } else { vec![kind, Kind::Float] } {
        for (n, d) in [(37, 129), (512, 4096)] {
            let name = |what: &str| format!("rms_norm{what}/{kind:?}/weight_{weight_kind:?}/{n}x{d}");
            let (x, dy, w) = (randn(&[n, d], kind), randn(&[n, d], kind), randn(&[d], weight_kind));
            let [on_cpu, on_gpu] = [CPU, GPU].map(|device| {
                let [x, dy, w] = [&x, &dy, &w].map(|t| t.to_device(device));
                let (y, rstd) = kernels::rms_norm(&x, &w, 1e-5)?;
                let (dx, dw) = kernels::rms_norm_backward(&dy, &x, &w, &rstd)?;
                Ok::<_, fsdp_torch_ext::TorchError>([y, rstd, dx, dw])
            });
            let (cpu, gpu) = match (on_cpu, on_gpu) {
                (Ok(cpu), Ok(gpu)) => (cpu, gpu),
                (Err(error), _) | (_, Err(error)) => {
                    table.error(&name(""), &error);
                    continue;
                }
            };
            // A sum over n rows, each rounded.
            let limits = [limit, 1e-5, limit, limit * (n as f64).sqrt()];
            for (i, what) in ["", "_rstd", "_dx", "_dw"].into_iter().enumerate() {
                table.compare(&name(what), &gpu[i], &cpu[i], limits[i]);
            }
        }
    }
    let huge = Tensor::full([2, 64], 1e25, (Kind::Float, GPU));
    let w = Tensor::ones([64], (Kind::Float, GPU));
    match kernels::rms_norm(&huge, &w, 1e-5) {
        Ok((_, rstd)) => table.line(
            &format!("rms_norm_overflow_is_nan/{kind:?}"),
            1.0 - rstd.isnan().all().to_kind(Kind::Double).double_value(&[]),
            0.0,
        ),
        Err(error) => table.error("rms_norm_overflow_is_nan", &error),
    }
}

/// Kernels that need no sum over a row.
fn rows(table: &mut Table, kind: Kind, limit: f64) {
    let (b, t, heads, half, f) = (2, 65, 4, 32, 301);
    let angles = randn(&[t, half], Kind::Float);
    let (cos, sin) = (angles.cos(), angles.sin());
    let x = randn(&[b * t, heads * 2 * half], kind);
    for inverse in [false, true] {
        let name = format!("rope/{kind:?}/inverse_{inverse}");
        let expected = kernels::rope(&x, &cos, &sin, inverse).expect("on CPU");
        match kernels::rope_owned(gpu(&x), &gpu(&cos), &gpu(&sin), inverse) {
            Ok(got) => table.compare(&name, &got, &expected, limit),
            Err(error) => table.error(&name, &error),
        }
    }
    let [gate, up, dh] = [(); 3].map(|()| randn(&[77, f], kind) * 3.0);
    let both = |gate: &Tensor, up: &Tensor, dh: &Tensor| {
        let h = kernels::silu_mul(gate, up)?;
        let (dgate, dup) = kernels::silu_mul_backward(dh, gate, up)?;
        Ok::<_, fsdp_torch_ext::TorchError>([h, dgate, dup])
    };
    let expected = both(&gate, &up, &dh).expect("on CPU");
    match both(&gpu(&gate), &gpu(&up), &gpu(&dh)) {
        Ok(got) => {
            for (i, what) in ["silu_mul", "silu_mul_dgate", "silu_mul_dup"].into_iter().enumerate() {
                table.compare(&format!("{what}/{kind:?}"), &got[i], &expected[i], limit);
            }
        }
        Err(error) => table.error(&format!("silu_mul/{kind:?}"), &error),
    }
}

fn losses(table: &mut Table, kind: Kind) {
    let scale = 1.0 / 64.0;
    // The last one has more logits than are in f32 at a time.
    for (n, v) in [(37, 129), (300, 70_000)] {
        let name = |what: &str| format!("cross_entropy{what}/{kind:?}/{n}x{v}");
        let logits = randn(&[n, v], kind) * 5.0;
        let targets = Tensor::randint(v, [n], (Kind::Int64, CPU));
        let _ = targets.narrow(0, 0, n / 3).fill_(IGNORE_INDEX);
        let mut expected = logits.copy();
        let loss = kernels::cross_entropy(&mut expected, &targets, &Tensor::from(scale)).expect("on CPU");
        let mut got = gpu(&logits);
        match kernels::cross_entropy(&mut got, &gpu(&targets), &gpu(&Tensor::from(scale))) {
            Ok(got_loss) => {
                table.compare(&name(""), &got_loss, &loss, 1e-5);
                let limit = if kind == Kind::Float { 1e-5 } else { 8e-3 };
                table.compare(
                    &name("_gradient"),
                    &(got.to_kind(Kind::Double) / scale),
                    &(expected.to_kind(Kind::Double) / scale),
                    limit,
                );
            }
            Err(error) => table.error(&name(""), &error),
        }
    }
}

/// Products of 16-bit factors into an fp32 sum, as weights' gradients are made.
fn products(table: &mut Table, kind: Kind) {
    let (n, rows, columns) = (520, 130, 70);
    let (dy, x, sum) = (randn(&[n, rows], kind), randn(&[n, columns], kind), randn(&[rows, columns], Kind::Float));
    let product = dy.to_kind(Kind::Double).tr().matmul(&x.to_kind(Kind::Double));
    let (dy, x, sum_gpu) = (gpu(&dy), gpu(&x), gpu(&sum));
    let name = format!("product_added_in_fp32/{kind:?}");
    match sum_gpu.f_addmm_dtype_out(&sum_gpu, &dy.tr(), &x, Kind::Float) {
        Ok(_) => table.compare(&name, &sum_gpu, &(&product + sum.to_kind(Kind::Double)), 1e-4),
        Err(error) => table.error(&name, &error),
    }
    let name = format!("product_in_fp32/{kind:?}");
    match dy.tr().f_mm_dtype_out(&sum_gpu, &x, Kind::Float) {
        Ok(_) => table.compare(&name, &sum_gpu, &product, 1e-4),
        Err(error) => table.error(&name, &error),
    }
}

fn attention(table: &mut Table, kind: Kind, limit: f64) {
    // Batch, query heads, key heads, positions, head width, window.
    let shapes = [
        (2, 4, 4, 64, 64, None),
        (2, 4, 2, 130, 128, None),
        (1, 8, 1, 257, 80, None),
        (2, 2, 1, 200, 256, None),
        (2, 4, 2, 200, 64, Some(1)),
        (2, 4, 2, 200, 64, Some(50)),
        (2, 4, 2, 200, 64, Some(128)),
        (2, 4, 2, 200, 64, Some(1000)),
        (2, 4, 2, 1, 64, None),
        (2, 4, 2, 65, 20, None),
        (2, 4, 2, 65, 20, Some(17)),
        (1, 2, 1, 65, 7, None),
    ];
    for (b, h, g, t, d, window) in shapes {
        let name = |what: &str| format!("attention{what}/{kind:?}/B{b}_H{h}_G{g}_T{t}_D{d}_W{}", window.unwrap_or(0));
        let draw = |heads: i64| randn(&[b, t, heads, d], kind).transpose(1, 2);
        let (q, k, v, grad_out) = (draw(h), draw(g), draw(g), draw(h));
        let scale = (d as f64).powf(-0.5);
        let on_gpu = tch::no_grad(|| {
            let [q, k, v, grad_out] = [&q, &k, &v, &grad_out].map(gpu);
            let (out, lse) = causal_attention(&q, &k, &v, scale, window)?;
            let (dq, dk, dv) = causal_attention_backward(&grad_out, &q, &k, &v, &out, &lse, scale, window)?;
            Ok::<_, fsdp_torch_ext::TorchError>([out, dq, dk, dv])
        });
        let got = match on_gpu {
            Ok(got) => got,
            Err(error) => {
                table.error(&name(""), &error);
                continue;
            }
        };
        let exact: Vec<_> = [&q, &k, &v].iter().map(|x| x.to_kind(Kind::Double).set_requires_grad(true)).collect();
        let repeat = |x: &Tensor| x.repeat_interleave_self_int(h / g, 1, None);
        let seen = Tensor::ones([t, t], (Kind::Bool, CPU)).tril(0).triu(1 - window.unwrap_or(t).min(t));
        let scores = exact[0].matmul(&repeat(&exact[1]).transpose(-1, -2)) * scale;
        let weights = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Double);
        let out = weights.matmul(&repeat(&exact[2]));
        let inputs: Vec<_> = exact.iter().collect();
        let grads = grad(&[&out], &inputs, &[&grad_out.to_kind(Kind::Double)], false, false).expect("on CPU");
        table.compare(&name(""), &got[0], &out.detach(), limit);
        for (i, what) in ["_dq", "_dk", "_dv"].into_iter().enumerate() {
            let expected = grads[i].as_ref().expect("all inputs are used");
            // Key heads' gradients are summed from rounded ones.
            table.compare(&name(what), &got[i + 1], expected, 3.0 * limit);
        }
    }
}

fn optimizer(table: &mut Table) {
    let hp = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let [param, grad] = [(); 2].map(|()| randn(&[1001], Kind::Float));
    for inf in [0f32, 1.0] {
        let [expected, got] = [CPU, GPU].map(|device| {
            let to = |t: &Tensor| t.to_device(device).copy();
            let state = [to(&param), to(&grad), to(&param.zeros_like()), to(&param.zeros_like())];
            let [step, found_inf] = [1f32, inf].map(|x| Tensor::from(x).to_device(device));
            let [p, g, m, v] = state.each_ref();
            fused_adamw(&[p], &[g], &[m], &[v], &[&step], &hp, None, &found_inf).map(|()| p.shallow_clone())
        });
        let name = format!("fused_adamw/found_inf_{inf}");
        match got {
            Ok(got) => table.compare(&name, &got, &expected.expect("on CPU"), 1e-6),
            Err(error) => table.error(&name, &error),
        }
    }
    match foreach_norm(&[&gpu(&param), &gpu(&grad)]) {
        Ok(norms) => table.compare("foreach_norm", &norms[1], &foreach_norm(&[&grad]).expect("on CPU")[0], 1e-5),
        Err(error) => table.error("foreach_norm", &error),
    }
}

/// A copy from pinned memory on a stream of its own, an event between it and the product that reads it.
fn streams(table: &mut Table) {
    let mut run = || -> Result<(), fsdp_torch_ext::TorchError> {
        let compute = Stream::current(GPU)?;
        let copies = Stream::new_from_pool(GPU, true)?;
        let source = randn(&[1 << 20], Kind::Float);
        let mut host = pinned::empty(&[1 << 20], Kind::Float)?;
        table.line("pinned_memory", f64::from(u8::from(!host.is_pinned(GPU))), 0.0);
        pinned::copy_non_blocking(&mut host, &source)?;
        let mut device = Tensor::zeros([1 << 20], (Kind::Float, GPU));
        let [mut start, mut end] = [Event::with_timing(GPU)?, Event::with_timing(GPU)?];
        start.record(&compute)?;
        copies.wait(&start)?;
        {
            let _guard = copies.enter()?;
            pinned::copy_non_blocking(&mut device, &host)?;
            end.record(&copies)?;
        }
        compute.wait(&end)?;
        let doubled = &device * 2.0;
        table.compare("copy_on_a_stream", &doubled, &(source * 2.0), 0.0);
        end.synchronize()?;
        let ms = start.elapsed_ms(&end)?;
        table.line("event_time_ms", if ms > 0.0 && ms < 1e3 { 0.0 } else { ms.abs().max(1.0) }, 0.0);
        accelerator::reset_peak_memory(GPU)?;
        let stats = accelerator::memory_stats(GPU)?;
        table.line("memory_stats", f64::from(u8::from(stats.allocated_bytes < 8 << 20)), 0.0);
        Ok(())
    };
    if let Err(error) = run() {
        table.error("streams", &error);
    }
}
