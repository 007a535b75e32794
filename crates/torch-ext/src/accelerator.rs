//! The accelerator of this process: CUDA, once its half of libtorch is loaded; its devices and their memory.

use std::ffi::{CStr, c_char};

use tch::Device;

use crate::error::{TorchError, check};
use crate::ffi::{self, device_code};

/// Loads `libtorch_cuda.so`, so that libtorch knows CUDA devices. Call it first, at the start of the process: libtorch
/// looks for its CUDA half once. A second call does nothing.
///
/// The library is searched on `LD_LIBRARY_PATH`, on the program's rpath, and beside `libtorch_cpu.so`. That it, or a
/// library that it needs, is missing or of another version is an error that says so. A machine without a driver or
/// without a device is none: there [`device_count`] is 0, and [`driver_device_count`] says why.
///
/// The allocator of CUDA memory reads its settings itself, once, from the environment: `PYTORCH_ALLOC_CONF`, or its old
/// name `PYTORCH_CUDA_ALLOC_CONF` (`expandable_segments:True`, say).
pub fn load_cuda() -> Result<(), TorchError> {
    // SAFETY: no arguments; the library's initializers are libtorch's own.
    check("accelerator::load_cuda", unsafe { ffi::fte_load_cuda() })
}

/// Number of CUDA devices that the driver lets this process see (`CUDA_VISIBLE_DEVICES`), or what is missing. Asks the
/// driver alone: libtorch's CUDA half need not be loaded.
pub fn driver_device_count() -> Result<usize, TorchError> {
    let mut count = 0;
    // SAFETY: `count` is a place for one i32.
    check("accelerator::driver_device_count", unsafe { ffi::fte_cuda_driver_count(&mut count) })?;
    Ok(count as usize)
}

/// A CUDA device, as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `NVIDIA H100 80GB HBM3`, say.
    pub name: String,
    pub total_memory_bytes: u64,
    /// `0000:1b:00.0`, in lower case: the device's folder in `/sys/bus/pci/devices`.
    pub pci_bus_id: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
}

/// Mirrors `RawDeviceInfo` in cpp/cuda.cpp.
#[repr(C)]
pub(crate) struct RawDeviceInfo {
    name: [c_char; 256],
    pci_bus_id: [c_char; 32],
    total_memory_bytes: u64,
    compute_major: i32,
    compute_minor: i32,
}

/// Describes `Device::Cuda(index)`; asks the driver alone.
pub fn device_info(index: usize) -> Result<DeviceInfo, TorchError> {
    let mut raw = RawDeviceInfo {
        name: [0; 256],
        pci_bus_id: [0; 32],
        total_memory_bytes: 0,
        compute_major: 0,
        compute_minor: 0,
    };
    // SAFETY: `raw` is a place for the answer.
    check("accelerator::device_info", unsafe { ffi::fte_cuda_device_info(index as i32, &mut raw) })?;
    Ok(DeviceInfo {
        name: text(&raw.name),
        total_memory_bytes: raw.total_memory_bytes,
        pci_bus_id: text(&raw.pci_bus_id).to_lowercase(),
        compute_capability: (raw.compute_major as u32, raw.compute_minor as u32),
    })
}

fn text<const N: usize>(chars: &[c_char; N]) -> String {
    let bytes = chars.map(|c| c as u8);
    CStr::from_bytes_until_nul(&bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Makes libtorch choose only CUDA algorithms that give the same bits each time; an operation that has none becomes an
/// error. Call it at the start: it sets `CUBLAS_WORKSPACE_CONFIG` and `NCCL_ALGO`, where they are not set, for
/// cuBLAS and NCCL to find. On CPU everything is deterministic without it.
pub fn set_deterministic(on: bool) -> Result<(), TorchError> {
    // SAFETY: plain data; by the contract above no other thread reads the environment yet.
    check("accelerator::set_deterministic", unsafe { ffi::fte_set_deterministic(on) })
}

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
