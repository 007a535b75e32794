//! What `tch` lacks of libtorch, through a small C++ shim (`cpp/`), as a safe API on [`tch::Tensor`].
//!
//! A C++ exception becomes a [`TorchError`], never an abort. No CUDA header is used: streams, events and memory
//! statistics go through c10's device-generic interfaces, so one binary serves CPU and GPU.
//!
//! Layout:
//! - [`autograd`]: gradients of chosen outputs for chosen inputs, with `grad_outputs`.
//! - [`optimizer`]: fused AdamW, norms of many tensors.
//! - [`accelerator`]: libtorch's CUDA half, loaded at run time; devices and their memory.
//! - [`stream`]: [`Stream`] and [`Event`]; [`pinned`]: host memory that copies need not be waited for.
//! - [`attention`]: attention, output and logsumexp kept, and its backward.
//! - [`kernels`]: the kernels of a Llama block and its loss, forward and backward: fused on CPU, plain elsewhere.
//! - [`memory`]: tensors as slices; glibc's allocator made fit for large tensors.
//! - `ffi`: the declarations of the C boundary, one to one with `cpp/`.

pub mod accelerator;
pub mod attention;
pub mod autograd;
mod error;
mod ffi;
pub mod kernels;
pub mod memory;
pub mod optimizer;
pub mod pinned;
pub mod stream;

pub use attention::{causal_attention, causal_attention_backward, flash_attention_cpu, flash_attention_cpu_backward};
pub use autograd::grad;
pub use error::TorchError;
pub use memory::{tune_malloc, with_f32_slice, with_f32_slice_mut};
pub use optimizer::{AdamW, foreach_norm, fused_adamw};
pub use stream::{Event, Stream, StreamGuard};
