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
    /// What the driver said where the choice was free and no GPU was found.
    pub why_cpu: Option<String>,
}

/// Chooses the device that the config asks for and makes it current.
///
/// # Errors
/// GPUs are asked for, or this machine has some, and the driver, a device or libtorch's CUDA half is missing.
pub fn choose(wanted: config::Device, env: &WorkerEnv) -> Result<ComputeDevice, TrainError> {
    let cpu = |why_cpu| Ok(ComputeDevice { device: Device::Cpu, info: None, num_gpus: 0, why_cpu });
    if wanted == config::Device::Cpu {
        return cpu(None);
    }
    let no_gpu = "the driver lets this process see no GPU (CUDA_VISIBLE_DEVICES?)".to_owned();
    let count = match (accelerator::driver_device_count().map_err(|error| error.to_string()), wanted) {
        (Ok(count @ 1..), _) => count,
        (Ok(0), config::Device::Auto) => return cpu(Some(no_gpu)),
        (Err(error), config::Device::Auto) => {
            let sign = gpu_sign(&|name| std::env::var(name).ok(), Path::new("/dev/nvidia0").exists());
            match sign {
                // The driver works.
                _ if error.contains(NO_DEVICE) => return cpu(Some(no_gpu)),
                None => return cpu(Some(error)),
                Some(sign) => return Err(missing(&sign, &error)),
            }
        }
        (Ok(_), _) => return Err(missing(ASKED_FOR, &no_gpu)),
        (Err(error), _) => return Err(missing(ASKED_FOR, &error)),
    };
    accelerator::load_cuda().map_err(|error| missing("there are GPUs", &error.to_string()))?;
    if accelerator::device_count()? == 0 {
        return Err(missing("there are GPUs", "libtorch finds no GPU: its CUDA version wants a newer driver"));
    }
    // More ranks than GPUs share them; NCCL refuses that, other back ends do not mind.
    let index = env.local_rank % count;
    let info = accelerator::device_info(index)?;
    if let Some(cores) = cores_near(&info.pci_bus_id) {
        tracing::info!("{} {index} ({}): bound to the {cores} cores next to it", info.name, info.pci_bus_id);
    }
    let device = Device::Cuda(index);
    accelerator::set_current(device)?;
    Ok(ComputeDevice { device, info: Some(info), num_gpus: count, why_cpu: None })
}

const ASKED_FOR: &str = "GPUs are asked for";

/// How the driver names its finding that there is none, or none that this process may use.
const NO_DEVICE: &str = "CUDA_ERROR_NO_DEVICE";

fn missing(sign: &str, what: &str) -> TrainError {
    TrainError::BadInput(format!("{sign}, but {what}; or train on the CPU with fsdp.device = \"cpu\""))
}

/// What says that this process is meant to have a GPU, so that a driver that fails is broken.
fn gpu_sign(variable: &dyn Fn(&str) -> Option<String>, has_device_file: bool) -> Option<String> {
    match variable("CUDA_VISIBLE_DEVICES").as_deref() {
        // Hidden on purpose; the last is SLURM's word.
        Some("" | "-1" | "NoDevFiles") => return None,
        Some(devices) => return Some(format!("CUDA_VISIBLE_DEVICES is {devices:?}")),
        None => {}
    }
    match variable("SLURM_JOB_GPUS").filter(|gpus| !gpus.is_empty()) {
        Some(gpus) => Some(format!("SLURM_JOB_GPUS is {gpus:?}")),
        None => has_device_file.then(|| "/dev/nvidia0 exists".to_owned()),
    }
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
    fn a_broken_driver_is_told_from_a_machine_without_gpus() {
        for (visible, job_gpus, has_file, expected) in [
            (None, None, false, None),
            (None, None, true, Some("/dev/nvidia0 exists")),
            (None, Some("0,1"), false, Some("SLURM_JOB_GPUS is \"0,1\"")),
            (None, Some(""), false, None),
            (Some("3"), None, false, Some("CUDA_VISIBLE_DEVICES is \"3\"")),
            (Some(""), Some("0"), true, None),
            (Some("-1"), None, true, None),
            (Some("NoDevFiles"), None, true, None),
        ] {
            let variable = |name: &str| match name {
                "CUDA_VISIBLE_DEVICES" => visible.map(str::to_owned),
                _ => job_gpus.map(str::to_owned),
            };
            let got = gpu_sign(&variable, has_file);
            assert_eq!(got.as_deref(), expected, "{visible:?}, {job_gpus:?}, {has_file}");
        }
    }

    #[test]
    fn cpu_lists_of_the_kernel_are_read() {
        assert_eq!(parse_cpu_list("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_cpu_list("5\n"), Some(vec![5]));
        assert_eq!(parse_cpu_list("\n"), None);
        assert_eq!(cores_near("ffff:ff:ff.f"), None);
    }
}
