//! Products with weights and their gradients.
//!
//! A weight whose dtype was overridden takes part in its own dtype; the result returns to the activations' dtype.

use tch::{Kind, Tensor};

use crate::ModelError;

/// Indices of a projection's weight `[out, in]` and bias `[out]` among a unit's parameters.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    pub weight: usize,
    pub bias: Option<usize>,
}

impl Linear {
    /// `x @ weight.T + bias`: `[N, in] -> [N, out]`.
    pub fn forward(&self, params: &[Tensor], x: &Tensor) -> Result<Tensor, ModelError> {
        let w = &params[self.weight];
        let input = x.f_to_kind(w.kind())?;
        let y = match self.bias {
            Some(bias) => params[bias].f_to_kind(w.kind())?.f_addmm(&input, &w.f_tr()?)?,
            None => input.f_mm(&w.f_tr()?)?,
        };
        Ok(y.f_to_kind(x.kind())?)
    }

    /// `residual + x @ weight.T + bias`.
    pub fn forward_add(&self, params: &[Tensor], x: &Tensor, residual: &Tensor) -> Result<Tensor, ModelError> {
        let w = &params[self.weight];
        if self.bias.is_none() && w.kind() == residual.kind() {
            return Ok(residual.f_addmm(x, &w.f_tr()?)?);
        }
        Ok(self.forward(params, x)?.f_add(residual)?)
    }

    /// Gradient for the input: `[N, out] -> [N, in]`.
    pub fn backward_input(&self, params: &[Tensor], dy: &Tensor) -> Result<Tensor, ModelError> {
        let w = &params[self.weight];
        Ok(dy.f_to_kind(w.kind())?.f_mm(w)?.f_to_kind(dy.kind())?)
    }

    /// The same, added to `dx`, in its memory where dtypes allow.
    pub fn backward_input_add(&self, params: &[Tensor], dy: &Tensor, mut dx: Tensor) -> Result<Tensor, ModelError> {
        let w = &params[self.weight];
        if w.kind() == dx.kind() {
            return Ok(dx.f_addmm_(dy, w)?);
        }
        Ok(self.backward_input(params, dy)?.f_add(&dx)?)
    }

    /// Writes the gradients of weight and bias into `grads`, which stand in the order of the unit's parameters.
    pub fn backward_params(
        &self,
        params: &[Tensor],
        grads: &[Tensor],
        dy: &Tensor,
        x: &Tensor,
    ) -> Result<(), ModelError> {
        let kind = params[self.weight].kind();
        weight_grad(&grads[self.weight], &dy.f_to_kind(kind)?, &x.f_to_kind(kind)?)?;
        if let Some(bias) = self.bias {
            write_grad(&grads[bias], &dy.f_sum_dim_intlist(0, false, grads[bias].kind())?)?;
        }
        Ok(())
    }
}

/// `grad = dy.T @ x`, in the dtype of `grad`: `[N, out], [N, in] -> [out, in]`.
fn weight_grad(grad: &Tensor, dy: &Tensor, x: &Tensor) -> Result<(), ModelError> {
    if grad.kind() == dy.kind() {
        let _ = dy.f_tr()?.f_mm_out(grad, x)?;
        return Ok(());
    }
    if product_into_fp32_fits(grad, dy) {
        return add_product(grad, &dy.f_tr()?, x, true);
    }
    write_grad(grad, &dy.f_tr()?.f_mm(x)?)
}

/// Whether [`add_product`] takes these: libtorch has such products on GPUs alone.
pub(crate) fn product_into_fp32_fits(sum: &Tensor, a: &Tensor) -> bool {
    a.device().is_cuda() && sum.kind() == Kind::Float && a.kind() != Kind::Double
}

/// `sum += a @ b`, or `sum = a @ b` with `overwrite`, for an fp32 `sum` and factors of any dtype: the product itself adds
/// in fp32, nothing is rounded or stored in between.
pub(crate) fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor, overwrite: bool) -> Result<(), ModelError> {
    let _ =
        if overwrite { a.f_mm_dtype_out(sum, b, Kind::Float)? } else { sum.f_addmm_dtype_out(sum, a, b, Kind::Float)? };
    Ok(())
}

/// Copies a gradient into its place in the flat buffer, cast to the reduce dtype.
pub(crate) fn write_grad(grad: &Tensor, value: &Tensor) -> Result<(), ModelError> {
    grad.shallow_clone().f_copy_(&value.f_view_as(grad)?)?;
    Ok(())
}
