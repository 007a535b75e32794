//! Declarations of `cpp/*.cpp`. Every `*mut c_char` returned is null, or an error message owned by the caller.

use std::ffi::{c_char, c_void};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::accelerator::{RawDeviceInfo, RawMemoryStats};
use crate::error::TorchError;
use crate::stream::RawStream;

/// A borrowed tensor, or null for an absent one.
pub(crate) type In = *const C_tensor;
/// Where the shim puts a new tensor, owned by the caller.
pub(crate) type Out = *mut *mut C_tensor;

#[repr(C)]
pub(crate) struct CEvent {
    _private: [u8; 0],
}

#[repr(C)]
pub(crate) struct CStreamGuard {
    _private: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn fte_free_error(message: *mut c_char);

    pub(crate) fn fte_grad(
        outputs: *const In,
        num_outputs: usize,
        inputs: *const In,
        num_inputs: usize,
        grad_outputs: *const In,
        num_grad_outputs: usize,
        retain_graph: bool,
        allow_unused: bool,
        grads: Out,
    ) -> *mut c_char;

    pub(crate) fn fte_fused_adamw(
        params: *const In,
        grads: *const In,
        exp_avgs: *const In,
        exp_avg_sqs: *const In,
        steps: *const In,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: In,
        found_inf: In,
    ) -> *mut c_char;
    pub(crate) fn fte_foreach_norm(tensors: *const In, n: usize, norms: Out) -> *mut c_char;

    pub(crate) fn fte_flash_attention_cpu(
        q: In,
        k: In,
        v: In,
        is_causal: bool,
        mask: In,
        scale: *const f64,
        out: Out,
        logsumexp: Out,
    ) -> *mut c_char;
    pub(crate) fn fte_flash_attention_cpu_backward(
        grad_out: In,
        q: In,
        k: In,
        v: In,
        out: In,
        logsumexp: In,
        is_causal: bool,
        mask: In,
        scale: *const f64,
        grad_q: Out,
        grad_k: Out,
        grad_v: Out,
    ) -> *mut c_char;

    pub(crate) fn fte_causal_attention_available() -> bool;
    pub(crate) fn fte_causal_attention(
        q: In,
        k: In,
        v: In,
        scale: f64,
        window: i64,
        out: Out,
        logsumexp: Out,
    ) -> *mut c_char;
    pub(crate) fn fte_causal_attention_backward(
        grad_out: In,
        q: In,
        k: In,
        v: In,
        out: In,
        logsumexp: In,
        scale: f64,
        window: i64,
        grad_q: Out,
        grad_k: Out,
        grad_v: Out,
    ) -> *mut c_char;

    pub(crate) fn fte_causal_attention_cuda(
        q: In,
        k: In,
        v: In,
        scale: f64,
        window: i64,
        out: Out,
        logsumexp: Out,
    ) -> *mut c_char;
    pub(crate) fn fte_causal_attention_cuda_backward(
        grad_out: In,
        q: In,
        k: In,
        v: In,
        out: In,
        logsumexp: In,
        scale: f64,
        window: i64,
        grad_q: Out,
        grad_k: Out,
        grad_v: Out,
    ) -> *mut c_char;

    pub(crate) fn fte_stream_current(device_type: i32, index: i32, stream: *mut RawStream) -> *mut c_char;
    pub(crate) fn fte_stream_from_pool(
        device_type: i32,
        index: i32,
        high_priority: bool,
        stream: *mut RawStream,
    ) -> *mut c_char;
    pub(crate) fn fte_stream_query(stream: RawStream, done: *mut bool) -> *mut c_char;
    pub(crate) fn fte_stream_synchronize(stream: RawStream) -> *mut c_char;
    pub(crate) fn fte_stream_native_handle(stream: RawStream, handle: *mut *mut c_void) -> *mut c_char;
    pub(crate) fn fte_stream_enter(stream: RawStream, guard: *mut *mut CStreamGuard) -> *mut c_char;
    pub(crate) fn fte_stream_leave(guard: *mut CStreamGuard) -> *mut c_char;

    pub(crate) fn fte_event_new(device_type: i32, timing: bool, event: *mut *mut CEvent) -> *mut c_char;
    pub(crate) fn fte_event_delete(event: *mut CEvent);
    pub(crate) fn fte_event_record(event: *mut CEvent, stream: RawStream) -> *mut c_char;
    pub(crate) fn fte_event_block(event: *const CEvent, stream: RawStream) -> *mut c_char;
    pub(crate) fn fte_event_query(event: *const CEvent, done: *mut bool) -> *mut c_char;
    pub(crate) fn fte_event_synchronize(event: *const CEvent) -> *mut c_char;
    pub(crate) fn fte_event_elapsed_ms(start: *const CEvent, end: *const CEvent, ms: *mut f64) -> *mut c_char;

    pub(crate) fn fte_accelerator_count(count: *mut i32) -> *mut c_char;
    pub(crate) fn fte_accelerator_set_current(index: i32) -> *mut c_char;
    pub(crate) fn fte_accelerator_synchronize(index: i32) -> *mut c_char;
    pub(crate) fn fte_accelerator_memory_stats(index: i32, stats: *mut RawMemoryStats) -> *mut c_char;
    pub(crate) fn fte_accelerator_reset_peak_memory(index: i32) -> *mut c_char;

    pub(crate) fn fte_load_cuda() -> *mut c_char;
    pub(crate) fn fte_cuda_driver_count(count: *mut i32) -> *mut c_char;
    pub(crate) fn fte_cuda_device_info(index: i32, info: *mut RawDeviceInfo) -> *mut c_char;
    pub(crate) fn fte_set_deterministic(on: bool) -> *mut c_char;

    pub(crate) fn fte_tune_malloc() -> bool;
    pub(crate) fn fte_empty_pinned(size: *const i64, dims: usize, dtype_of: In, tensor: Out) -> *mut c_char;
    pub(crate) fn fte_copy(dst: In, src: In, non_blocking: bool) -> *mut c_char;

    pub(crate) fn fte_rms_norm(x: In, weight: In, eps: f64, y: Out, rstd: Out) -> *mut c_char;
    pub(crate) fn fte_rms_norm_backward(dy: In, x: In, weight: In, rstd: In, dx: Out, dweight: Out) -> *mut c_char;
    pub(crate) fn fte_rope(x: In, cos: In, sin: In, inverse: bool, y: Out) -> *mut c_char;
    pub(crate) fn fte_rope_in_place(x: In, cos: In, sin: In, inverse: bool) -> *mut c_char;
    pub(crate) fn fte_silu_mul(gate: In, up: In, h: Out) -> *mut c_char;
    pub(crate) fn fte_silu_mul_backward(dh: In, gate: In, up: In, dgate: Out, dup: Out) -> *mut c_char;
    pub(crate) fn fte_cross_entropy(logits: In, targets: In, scale: In, loss_sum: Out) -> *mut c_char;
    pub(crate) fn fte_accumulate(dst: In, src: In, overwrite: bool) -> *mut c_char;

    pub(crate) fn fte_plain_rms_norm(x: In, weight: In, eps: f64, y: Out, rstd: Out) -> *mut c_char;
    pub(crate) fn fte_plain_rms_norm_backward(
        dy: In,
        x: In,
        weight: In,
        rstd: In,
        dx: Out,
        dweight: Out,
    ) -> *mut c_char;
    pub(crate) fn fte_plain_rope(x: In, cos: In, sin: In, inverse: bool, y: Out) -> *mut c_char;
    pub(crate) fn fte_plain_silu_mul(gate: In, up: In, h: Out) -> *mut c_char;
    pub(crate) fn fte_plain_silu_mul_backward(dh: In, gate: In, up: In, dgate: Out, dup: Out) -> *mut c_char;
    pub(crate) fn fte_plain_cross_entropy(logits: In, targets: In, scale: In, loss_sum: Out) -> *mut c_char;
}

/// The handles of `tensors`, valid while those are borrowed.
pub(crate) fn handles(tensors: &[&Tensor]) -> Vec<In> {
    tensors.iter().map(|t| t.as_ptr()).collect()
}

pub(crate) fn handle_or_null(tensor: Option<&Tensor>) -> In {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

/// Takes ownership of a tensor that the shim has given.
///
/// # Safety
/// `handle` was written to an [`Out`] by a call that succeeded, is not null and is taken only once.
pub(crate) unsafe fn take(handle: *mut C_tensor) -> Tensor {
    debug_assert!(!handle.is_null());
    // SAFETY: by the contract above, the handle is an owned at::Tensor on the heap, which is what tch holds.
    unsafe { Tensor::from_ptr(handle) }
}

const TYPE_CPU: i32 = 0;
const TYPE_CUDA: i32 = 1;

/// c10's (type, index) of a device.
pub(crate) fn device_code(op: &'static str, device: Device) -> Result<(i32, i32), TorchError> {
    match device {
        Device::Cpu => Ok((TYPE_CPU, -1)),
        Device::Cuda(index) => Ok((TYPE_CUDA, index as i32)),
        other => Err(TorchError::new(op, format!("expected a CPU or CUDA device, got {other:?}"))),
    }
}

/// The inverse of [`device_code`].
pub(crate) fn device_of(op: &'static str, device_type: i32, index: i32) -> Result<Device, TorchError> {
    match device_type {
        TYPE_CPU => Ok(Device::Cpu),
        TYPE_CUDA => Ok(Device::Cuda(index as usize)),
        other => Err(TorchError::new(op, format!("expected a CPU or CUDA device, got c10 device type {other}"))),
    }
}
