//! The accelerator of this process (CUDA, where its kernels are loaded) and its memory.

use tch::Device;

use crate::error::{TorchError, check};
use crate::ffi::{self, device_code, device_of};

/// Number of accelerator devices; 0 without a driver, a device or the kernels.
pub fn device_count() -> Result<usize, TorchError> {
    let mut count = 0;
    // SAFETY: `count` is a place for one i32.
    check("accelerator::device_count", unsafe { ffi::fte_accelerator_count(&mut count) })?;
    Ok(count as usize)
}

pub fn is_available() -> bool {
    device_count().is_ok_and(|n| n > 0)
}

/// The device that operations of this thread go to; an error where there is no accelerator.
pub fn current() -> Result<Device, TorchError> {
    let (mut device_type, mut index) = (0, 0);
    // SAFETY: both are places for one i32.
    check("accelerator::current", unsafe { ffi::fte_accelerator_current(&mut device_type, &mut index) })?;
    device_of("accelerator::current", device_type, index)
}

pub fn set_current(device: Device) -> Result<(), TorchError> {
    let index = accelerator_index("accelerator::set_current", device)?;
    // SAFETY: plain data only.
    check("accelerator::set_current", unsafe { ffi::fte_accelerator_set_current(index) })
}

/// Blocks the host until all work given to `device` is done.
pub fn synchronize(device: Device) -> Result<(), TorchError> {
    let index = accelerator_index("accelerator::synchronize", device)?;
    // SAFETY: plain data only.
    check("accelerator::synchronize", unsafe { ffi::fte_accelerator_synchronize(index) })
}

/// What libtorch's caching allocator holds on a device. Memory of other libraries (NCCL's) is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStats {
    /// In tensors now, and at most since the start or [`reset_peak_memory`].
    pub allocated_bytes: u64,
    pub peak_allocated_bytes: u64,
    /// Taken from the device now, cached blocks included, and at most.
    pub reserved_bytes: u64,
    pub peak_reserved_bytes: u64,
    /// Allocations that succeeded only after the cache was emptied.
    pub num_alloc_retries: u64,
    /// Allocations that failed.
    pub num_ooms: u64,
}

/// Mirrors `RawMemoryStats` in cpp/accelerator.cpp.
#[repr(C)]
#[derive(Default)]
pub(crate) struct RawMemoryStats {
    allocated_bytes: i64,
    peak_allocated_bytes: i64,
    reserved_bytes: i64,
    peak_reserved_bytes: i64,
    num_alloc_retries: i64,
    num_ooms: i64,
}

pub fn memory_stats(device: Device) -> Result<MemoryStats, TorchError> {
    let index = accelerator_index("accelerator::memory_stats", device)?;
    let mut raw = RawMemoryStats::default();
    // SAFETY: `raw` is a place for the statistics.
    check("accelerator::memory_stats", unsafe { ffi::fte_accelerator_memory_stats(index, &mut raw) })?;
    Ok(MemoryStats {
        allocated_bytes: raw.allocated_bytes as u64,
        peak_allocated_bytes: raw.peak_allocated_bytes as u64,
        reserved_bytes: raw.reserved_bytes as u64,
        peak_reserved_bytes: raw.peak_reserved_bytes as u64,
        num_alloc_retries: raw.num_alloc_retries as u64,
        num_ooms: raw.num_ooms as u64,
    })
}

/// Lets the peaks of [`memory_stats`] start again from what is in use now.
pub fn reset_peak_memory(device: Device) -> Result<(), TorchError> {
    let index = accelerator_index("accelerator::reset_peak_memory", device)?;
    // SAFETY: plain data only.
    check("accelerator::reset_peak_memory", unsafe { ffi::fte_accelerator_reset_peak_memory(index) })
}

fn accelerator_index(op: &'static str, device: Device) -> Result<i32, TorchError> {
    if device == Device::Cpu {
        return Err(TorchError::new(op, "expected an accelerator, got the CPU"));
    }
    device_code(op, device).map(|(_, index)| index)
}
