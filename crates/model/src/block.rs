//! The transformer block, as four segments: attention input (norm, q, k, v, rotation), attention core, the rest up to
//! the MLP's inner activations, and the MLP's output product.

use fsdp_plan::Architecture;
use fsdp_torch_ext::kernels;
use tch::Tensor;

use crate::attention::{Attention, AttentionValues};
use crate::linear::{Linear, write_grad};
use crate::{BatchShape, Mark, ModelError, RopeTables, Segment, norm};

/// One block: which of its unit's parameters are what, and its sizes. Parameters and gradients are slices in the order
/// of the unit's parameters.
#[derive(Debug)]
pub struct Block {
    input_norm: usize,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Norms over each head of q and of k.
    qk_norm: Option<(usize, usize)>,
    o: Linear,
    post_norm: usize,
    gate: Linear,
    up: Linear,
    down: Linear,
    attention: Attention,
    eps: f64,
}

/// All that a block's backward reads.
#[derive(Debug)]
pub struct Activations {
    x: Tensor,          // [N, D]
    input_rstd: Tensor, // [N]
    h1: Tensor,         // [N, D]
    qk: Option<QkNorm>,
    attn: AttentionValues, // q and k rotated
    r: Tensor,             // [N, D], x + attention
    post_rstd: Tensor,     // [N]
    h2: Tensor,            // [N, D]
    gate: Tensor,          // [N, F]
    up: Tensor,            // [N, F]
}

/// q and k before their norms, and the norms' statistics.
#[derive(Debug)]
struct QkNorm {
    q: Tensor,      // [N, H*C]
    q_rstd: Tensor, // [N*H]
    k: Tensor,      // [N, K*C]
    k_rstd: Tensor, // [N*K]
}

impl Activations {
    /// Bytes of all tensors.
    pub fn num_bytes(&self) -> usize {
        let Activations { x, input_rstd, h1, qk, attn, r, post_rstd, h2, gate, up } = self;
        let AttentionValues { q, k, v, out, logsumexp } = attn;
        let always = [x, input_rstd, h1, q, k, v, out, logsumexp, r, post_rstd, h2, gate, up];
        let of_qk_norm = qk.iter().flat_map(|kept| [&kept.q, &kept.q_rstd, &kept.k, &kept.k_rstd]);
        always.into_iter().chain(of_qk_norm).map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum()
    }
}

impl Block {
    /// Block `layer` for sequences of `seq_len`.
    pub fn new(arch: &Architecture, layer: usize, seq_len: usize) -> Self {
        // Mirrors `fsdp_plan::units::block_params`.
        let mut next = 0;
        let mut one = || {
            next += 1;
            next - 1
        };
        let input_norm = one();
        let mut linear = |bias: bool| Linear { weight: one(), bias: bias.then(&mut one) };
        let (q, k, v) = (linear(arch.qkv_bias), linear(arch.qkv_bias), linear(arch.qkv_bias));
        let qk_norm = arch.qk_norm.then(|| (one(), one()));
        let mut linear = |bias: bool| Linear { weight: one(), bias: bias.then(&mut one) };
        let o = linear(arch.o_bias);
        let post_norm = one();
        let mut linear = |bias: bool| Linear { weight: one(), bias: bias.then(&mut one) };
        let (gate, up, down) = (linear(arch.mlp_bias), linear(arch.mlp_bias), linear(arch.mlp_bias));

        let attention = Attention {
            num_heads: arch.num_heads as i64,
            num_kv_heads: arch.num_kv_heads as i64,
            head_dim: arch.head_dim as i64,
            // A window that covers the whole sequence is plain causal attention.
            window: arch.sliding_windows[layer].filter(|&w| w < seq_len).map(|w| w as i64),
        };
        let eps = arch.rms_norm_eps;
        Block { input_norm, q, k, v, qk_norm, o, post_norm, gate, up, down, attention, eps }
    }

    /// `[N, D] -> [N, D]`, and what backward reads.
    pub fn forward(
        &self,
        params: &[Tensor],
        x: Tensor,
        rope: &RopeTables,
        shape: BatchShape,
        mark: Mark,
    ) -> Result<(Tensor, Activations), ModelError> {
        let kept = self.recompute(params, x, rope, shape, mark)?;
        mark(Segment::Down);
        let s = kernels::silu_mul(&kept.gate, &kept.up)?;
        let y = self.down.forward_add(params, &s, &kept.r)?;
        Ok((y, kept))
    }

    /// All segments but the last, [`Segment::Down`], whose product backward does not need.
    pub fn recompute(
        &self,
        params: &[Tensor],
        x: Tensor,
        rope: &RopeTables,
        shape: BatchShape,
        mark: Mark,
    ) -> Result<Activations, ModelError> {
        mark(Segment::AttentionInput);
        let (h1, input_rstd) = norm::forward(&x, &params[self.input_norm], self.eps)?;
        let mut q = self.q.forward(params, &h1)?;
        let mut k = self.k.forward(params, &h1)?;
        let v = self.v.forward(params, &h1)?;
        let mut qk = None;
        if let Some((q_norm, k_norm)) = self.qk_norm {
            let (q_normed, q_rstd) = self.head_norm(&q, &params[q_norm])?;
            let (k_normed, k_rstd) = self.head_norm(&k, &params[k_norm])?;
            qk = Some(QkNorm {
                q: std::mem::replace(&mut q, q_normed),
                q_rstd,
                k: std::mem::replace(&mut k, k_normed),
                k_rstd,
            });
        }
        let q = kernels::rope_owned(q, &rope.cos, &rope.sin, false)?;
        let k = kernels::rope_owned(k, &rope.cos, &rope.sin, false)?;

        mark(Segment::AttentionCore);
        let attn = self.attention.forward(q, k, v, shape)?;

        mark(Segment::Rest);
        let r = self.o.forward_add(params, &attn.out, &x)?;
        let (h2, post_rstd) = norm::forward(&r, &params[self.post_norm], self.eps)?;
        let gate = self.gate.forward(params, &h2)?;
        let up = self.up.forward(params, &h2)?;
        Ok(Activations { x, input_rstd, h1, qk, attn, r, post_rstd, h2, gate, up })
    }

    /// Writes every parameter's gradient into `grads` and returns the input's: `[N, D] -> [N, D]`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        params: &[Tensor],
        grads: &[Tensor],
        kept: Activations,
        dy: Tensor,
        rope: &RopeTables,
        shape: BatchShape,
        mark: Mark,
    ) -> Result<Tensor, ModelError> {
        let Activations { x, input_rstd, h1, qk, attn, r, post_rstd, h2, gate, up } = kept;

        mark(Segment::DownBackward);
        let s = kernels::silu_mul(&gate, &up)?;
        self.down.backward_params(params, grads, &dy, &s)?;
        drop(s);
        let ds = self.down.backward_input(params, &dy)?;

        mark(Segment::RestBackward);
        let (d_gate, d_up) = kernels::silu_mul_backward(&ds, &gate, &up)?;
        drop((ds, gate, up));
        self.gate.backward_params(params, grads, &d_gate, &h2)?;
        self.up.backward_params(params, grads, &d_up, &h2)?;
        drop(h2);
        let dh2 = self.gate.backward_input(params, &d_gate)?;
        let dh2 = self.up.backward_input_add(params, &d_up, dh2)?;
        drop((d_gate, d_up));
        let (mut dr, d_norm) = norm::backward(&dh2, &r, &params[self.post_norm], &post_rstd)?;
        write_grad(&grads[self.post_norm], &d_norm)?;
        drop((dh2, r));
        let _ = dr.f_add_(&dy)?;
        drop(dy);
        self.o.backward_params(params, grads, &dr, &attn.out)?;
        let d_attn = self.o.backward_input(params, &dr)?;

        mark(Segment::AttentionCoreBackward);
        let (dq, dk, dv) = self.attention.backward(&d_attn, &attn, shape)?;
        drop((d_attn, attn));

        mark(Segment::AttentionInputBackward);
        let mut dq = kernels::rope_owned(dq, &rope.cos, &rope.sin, true)?;
        let mut dk = kernels::rope_owned(dk, &rope.cos, &rope.sin, true)?;
        if let (Some((q_norm, k_norm)), Some(kept)) = (self.qk_norm, qk) {
            dq = self.head_norm_backward(&dq, &kept.q, &kept.q_rstd, &params[q_norm], &grads[q_norm])?;
            dk = self.head_norm_backward(&dk, &kept.k, &kept.k_rstd, &params[k_norm], &grads[k_norm])?;
        }
        self.q.backward_params(params, grads, &dq, &h1)?;
        self.k.backward_params(params, grads, &dk, &h1)?;
        self.v.backward_params(params, grads, &dv, &h1)?;
        drop(h1);
        let dh1 = self.q.backward_input(params, &dq)?;
        let dh1 = self.k.backward_input_add(params, &dk, dh1)?;
        let dh1 = self.v.backward_input_add(params, &dv, dh1)?;
        let (mut dx, d_norm) = norm::backward(&dh1, &x, &params[self.input_norm], &input_rstd)?;
        write_grad(&grads[self.input_norm], &d_norm)?;
        let _ = dx.f_add_(&dr)?;
        Ok(dx)
    }

    fn head_norm(&self, x: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
        let (y, rstd) = norm::forward(&x.f_view([-1, self.attention.head_dim])?, weight, self.eps)?;
        Ok((y.f_view_as(x)?, rstd))
    }

    fn head_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor, ModelError> {
        let rows = [-1, self.attention.head_dim];
        let (dx, d_weight) = norm::backward(&dy.f_view(rows)?, &x.f_view(rows)?, weight, rstd)?;
        write_grad(grad, &d_weight)?;
        Ok(dx.f_view_as(x)?)
    }
}
