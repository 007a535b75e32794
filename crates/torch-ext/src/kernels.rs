//! The kernels of a Llama block and its loss: on CPU fused ones of our own, one pass over memory each where the plain
//! operations take several; elsewhere [`Kernels::Plain`], libtorch's operations in few launches.
//!
//! Tensors are f32, bf16 or f16, all of a call on one device, arithmetic inside is f32, results are rounded where
//! `transformers` rounds them. On CPU an operand is contiguous with any leading dimensions, or a matrix of contiguous
//! rows (a slice of columns), and results depend on neither the number of threads nor the way rows are shared out.
//! Nothing is recorded for autograd: an operand that requires grad is an error, except under `no_grad`. On a GPU the
//! host waits for nothing.
//!
//! N rows (tokens), D model width, F hidden width, H heads, V vocabulary.

use tch::{Device, Kind, Tensor};

use crate::error::{TorchError, check};
use crate::ffi::{self, take};

/// The target that takes no part in the loss.
pub const IGNORE_INDEX: i64 = -100;

/// Root-mean-square norm of x [N, D] with weight `[D]` (x's dtype, or f32): y [N, D] in x's dtype, and the reciprocal
/// root mean squares `[N]` f32 for backward. `x * rstd` is rounded to x's dtype before the weight multiplies it, on CPU.
/// A row whose mean square overflows f32 becomes NaN, in forward on CPU, in backward elsewhere.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor), TorchError> {
    Kernels::of(x).rms_norm(x, weight, eps)
}

/// Backward of [`rms_norm`]: dx [N, D] in x's dtype and dweight `[D]` f32.
pub fn rms_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
) -> Result<(Tensor, Tensor), TorchError> {
    Kernels::of(x).rms_norm_backward(dy, x, weight, rstd)
}

/// Rotary embedding of x [N, H * head width], rows in the order of [batch, position], by `cos` and `sin`
/// [positions, head width / 2] f32: element i of a head's first half is paired with element i of its second half.
/// `inverse` rotates back, which is the backward.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<Tensor, TorchError> {
    Kernels::of(x).rope(x, cos, sin, inverse)
}

/// [`rope`] in place, on CPU.
pub fn rope_(x: &mut Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<(), TorchError> {
    // SAFETY: tensors live through the call.
    check("rope_", unsafe { ffi::fte_rope_in_place(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), inverse) })
}

/// [`rope`] of a tensor that nobody else needs: in its own memory where that is the cheaper way.
pub fn rope_owned(mut x: Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<Tensor, TorchError> {
    match Kernels::of(&x) {
        Kernels::Fused => rope_(&mut x, cos, sin, inverse).map(|()| x),
        plain => plain.rope(&x, cos, sin, inverse),
    }
}

/// `silu(gate) * up`, all [N, F]. `silu(gate)` is rounded to the dtype before it is multiplied.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor, TorchError> {
    Kernels::of(gate).silu_mul(gate, up)
}

/// Backward of [`silu_mul`]: dgate and dup, [N, F] in gate's dtype.
pub fn silu_mul_backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor), TorchError> {
    Kernels::of(gate).silu_mul_backward(dh, gate, up)
}

/// The sum over rows of `-log softmax(logits)[target]`, one f64 on the device, rows with [`IGNORE_INDEX`] excluded, for
/// logits [N, V] and targets `[N]` i64. **Overwrites the logits** with `scale` (one f64) times the sum's gradient,
/// `(softmax - onehot) * scale`, zero in ignored rows. A target outside the vocabulary is an error and leaves the logits
/// alone, on CPU; elsewhere targets must have been checked.
pub fn cross_entropy(logits: &mut Tensor, targets: &Tensor, scale: &Tensor) -> Result<Tensor, TorchError> {
    Kernels::of(logits).cross_entropy(logits, targets, scale)
}

/// `dst += src`, or `dst = src` with `overwrite`, for a contiguous f32 `dst` and as many elements of any float dtype, on
/// CPU. (On a GPU a product adds to its result itself.)
pub fn accumulate(dst: &mut Tensor, src: &Tensor, overwrite: bool) -> Result<(), TorchError> {
    // SAFETY: tensors live through the call.
    check("accumulate", unsafe { ffi::fte_accumulate(dst.as_ptr(), src.as_ptr(), overwrite) })
}

/// Whose code computes. The functions of this module choose by device; the methods are those functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Ours, on CPU.
    Fused,
    /// libtorch's operations, on any device (but [`Kernels::rms_norm_backward`], which libtorch has on GPUs alone).
    Plain,
}

impl Kernels {
    fn of(t: &Tensor) -> Self {
        // What is undefined, the fused ones refuse.
        if !t.defined() || t.device() == Device::Cpu { Kernels::Fused } else { Kernels::Plain }
    }

    pub fn rms_norm(self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor), TorchError> {
        let call = match self {
            Kernels::Fused => ffi::fte_rms_norm,
            Kernels::Plain => ffi::fte_plain_rms_norm,
        };
        let (mut y, mut rstd) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: tensors live through the call, outputs are places for one handle each.
        check("rms_norm", unsafe { call(x.as_ptr(), weight.as_ptr(), eps, &mut y, &mut rstd) })?;
        // SAFETY: the call succeeded: both handles are new tensors, taken once.
        Ok(unsafe { (take(y), take(rstd)) })
    }

    pub fn rms_norm_backward(
        self,
        dy: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        rstd: &Tensor,
    ) -> Result<(Tensor, Tensor), TorchError> {
        let call = match self {
            Kernels::Fused => ffi::fte_rms_norm_backward,
            Kernels::Plain => ffi::fte_plain_rms_norm_backward,
        };
        let (mut dx, mut dweight) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: tensors live through the call, outputs are places for one handle each.
        let message = unsafe { call(dy.as_ptr(), x.as_ptr(), weight.as_ptr(), rstd.as_ptr(), &mut dx, &mut dweight) };
        check("rms_norm_backward", message)?;
        // SAFETY: the call succeeded: both handles are new tensors, taken once.
        Ok(unsafe { (take(dx), take(dweight)) })
    }

    pub fn rope(self, x: &Tensor, cos: &Tensor, sin: &Tensor, inverse: bool) -> Result<Tensor, TorchError> {
        let call = match self {
            Kernels::Fused => ffi::fte_rope,
            Kernels::Plain => ffi::fte_plain_rope,
        };
        let mut y = std::ptr::null_mut();
        // SAFETY: tensors live through the call, `y` is a place for one handle.
        check("rope", unsafe { call(x.as_ptr(), cos.as_ptr(), sin.as_ptr(), inverse, &mut y) })?;
        // SAFETY: the call succeeded: the handle is a new tensor, taken once.
        Ok(unsafe { take(y) })
    }

    pub fn silu_mul(self, gate: &Tensor, up: &Tensor) -> Result<Tensor, TorchError> {
        let call = match self {
            Kernels::Fused => ffi::fte_silu_mul,
            Kernels::Plain => ffi::fte_plain_silu_mul,
        };
        let mut h = std::ptr::null_mut();
        // SAFETY: tensors live through the call, `h` is a place for one handle.
        check("silu_mul", unsafe { call(gate.as_ptr(), up.as_ptr(), &mut h) })?;
        // SAFETY: the call succeeded: the handle is a new tensor, taken once.
        Ok(unsafe { take(h) })
    }

    pub fn silu_mul_backward(self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor), TorchError> {
        let call = match self {
            Kernels::Fused => ffi::fte_silu_mul_backward,
            Kernels::Plain => ffi::fte_plain_silu_mul_backward,
        };
        let (mut dgate, mut dup) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: tensors live through the call, outputs are places for one handle each.
        let message = unsafe { call(dh.as_ptr(), gate.as_ptr(), up.as_ptr(), &mut dgate, &mut dup) };
        check("silu_mul_backward", message)?;
        // SAFETY: the call succeeded: both handles are new tensors, taken once.
        Ok(unsafe { (take(dgate), take(dup)) })
    }

    pub fn cross_entropy(self, logits: &mut Tensor, targets: &Tensor, scale: &Tensor) -> Result<Tensor, TorchError> {
        const OP: &str = "cross_entropy";
        let call = match self {
            Kernels::Fused => ffi::fte_cross_entropy,
            Kernels::Plain => ffi::fte_plain_cross_entropy,
        };
        if scale.kind() != Kind::Double || scale.dim() != 0 {
            let message = format!("scale: expected one f64, got {:?} {:?}", scale.kind(), scale.size());
            return Err(TorchError::new(OP, message));
        }
        let mut loss_sum = std::ptr::null_mut();
        // SAFETY: tensors live through the call, `loss_sum` is a place for one handle.
        check(OP, unsafe { call(logits.as_ptr(), targets.as_ptr(), scale.as_ptr(), &mut loss_sum) })?;
        // SAFETY: the call succeeded: the handle is a new tensor, taken once.
        Ok(unsafe { take(loss_sum) })
    }
}
