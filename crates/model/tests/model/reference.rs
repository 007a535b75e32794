//! The block in plain operations, as its authors' papers write it; and how near two tensors are.

use fsdp_plan::Architecture;
use tch::{Kind, Tensor};

/// Random numbers of one test; libtorch's own are shared by all that run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// fp32, even over an interval around zero, with standard deviation `std`.
    pub fn tensor(&mut self, shape: &[i64], std: f64) -> Tensor {
        let numbers: Vec<f64> = (0..shape.iter().product()).map(|_: i64| self.uniform() * 12f64.sqrt() * std).collect();
        Tensor::from_slice(&numbers).view(shape).to_kind(Kind::Float)
    }

    /// From -0.5 to 0.5.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    }
}

/// `norm(a - b) / norm(b)`; a `b` of next to nothing (a gradient that is zero) counts as 3.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let off = (a - &b).norm().double_value(&[]);
    let scale = b.norm().double_value(&[]);
    off / scale.max(3.0)
}

#[track_caller]
pub fn assert_near(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let off = distance(got, expected);
    assert!(off <= tolerance, "{what} is off by {off:.1e}, more than {tolerance:.0e}"); // NaN fails too
}

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let mean_square = x.square().mean_dim(-1, true, Kind::Float);
    x * (mean_square + eps).rsqrt() * weight
}

/// A block's output `[N, D]` for x `[N, D]`; parameters by the ends of their names.
pub fn block(
    arch: &Architecture,
    window: Option<usize>,
    param: &dyn Fn(&str) -> Option<Tensor>,
    x: &Tensor,
    seq_len: i64,
) -> Tensor {
    let weight = |name: &str| param(name).unwrap_or_else(|| panic!("no parameter {name}"));
    let linear = |name: &str, x: &Tensor| {
        let y = x.matmul(&weight(&format!("{name}.weight")).tr());
        match param(&format!("{name}.bias")) {
            Some(bias) => y + bias,
            None => y,
        }
    };
    let h = rms_norm(x, &weight("input_layernorm.weight"), arch.rms_norm_eps);
    // [B, heads, T, C]
    let heads = |x: Tensor, norm: Option<Tensor>| {
        let x = x.view([-1, seq_len, x.size()[1] / arch.head_dim as i64, arch.head_dim as i64]);
        let x = norm.map_or_else(|| x.shallow_clone(), |w| rms_norm(&x, &w, arch.rms_norm_eps));
        x.transpose(1, 2)
    };
    let q = rotate(&heads(linear("self_attn.q_proj", &h), param("self_attn.q_norm.weight")), arch.rope_theta);
    let k = rotate(&heads(linear("self_attn.k_proj", &h), param("self_attn.k_norm.weight")), arch.rope_theta);
    let v = heads(linear("self_attn.v_proj", &h), None);
    let group = (arch.num_heads / arch.num_kv_heads) as i64;
    let (k, v) = (k.repeat_interleave_self_int(group, 1, None), v.repeat_interleave_self_int(group, 1, None));
    let scores = q.matmul(&k.transpose(2, 3)) / (arch.head_dim as f64).sqrt();
    // Position i sees positions i - window + 1 to i.
    let seen = Tensor::ones([seq_len, seq_len], (Kind::Bool, tch::Device::Cpu)).tril(0);
    let seen = window.map_or_else(|| seen.shallow_clone(), |w| seen.triu(1 - w as i64));
    let attention = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Float);
    let attended = attention.matmul(&v).transpose(1, 2).reshape([-1, (arch.num_heads * arch.head_dim) as i64]);
    let r = x + linear("self_attn.o_proj", &attended);
    let h = rms_norm(&r, &weight("post_attention_layernorm.weight"), arch.rms_norm_eps);
    let inner = linear("mlp.gate_proj", &h).silu() * linear("mlp.up_proj", &h);
    &r + linear("mlp.down_proj", &inner)
}

/// Turns the pairs (i, i + C/2) of `[.., T, C]` by angles `t * theta^(-2i / C)`.
fn rotate(x: &Tensor, theta: f64) -> Tensor {
    let size = x.size();
    let (seq_len, half) = (size[size.len() - 2], size[size.len() - 1] / 2);
    let angle = |t: i64, i: i64| t as f64 * theta.powf(-(i as f64) / half as f64);
    let angles: Vec<f64> = (0..seq_len).flat_map(|t| (0..half).map(move |i| angle(t, i))).collect();
    let angles = Tensor::from_slice(&angles).view([seq_len, half]);
    let (cos, sin) = (angles.cos().to_kind(Kind::Float), angles.sin().to_kind(Kind::Float));
    let (a, b) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
    Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin], -1)
}
