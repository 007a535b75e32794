//! Attention with memory linear in the sequence, and the logsumexp that backward needs.
//!
//! [`causal_attention`] is the one for training. On CPU: for bf16 and an even head width, on processors with bf16
//! products, our own kernel, else libtorch's flash attention, which [`flash_attention_cpu`] gives as it is, for other
//! masks. On CUDA: libtorch's flash attention, by the sequences' cumulative lengths, for bf16 and f16 and heads up to 192
//! wide, on data-centre cards 256; else its memory-efficient attention, which repeats grouped key heads.
//!
//! Shapes: B batch, H query heads, G key heads, T query positions, S key positions, D head width; none of them 0.

use tch::{Device, Kind, Tensor};

use crate::error::{TorchError, check};
use crate::ffi::{self, handle_or_null, take};

/// `softmax(q k^T * scale) v` for q [B, H, T, D], k and v [B, G, T, D] where G divides H (query head h uses key head
/// `h / (H / G)`), and its logsumexp for the backward: f32, on CPU [B, H, T], on CUDA as its kernel lays it out.
/// Position t sees the `window` positions up to t, itself included, or all up to t.
///
/// f32, bf16 or f16, the same for all, on CPU or CUDA. The last dimension must be contiguous, the others may have any
/// strides: views of [B, T, H, D] cost no copy, and the output has such strides too. `scale` is above 0. Records no
/// graph. A window costs libtorch's kernel on CPU, but no other, a mask [T, T].
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    window: Option<i64>,
) -> Result<(Tensor, Tensor), TorchError> {
    let window = check_settings(scale, window)?;
    let on_cuda = q.defined() && q.device().is_cuda();
    if !on_cuda && !own_kernel_fits(q) {
        let mask = window_mask(q, window);
        let [k, v] = [k, v].map(|t| repeat_heads(t, q));
        return tch::no_grad(|| flash_attention_cpu(q, &k, &v, mask.is_none(), Some(scale), mask.as_ref()));
    }
    let call = if on_cuda { ffi::fte_causal_attention_cuda } else { ffi::fte_causal_attention };
    let (mut out, mut logsumexp) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: tensors live through the call, outputs are places for one handle each.
    let message = unsafe { call(q.as_ptr(), k.as_ptr(), v.as_ptr(), scale, window, &mut out, &mut logsumexp) };
    check(CAUSAL, message)?;
    // SAFETY: the call succeeded: both handles are new tensors, taken once.
    Ok(unsafe { (take(out), take(logsumexp)) })
}

/// Gradients for q, k and v of [`causal_attention`], given its output and logsumexp and the same settings.
#[allow(clippy::too_many_arguments)]
pub fn causal_attention_backward(
    grad_out: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    logsumexp: &Tensor,
    scale: f64,
    window: Option<i64>,
) -> Result<(Tensor, Tensor, Tensor), TorchError> {
    let window = check_settings(scale, window)?;
    let on_cuda = q.defined() && q.device().is_cuda();
    if !on_cuda && !own_kernel_fits(q) {
        let mask = window_mask(q, window);
        let (all_k, all_v) = (repeat_heads(k, q), repeat_heads(v, q));
        let (dq, dk, dv) = tch::no_grad(|| {
            let is_causal = mask.is_none();
            let scale = Some(scale);
            flash_attention_cpu_backward(grad_out, q, &all_k, &all_v, out, logsumexp, is_causal, mask.as_ref(), scale)
        })?;
        return Ok((dq, sum_heads(dk, k), sum_heads(dv, v)));
    }
    let call = if on_cuda { ffi::fte_causal_attention_cuda_backward } else { ffi::fte_causal_attention_backward };
    let mut grads = [std::ptr::null_mut(); 3];
    let [dq, dk, dv] = &mut grads;
    // SAFETY: tensors live through the call, outputs are places for one handle each.
    let message = unsafe {
        call(
            grad_out.as_ptr(),
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            out.as_ptr(),
            logsumexp.as_ptr(),
            scale,
            window,
            dq,
            dk,
            dv,
        )
    };
    check("causal_attention_backward", message)?;
    // SAFETY: the call succeeded: the three handles are new tensors, taken once.
    let [dq, dk, dv] = grads.map(|g| unsafe { take(g) });
    Ok((dq, dk, dv))
}

const CAUSAL: &str = "causal_attention";

/// The window in positions. Both kernels take the largest score before they scale it.
fn check_settings(scale: f64, window: Option<i64>) -> Result<i64, TorchError> {
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(TorchError::new(CAUSAL, format!("scale: expected a finite number above 0, got {scale}")));
    }
    match window {
        None => Ok(i64::MAX / 2),
        Some(window) if window > 0 => Ok(window.min(i64::MAX / 2)),
        Some(window) => Err(TorchError::new(CAUSAL, format!("window: expected at least 1, got {window}"))),
    }
}

fn own_kernel_fits(q: &Tensor) -> bool {
    // SAFETY: asks the processor only.
    let available = unsafe { ffi::fte_causal_attention_available() };
    available
        && q.defined()
        && q.kind() == Kind::BFloat16
        && q.device() == Device::Cpu
        && q.size().last().is_some_and(|d| d % 2 == 0)
}

/// What to add to scores [T, T] where a window cuts them; `None` where being causal says all.
fn window_mask(q: &Tensor, window: i64) -> Option<Tensor> {
    let t = *q.size().get(2)?;
    (window < t).then(|| {
        let seen = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(0).triu(1 - window);
        Tensor::zeros([t, t], (q.kind(), Device::Cpu)).masked_fill(&seen.logical_not(), f64::NEG_INFINITY)
    })
}

/// Key heads [B, G, T, D] repeated to the H heads of q; as they are where the shapes do not allow it, for the callee to
/// refuse.
fn repeat_heads(t: &Tensor, q: &Tensor) -> Tensor {
    match (&t.size()[..], &q.size()[..]) {
        (&[b, g, s, d], &[_, h, _, _]) if g != h && g > 0 && h % g == 0 => {
            t.unsqueeze(2).expand([b, g, h / g, s, d], false).reshape([b, h, s, d])
        }
        _ => t.shallow_clone(),
    }
}

/// The gradient of [`repeat_heads`]: [B, H, T, D] summed to the heads of `like`.
fn sum_heads(grad: Tensor, like: &Tensor) -> Tensor {
    match like.size()[..] {
        [b, g, s, d] if grad.size()[1] != g => {
            grad.reshape([b, g, -1, s, d]).sum_dim_intlist([2i64].as_slice(), false, None)
        }
        _ => grad,
    }
}

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
