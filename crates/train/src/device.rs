//! What a rank computes on: a GPU by its local rank, with the process on the cores next to it, or the CPU.

use std::path::Path;

use fsdp_config as config;
use fsdp_control::env::WorkerEnv;
use fsdp_torch_ext::accelerator::{self, DeviceInfo};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tch::Device;

use crate::error::TrainError;

/// A rank's device.
#[derive(Debug)]
pub struct ComputeDevice {
    pub device: Device,
    /// Of a GPU.
    pub info: Option<DeviceInfo>,
    /// That this process may use.
    pub num_gpus: usize,
}

/// Chooses the device that the config asks for and makes it current.
///
/// # Errors
/// GPUs are asked for, and the driver, a device or libtorch's CUDA half is missing.
pub fn choose(wanted: config::Device, env: &WorkerEnv) -> Result<ComputeDevice, TrainError> {
    let count = match (wanted, accelerator::driver_device_count()) {
        (config::Device::Cpu, _) | (config::Device::Auto, Err(_) | Ok(0)) => {
            return Ok(ComputeDevice { device: Device::Cpu, info: None, num_gpus: 0 });
        }
        (_, Ok(count @ 1..)) => count,
        (_, Ok(0)) => return Err(missing("the driver lets this process see no GPU (CUDA_VISIBLE_DEVICES?)")),
        (_, Err(error)) => return Err(missing(&error.to_string())),
    };
    accelerator::load_cuda().map_err(|error| missing(&error.to_string()))?;
    if accelerator::device_count()? == 0 {
        return Err(missing("libtorch finds no GPU: its CUDA version wants a newer driver"));
    }
    // More ranks than GPUs share them; NCCL refuses that, other back ends do not mind.
    let index = env.local_rank % count;
    let info = accelerator::device_info(index)?;
    if let Some(cores) = cores_near(&info.pci_bus_id) {
        tracing::info!("{} {index} ({}): bound to the {cores} cores next to it", info.name, info.pci_bus_id);
    }
    let device = Device::Cuda(index);
    accelerator::set_current(device)?;
    Ok(ComputeDevice { device, info: Some(info), num_gpus: count })
}

fn missing(what: &str) -> TrainError {
    TrainError::BadInput(format!("GPUs are asked for, but {what}; or train on the CPU with fsdp.device = \"cpu\""))
}

/// Binds this process to those of its cores that are next to the PCI device; returns how many. `None` where the system
/// does not say, or all of them are elsewhere.
fn cores_near(pci_bus_id: &str) -> Option<usize> {
    let path = Path::new("/sys/bus/pci/devices").join(pci_bus_id).join("local_cpulist");
    let near = parse_cpu_list(&std::fs::read_to_string(path).ok()?)?;
    let allowed = sched_getaffinity(None).ok()?;
    let mut set = CpuSet::new();
    let chosen: Vec<usize> = near.into_iter().filter(|&core| core < CpuSet::MAX_CPU && allowed.is_set(core)).collect();
    chosen.iter().for_each(|&core| set.set(core));
    (!chosen.is_empty() && sched_setaffinity(None, &set).is_ok()).then_some(chosen.len())
}

/// `0-15,32-47` as single numbers.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cores.extend(first.parse().ok()?..=last.parse::<usize>().ok()?.min(CpuSet::MAX_CPU));
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_of_the_kernel_are_read() {
        assert_eq!(parse_cpu_list("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_cpu_list("5\n"), Some(vec![5]));
        assert_eq!(parse_cpu_list("\n"), None);
        assert_eq!(cores_near("ffff:ff:ff.f"), None);
    }
}
