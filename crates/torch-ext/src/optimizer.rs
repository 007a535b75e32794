//! Operations on lists of tensors: one pass over memory, one launch on a GPU.

use tch::{Kind, Tensor};

use crate::error::{TorchError, check};
use crate::ffi::{self, handle_or_null, handles, take};

/// Hyperparameters of AdamW, with decoupled weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// One AdamW step in place on `params`, `exp_avgs` and `exp_avg_sqs`, as `torch.optim.AdamW(fused=True)`.
///
/// All lists have the same length, which may be 0, and the tensors of one place the same shape, dtype and device, contiguous; all
/// tensors of a call are on one device. `steps` holds one-element f32 tensors: the number of this step, from 1; the
/// caller raises them. With `grad_scale` (one-element f32) gradients are divided by it, and written back so. When
/// `found_inf` (one-element f32) is 1 nothing changes, without the host looking at it; it must be given, as without it
/// libtorch reads an undefined tensor.
#[allow(clippy::too_many_arguments)]
pub fn fused_adamw(
    params: &[&Tensor],
    grads: &[&Tensor],
    exp_avgs: &[&Tensor],
    exp_avg_sqs: &[&Tensor],
    steps: &[&Tensor],
    hp: &AdamW,
    grad_scale: Option<&Tensor>,
    found_inf: &Tensor,
) -> Result<(), TorchError> {
    const OP: &str = "fused_adamw";
    for (name, list) in [("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("steps", steps)] {
        if list.len() != params.len() {
            let message = format!("expected {} {name}, one for each param, got {}", params.len(), list.len());
            return Err(TorchError::new(OP, message));
        }
    }
    let device = params.first().map_or(found_inf.device(), |p| p.device());
    // The fused kernels walk the memory of all four by the number of elements of the param.
    for (i, param) in params.iter().enumerate() {
        for (name, t) in
            [("param", *param), ("grad", grads[i]), ("exp_avg", exp_avgs[i]), ("exp_avg_sq", exp_avg_sqs[i])]
        {
            let same = t.size() == param.size() && t.kind() == param.kind() && t.device() == device;
            if !same || !t.is_contiguous() {
                let (expected, got) = (describe(param), describe(t));
                let message = format!("{name} {i}: expected contiguous {expected}, all on {device:?}, got {got}");
                return Err(TorchError::new(OP, message));
            }
        }
    }
    for (name, t) in steps
        .iter()
        .map(|t| ("step", *t))
        .chain([("found_inf", found_inf)])
        .chain(grad_scale.map(|t| ("grad_scale", t)))
    {
        // They are read through their address.
        if t.kind() != Kind::Float || t.numel() != 1 || t.device() != device {
            return Err(TorchError::new(OP, format!("{name}: expected one f32 on {device:?}, got {}", describe(t))));
        }
    }
    if params.is_empty() {
        // Libtorch's CUDA kernel reads the first tensor of the lists without a look at their length.
        return Ok(());
    }
    let (params, grads) = (handles(params), handles(grads));
    let (exp_avgs, exp_avg_sqs, steps) = (handles(exp_avgs), handles(exp_avg_sqs), handles(steps));
    // SAFETY: the handles live through the call; all lists have `params.len()` of them.
    let message = unsafe {
        ffi::fte_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            steps.as_ptr(),
            params.len(),
            hp.lr,
            hp.beta1,
            hp.beta2,
            hp.weight_decay,
            hp.eps,
            handle_or_null(grad_scale),
            found_inf.as_ptr(),
        )
    };
    check(OP, message)
}

/// The L2 norm of each tensor, as a scalar of its dtype on its device.
pub fn foreach_norm(tensors: &[&Tensor]) -> Result<Vec<Tensor>, TorchError> {
    let tensors = handles(tensors);
    let mut norms = vec![std::ptr::null_mut(); tensors.len()];
    // SAFETY: the handles live through the call, and `norms` has a place for each tensor.
    let message = unsafe { ffi::fte_foreach_norm(tensors.as_ptr(), tensors.len(), norms.as_mut_ptr()) };
    check("foreach_norm", message)?;
    // SAFETY: the call succeeded: each handle is a new tensor, taken once.
    Ok(norms.into_iter().map(|n| unsafe { take(n) }).collect())
}

fn describe(t: &Tensor) -> String {
    format!("{:?} {:?} with strides {:?} on {:?}", t.kind(), t.size(), t.stride(), t.device())
}
