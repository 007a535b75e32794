//! Flash attention on CPU: memory linear in the sequence, with the logsumexp that backward needs.
//!
//! Shapes: B batch, H heads, T query positions, S key positions, D head width.

use tch::Tensor;

use crate::error::{TorchError, check};
use crate::ffi::{self, handle_or_null, take};

/// `softmax(q k^T * scale + mask) v` for q [B, H, T, D], k and v [B, H, S, D], and its logsumexp [B, H, T] f32.
///
/// f32, bf16 or f16, the same for all, on CPU; f32 arithmetic inside. The last dimension must be contiguous, the others
/// may have any strides: views of [B, T, H, D] cost no copy, and the output has such strides too. Grouped keys must be
/// repeated to H heads. `scale` defaults to `1 / sqrt(D)`. `mask` is added to the scores: q's dtype or f32, [T, S] or
/// [B, H, T, S], 1 where it is the same for all; not together with `is_causal` (position t of q sees k up to t). Where
/// gradients are asked for, autograd records it.
pub fn flash_attention_cpu(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    is_causal: bool,
    scale: Option<f64>,
    mask: Option<&Tensor>,
) -> Result<(Tensor, Tensor), TorchError> {
    let scale = scale.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let (mut out, mut logsumexp) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: tensors and `scale` live through the call, outputs are places for one handle each.
    let message = unsafe {
        ffi::fte_flash_attention_cpu(
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            is_causal,
            handle_or_null(mask),
            scale,
            &mut out,
            &mut logsumexp,
        )
    };
    check("flash_attention_cpu", message)?;
    // SAFETY: the call succeeded: both handles are new tensors, taken once.
    Ok(unsafe { (take(out), take(logsumexp)) })
}

/// Gradients for q, k and v of [`flash_attention_cpu`], given its output and logsumexp and the same settings.
#[allow(clippy::too_many_arguments)]
pub fn flash_attention_cpu_backward(
    grad_out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    logsumexp: &Tensor,
    is_causal: bool,
    mask: Option<&Tensor>,
    scale: Option<f64>,
) -> Result<(Tensor, Tensor, Tensor), TorchError> {
    let scale = scale.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut grads = [std::ptr::null_mut(); 3];
    let [dq, dk, dv] = &mut grads;
    // SAFETY: tensors and `scale` live through the call, outputs are places for one handle each.
    let message = unsafe {
        ffi::fte_flash_attention_cpu_backward(
            grad_out.as_ptr(),
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            out.as_ptr(),
            logsumexp.as_ptr(),
            is_causal,
            handle_or_null(mask),
            scale,
            dq,
            dk,
            dv,
        )
    };
    check("flash_attention_cpu_backward", message)?;
    // SAFETY: the call succeeded: the three handles are new tensors, taken once.
    let [dq, dk, dv] = grads.map(|g| unsafe { take(g) });
    Ok((dq, dk, dv))
}
