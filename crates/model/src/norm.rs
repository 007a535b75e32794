//! RMSNorm, whose weight may have a dtype of its own.

use fsdp_torch_ext::kernels;
use tch::{Kind, Tensor};

use crate::ModelError;

/// `[N, D]` -> `[N, D]` in x's dtype, and the reciprocal root mean squares `[N]` in fp32.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor), ModelError> {
    Ok(kernels::rms_norm(x, &beside(x, weight)?, eps)?)
}

/// Gradients of x, in its dtype, and of the weight, in fp32.
pub fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
    Ok(kernels::rms_norm_backward(dy, x, &beside(x, weight)?, rstd)?)
}

/// The weight as the kernels take it: in x's dtype, or in fp32, which holds every other dtype exactly.
fn beside(x: &Tensor, weight: &Tensor) -> Result<Tensor, ModelError> {
    let kind = if weight.kind() == x.kind() { x.kind() } else { Kind::Float };
    Ok(weight.f_to_kind(kind)?)
}
