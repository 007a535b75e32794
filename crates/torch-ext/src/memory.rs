//! Host memory: tensors as slices, and glibc's allocator.

use tch::{Device, Kind, Tensor};

use crate::error::TorchError;
use crate::ffi;

/// Makes tensors up to 1 GiB live in glibc's heap, which keeps freed pages for the next tensor; by default each block
/// above 32 MiB is mapped afresh and faulted in page by page. All threads started later share that heap. Call once, at
/// the start of the process. `false` when the C library is another one or has refused.
pub fn tune_malloc() -> bool {
    // SAFETY: mallopt may be called at any time.
    unsafe { ffi::fte_tune_malloc() }
}

/// Calls `f` on the elements of a contiguous f32 CPU tensor.
///
/// Tensors share memory freely: until `f` returns, nothing may write to this tensor's through another one.
pub fn with_f32_slice<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R, TorchError> {
    check_host("with_f32_slice", t)?;
    if t.numel() == 0 {
        return Ok(f(&[]));
    }
    // SAFETY: a contiguous f32 tensor in host memory is `numel` f32 at `data_ptr`, aligned, alive while borrowed.
    Ok(f(unsafe { std::slice::from_raw_parts(t.data_ptr().cast(), t.numel()) }))
}

/// Calls `f` on the elements of a contiguous f32 CPU tensor, to write. Autograd's version counter is not raised.
///
/// Tensors share memory freely: until `f` returns, nothing may use this tensor's memory through another one.
pub fn with_f32_slice_mut<R>(t: &mut Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R, TorchError> {
    check_host("with_f32_slice_mut", t)?;
    if t.numel() == 0 {
        return Ok(f(&mut []));
    }
    // SAFETY: as in `with_f32_slice`; the caller has the tensor for itself.
    Ok(f(unsafe { std::slice::from_raw_parts_mut(t.data_ptr().cast(), t.numel()) }))
}

/// The conditions under which a tensor is a plain array of f32 in host memory.
fn check_host(op: &'static str, t: &Tensor) -> Result<(), TorchError> {
    if !t.defined() {
        return Err(TorchError::new(op, "expected a tensor, got an undefined one"));
    }
    if t.device() != Device::Cpu {
        return Err(TorchError::new(op, format!("expected a tensor on the CPU, got one on {:?}", t.device())));
    }
    if t.is_sparse() || t.is_mkldnn() {
        return Err(TorchError::new(op, "expected a dense tensor"));
    }
    if t.kind() != Kind::Float {
        return Err(TorchError::new(op, format!("expected dtype Float, got {:?}", t.kind())));
    }
    if !t.is_contiguous() {
        let message = format!("expected a contiguous tensor, got sizes {:?} with strides {:?}", t.size(), t.stride());
        return Err(TorchError::new(op, message));
    }
    Ok(())
}
