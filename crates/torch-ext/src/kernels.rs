//! Fused kernels on CPU: one pass over memory each where the plain operations take several.
//!
//! Tensors are f32, bf16 or f16, on the CPU, arithmetic inside is f32, results are rounded where `transformers` rounds
//! them. An operand is contiguous with any leading dimensions, or a matrix of contiguous rows (a slice of columns).
//! Results depend on neither the number of threads nor the way rows are shared out. Nothing is recorded for autograd:
//! an operand that requires grad is an error, except under `no_grad`.
//!
//! N rows (tokens), D model width, F hidden width, H heads, V vocabulary.

use tch::Tensor;

use crate::error::{TorchError, check};
use crate::ffi::{self, take};

/// The target that takes no part in the loss.
pub const IGNORE_INDEX: i64 = -100;

/// Root-mean-square norm of x [N, D] with weight `[D]` (x's dtype, or f32): y [N, D] in x's dtype, and the reciprocal
/// root mean squares `[N]` f32 for backward. `x * rstd` is rounded to x's dtype before the weight multiplies it. A row
/// whose mean square overflows f32 becomes NaN.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor), TorchError> {
    let (mut y, mut rstd) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: tensors live through the call, outputs are places for one handle each.
    let message = unsafe { ffi::fte_rms_norm(x.as_ptr(), weight.as_ptr(), eps, &mut y, &mut rstd) };
    check("rms_norm", message)?;
    // SAFETY: the call succeeded: both handles are new tensors, taken once.
    Ok(unsafe { (take(y), take(rstd)) })
}

/// Backward of [`rms_norm`]: dx [N, D] in x's dtype and dweight `[D]` f32.
pub fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
) -> Result<(Tensor, Tensor), TorchError> {
    let (mut dx, mut dweight) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: tensors live through the call, outputs are places for one handle each.
    let message = unsafe {
        ffi::fte_rms_norm_backward(dy.as_ptr(), x.as_ptr(), weight.as_ptr(), rstd.as_ptr(), &mut dx, &mut dweight)
    };
    check("rms_norm_backward", message)?;
    // SAFETY: the call succeeded: both handles are new tensors, taken once.
    Ok(unsafe { (take(dx), take(dweight)) })
}

/// Rotary embedding of x [N, H * head width], rows in the order of [batch, position], by `cos` and `sin`
/// [positions, head width / 2] f32: element i of a head's first half is paired with element i of its second half.
/// `inverse` rotates back, which is the backward.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<Tensor, TorchError> {
    let mut y = std::ptr::null_mut();
    // SAFETY: tensors live through the call, `y` is a place for one handle.
    let message = unsafe { ffi::fte_rope(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), inverse, &mut y) };
    check("rope", message)?;
    // SAFETY: the call succeeded: the handle is a new tensor, taken once.
    Ok(unsafe { take(y) })
}

/// [`rope`] in place.
pub fn rope_(x: &mut Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<(), TorchError> {
    // SAFETY: tensors live through the call.
    check("rope_", unsafe { ffi::fte_rope_in_place(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), inverse) })
}

/// `silu(gate) * up`, all [N, F]. `silu(gate)` is rounded to the dtype before it is multiplied.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor, TorchError> {
    let mut h = std::ptr::null_mut();
    // SAFETY: tensors live through the call, `h` is a place for one handle.
    check("silu_mul", unsafe { ffi::fte_silu_mul(gate.as_ptr(), up.as_ptr(), &mut h) })?;
    // SAFETY: the call succeeded: the handle is a new tensor, taken once.
    Ok(unsafe { take(h) })
}

/// Backward of [`silu_mul`]: dgate and dup, [N, F] in gate's dtype.
pub fn silu_mul_backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor), TorchError> {
    let (mut dgate, mut dup) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: tensors live through the call, outputs are places for one handle each.
    let message = unsafe { ffi::fte_silu_mul_backward(dh.as_ptr(), gate.as_ptr(), up.as_ptr(), &mut dgate, &mut dup) };
    check("silu_mul_backward", message)?;
    // SAFETY: the call succeeded: both handles are new tensors, taken once.
    Ok(unsafe { (take(dgate), take(dup)) })
}

/// The sum over rows of `-log softmax(logits)[target]`, rows with [`IGNORE_INDEX`] excluded, for logits [N, V] and
/// targets `[N]` i64. **Overwrites the logits** with `scale` times the sum's gradient, `(softmax - onehot) * scale`, zero
/// in ignored rows. A target outside the vocabulary is an error and leaves the logits alone.
pub fn cross_entropy(logits: &mut Tensor, targets: &Tensor, scale: f64) -> Result<f64, TorchError> {
    let mut loss_sum = 0.0;
    // SAFETY: tensors live through the call, `loss_sum` is a place for one f64.
    let message = unsafe { ffi::fte_cross_entropy(logits.as_ptr(), targets.as_ptr(), scale, &mut loss_sum) };
    check("cross_entropy", message)?;
    Ok(loss_sum)
}

/// `dst += src`, or `dst = src` with `overwrite`, for a contiguous f32 `dst` and as many elements of any float dtype.
pub fn accumulate(dst: &mut Tensor, src: &Tensor, overwrite: bool) -> Result<(), TorchError> {
    // SAFETY: tensors live through the call.
    check("accumulate", unsafe { ffi::fte_accumulate(dst.as_ptr(), src.as_ptr(), overwrite) })
}
