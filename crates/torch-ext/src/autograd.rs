//! Gradients, as `torch.autograd.grad` computes them.

use tch::Tensor;

use crate::error::{TorchError, check};
use crate::ffi::{self, handles, take};

/// Sums over `outputs` the products of their Jacobians with `grad_outputs`, for each of `inputs`.
///
/// `grad_outputs` has one tensor for each output, of its shape; it may be empty when all outputs are scalars (ones).
/// With `retain_graph` the graph can be used again. An input that the outputs do not depend on is an error, or `None`
/// with `allow_unused`. The gradients have no graph of their own, nothing is accumulated into `.grad()`. On CPU all
/// work is done by the calling thread and the intra-op threads it uses.
pub fn grad(
    outputs: &[&Tensor],
    inputs: &[&Tensor],
    grad_outputs: &[&Tensor],
    retain_graph: bool,
    allow_unused: bool,
) -> Result<Vec<Option<Tensor>>, TorchError> {
    let (outputs, inputs, grad_outputs) = (handles(outputs), handles(inputs), handles(grad_outputs));
    let mut grads = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: the handles live through the call, and `grads` has a place for each input.
    let message = unsafe {
        ffi::fte_grad(
            outputs.as_ptr(),
            outputs.len(),
            inputs.as_ptr(),
            inputs.len(),
            grad_outputs.as_ptr(),
            grad_outputs.len(),
            retain_graph,
            allow_unused,
            grads.as_mut_ptr(),
        )
    };
    check("grad", message)?;
    // SAFETY: the call succeeded: each non-null handle is a new tensor, taken once.
    Ok(grads.into_iter().map(|g| (!g.is_null()).then(|| unsafe { take(g) })).collect())
}
