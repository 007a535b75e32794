//! Causal attention over `[N, heads * C]` activations.

use fsdp_torch_ext::{causal_attention, causal_attention_backward};
use tch::Tensor;

use crate::{BatchShape, ModelError};

/// Sizes of one block's attention.
#[derive(Debug)]
pub struct Attention {
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    /// Each position sees so many last ones, itself included.
    pub window: Option<i64>,
}

/// What attention reads and makes, as its backward needs them.
#[derive(Debug)]
pub struct AttentionValues {
    pub q: Tensor,         // [N, H*C]
    pub k: Tensor,         // [N, K*C]
    pub v: Tensor,         // [N, K*C]
    pub out: Tensor,       // [N, H*C]
    pub logsumexp: Tensor, // [B, H, T]
}

impl Attention {
    /// q `[N, H*C]`, k and v `[N, K*C]`: each key/value head serves `H / K` query heads.
    pub fn forward(&self, q: Tensor, k: Tensor, v: Tensor, shape: BatchShape) -> Result<AttentionValues, ModelError> {
        let (out, logsumexp) = causal_attention(
            &self.heads(&q, self.num_heads, shape)?,
            &self.heads(&k, self.num_kv_heads, shape)?,
            &self.heads(&v, self.num_kv_heads, shape)?,
            self.scale(),
            self.window,
        )?;
        Ok(AttentionValues { out: self.tokens(&out, shape)?, q, k, v, logsumexp })
    }

    /// Gradients of q, k and v, shaped as in [`Self::forward`].
    pub fn backward(
        &self,
        d_out: &Tensor,
        values: &AttentionValues,
        shape: BatchShape,
    ) -> Result<(Tensor, Tensor, Tensor), ModelError> {
        let AttentionValues { q, k, v, out, logsumexp } = values;
        let (dq, dk, dv) = causal_attention_backward(
            &self.heads(d_out, self.num_heads, shape)?,
            &self.heads(q, self.num_heads, shape)?,
            &self.heads(k, self.num_kv_heads, shape)?,
            &self.heads(v, self.num_kv_heads, shape)?,
            &self.heads(out, self.num_heads, shape)?,
            logsumexp,
            self.scale(),
            self.window,
        )?;
        Ok((self.tokens(&dq, shape)?, self.tokens(&dk, shape)?, self.tokens(&dv, shape)?))
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// `[N, heads * C] -> [B, heads, T, C]`, without a copy.
    fn heads(&self, x: &Tensor, num_heads: i64, shape: BatchShape) -> Result<Tensor, ModelError> {
        Ok(x.f_view([shape.batch, shape.seq_len, num_heads, self.head_dim])?.f_transpose(1, 2)?)
    }

    /// `[B, heads, T, C] -> [N, heads * C]`, without a copy where the layout is that of tokens already.
    fn tokens(&self, x: &Tensor, shape: BatchShape) -> Result<Tensor, ModelError> {
        Ok(x.f_transpose(1, 2)?.f_reshape([shape.num_tokens(), -1])?)
    }
}
