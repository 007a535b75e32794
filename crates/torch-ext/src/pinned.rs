//! Pinned host memory, and copies that the host does not wait for.

use tch::{Device, Kind, Tensor};

use crate::accelerator;
use crate::error::{TorchError, check};
use crate::ffi::{self, take};

/// An uninitialised CPU tensor: in pinned memory where there is an accelerator, else in plain memory.
///
/// Pinned memory comes from libtorch's cache, which takes a freed block back only when the copies that used it are
/// done.
pub fn empty(size: &[i64], kind: Kind) -> Result<Tensor, TorchError> {
    const OP: &str = "pinned::empty";
    let plain = |size: &[i64]| Tensor::f_empty(size, (kind, Device::Cpu)).map_err(|e| TorchError::from_tch(OP, &e));
    if !accelerator::is_available() {
        return plain(size);
    }
    let dtype_of = plain(&[0])?;
    let mut tensor = std::ptr::null_mut();
    // SAFETY: `size` and `dtype_of` live through the call, `tensor` is a place for one handle.
    let message = unsafe { ffi::fte_empty_pinned(size.as_ptr(), size.len(), dtype_of.as_ptr(), &mut tensor) };
    check(OP, message)?;
    // SAFETY: the call succeeded: the handle is a new tensor, taken once.
    Ok(unsafe { take(tensor) })
}

/// Copies `src` into `dst`, of the same or a broadcast shape, casting where dtypes differ.
///
/// Between a device and *pinned* memory the copy is only given to the device's current stream: until an event
/// recorded behind it is done, `dst` must not be read, nor `src` written, by the host. Between a device and plain
/// memory, and from CPU to CPU, it is done at return.
pub fn copy_non_blocking(dst: &mut Tensor, src: &Tensor) -> Result<(), TorchError> {
    // SAFETY: tensors live through the call.
    check("pinned::copy_non_blocking", unsafe { ffi::fte_copy(dst.as_ptr(), src.as_ptr(), true) })
}
