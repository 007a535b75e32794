//! Causal attention over `[N, heads * C]` activations, by libtorch's flash kernel for CPUs.

use fsdp_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::{BatchShape, ModelError};

/// Sizes of one block's attention.
#[derive(Debug)]
pub struct Attention {
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    /// Additive mask `[T, T]` of a sliding window; without one the kernel's own causal mask is used.
    pub mask: Option<Tensor>,
}

/// Additive mask that lets position i see the `window` positions that end with itself: `[T, T]`, 0 or -inf.
pub fn sliding_window_mask(seq_len: i64, window: i64, kind: Kind) -> Result<Tensor, ModelError> {
    let seen = Tensor::f_ones([seq_len, seq_len], (Kind::Bool, Device::Cpu))?.f_tril(0)?.f_triu(1 - window)?;
    let mask = Tensor::f_zeros([seq_len, seq_len], (Kind::Float, Device::Cpu))?;
    Ok(mask.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?.f_to_kind(kind)?)
}

impl Attention {
    /// q `[N, H*C]`, k and v `[N, K*C]` -> output `[N, H*C]` and logsumexp `[B, H, T]`.
    pub fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: BatchShape,
    ) -> Result<(Tensor, Tensor), ModelError> {
        let (q, k, v) = (self.heads(q, shape)?, self.kv_heads(k, shape)?, self.kv_heads(v, shape)?);
        let (out, logsumexp) = ext::flash_attention_cpu(&q, &k, &v, self.mask.is_none(), None, self.mask.as_ref())?;
        Ok((self.tokens(&out, shape)?, logsumexp))
    }

    /// Gradients of q, k and v, shaped as in [`Self::forward`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        d_out: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        logsumexp: &Tensor,
        shape: BatchShape,
    ) -> Result<(Tensor, Tensor, Tensor), ModelError> {
        let (dq, dk, dv) = ext::flash_attention_cpu_backward(
            &self.heads(d_out, shape)?,
            &self.heads(q, shape)?,
            &self.kv_heads(k, shape)?,
            &self.kv_heads(v, shape)?,
            &self.heads(out, shape)?,
            logsumexp,
            self.mask.is_none(),
            self.mask.as_ref(),
            None,
        )?;
        Ok((self.tokens(&dq, shape)?, self.kv_tokens(&dk, shape)?, self.kv_tokens(&dv, shape)?))
    }

    /// `[N, H*C] -> [B, H, T, C]`, without a copy.
    fn heads(&self, x: &Tensor, shape: BatchShape) -> Result<Tensor, ModelError> {
        Ok(x.f_view([shape.batch, shape.seq_len, self.num_heads, self.head_dim])?.f_transpose(1, 2)?)
    }

    /// `[N, K*C] -> [B, H, T, C]`: each key/value head stands for `H / K` query heads.
    fn kv_heads(&self, x: &Tensor, shape: BatchShape) -> Result<Tensor, ModelError> {
        let group = self.num_heads / self.num_kv_heads;
        if group == 1 {
            return self.heads(x, shape);
        }
        let x = x.f_view([shape.batch, shape.seq_len, self.num_kv_heads, 1, self.head_dim])?;
        let x = x.f_expand([-1, -1, -1, group, -1], false)?.f_reshape([shape.num_tokens(), -1])?;
        self.heads(&x, shape)
    }

    /// `[B, H, T, C] -> [N, H*C]`.
    fn tokens(&self, x: &Tensor, shape: BatchShape) -> Result<Tensor, ModelError> {
        Ok(x.f_transpose(1, 2)?.f_reshape([shape.num_tokens(), self.num_heads * self.head_dim])?)
    }

    /// `[B, H, T, C] -> [N, K*C]`: the sum over the query heads of each key/value head.
    fn kv_tokens(&self, x: &Tensor, shape: BatchShape) -> Result<Tensor, ModelError> {
        let group = self.num_heads / self.num_kv_heads;
        let x = self.tokens(x, shape)?;
        if group == 1 {
            return Ok(x);
        }
        let x = x.f_view([shape.num_tokens(), self.num_kv_heads, group, self.head_dim])?;
        let sum = x.f_sum_dim_intlist(2, false, Kind::Float)?.f_to_kind(x.kind())?;
        Ok(sum.f_reshape([shape.num_tokens(), -1])?)
    }
}
