//! Which device computes and what carries the collectives: "auto" becomes what the machine has, and what it lacks is
//! refused before any rank starts.

use fsdp_config::{Backend, Device, JobConfig};

use crate::failure::Failure;
use crate::machine;

/// Sets `fsdp.device` and `fsdp.backend` to what they come to on this machine, never "auto".
///
/// `num_ranks` is this machine's; `num_nodes` counts launchers.
///
/// # Errors
/// The machine lacks what the config asks for, or the two contradict each other.
pub fn resolve(config: &mut JobConfig, num_nodes: usize, num_ranks: usize) -> Result<(), Failure> {
    let (device, backend) = resolved(config, num_nodes, num_ranks, machine::num_gpus()).map_err(Failure::bad_input)?;
    (config.fsdp.device, config.fsdp.backend) = (device, backend);
    Ok(())
}

fn resolved(
    config: &JobConfig,
    num_nodes: usize,
    num_ranks: usize,
    num_gpus: usize,
) -> Result<(Device, Backend), String> {
    let no_gpu = |key: &str, value: &str, instead: &str| {
        let hidden = match std::env::var_os("CUDA_VISIBLE_DEVICES") {
            Some(list) => format!(" (CUDA_VISIBLE_DEVICES is {list:?})"),
            None => String::new(),
        };
        Err(format!("[fsdp] {key}: expected an NVIDIA GPU for {value:?}, got none: no /dev/nvidia0{hidden}; {instead}"))
    };
    let fsdp = &config.fsdp;
    let device = match fsdp.device {
        Device::Cpu if fsdp.backend == Backend::Nccl => {
            return Err(
                "[fsdp] backend: expected \"shm\" or \"mpi\" with device = \"cpu\", got \"nccl\", which is for \
                        GPUs; change one of the two"
                    .to_owned(),
            );
        }
        Device::Cuda if num_gpus == 0 => return no_gpu("device", "cuda", "use \"cpu\" or \"auto\""),
        Device::Auto if num_gpus == 0 && fsdp.backend == Backend::Nccl => {
            return no_gpu("backend", "nccl", "use --backend auto");
        }
        Device::Auto if num_gpus == 0 => Device::Cpu,
        Device::Auto => Device::Cuda,
        device => device,
    };
    let backend = match fsdp.backend {
        Backend::Auto if device == Device::Cuda => Backend::Nccl,
        Backend::Auto if num_nodes > 1 => Backend::Mpi,
        Backend::Auto => Backend::Shm,
        backend => backend,
    };
    if backend == Backend::Nccl && num_ranks > num_gpus {
        return Err(format!(
            "--nproc: NCCL wants one GPU a rank: {num_gpus} GPUs, --nproc {num_ranks}; start fewer ranks, or let them \
             share GPUs through the host's memory with --backend shm"
        ));
    }
    if backend == Backend::Mpi && num_nodes > 1 {
        let got = match fsdp.backend {
            Backend::Auto => "\"auto\" without GPUs, which is \"mpi\": its ranks are started by one mpirun or srun",
            _ => "\"mpi\", whose ranks are started by one mpirun or srun",
        };
        return Err(format!(
            "[fsdp] backend: expected \"nccl\" with a launcher on each node, got {got} on all nodes; call fsdp-launch \
             --backend mpi once in the batch script of a SLURM job, or start fsdp-train CONFIG with srun --mpi=pmix, or \
             with mpirun -H HOST:RANKS,..."
        ));
    }
    Ok((device, backend))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(device: &str, backend: &str) -> JobConfig {
        let text = format!(
            "[model]\npath = \"m\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 1\nseq_len = 8\n[data]\ntrain = [\"a\"]\n\
             [fsdp]\ndevice = \"{device}\"\nbackend = \"{backend}\"\n"
        );
        JobConfig::parse("job", &text).unwrap()
    }

    #[test]
    fn auto_becomes_what_the_machine_has() {
        // (Device, backend, nodes, ranks, GPUs) -> (device, backend).
        for (device, backend, nodes, ranks, gpus, expected) in [
            ("auto", "auto", 1, 4, 0, ("cpu", "shm")),
            ("auto", "auto", 1, 4, 4, ("cuda", "nccl")),
            ("auto", "auto", 2, 4, 8, ("cuda", "nccl")),
            ("cpu", "auto", 1, 4, 8, ("cpu", "shm")),
            ("auto", "shm", 1, 2, 1, ("cuda", "shm")),
            ("auto", "shm", 2, 2, 0, ("cpu", "shm")),
            ("auto", "mpi", 1, 2, 0, ("cpu", "mpi")),
            ("auto", "mpi", 1, 2, 1, ("cuda", "mpi")),
            ("cuda", "nccl", 1, 1, 1, ("cuda", "nccl")),
        ] {
            let (got_device, got_backend) = resolved(&job(device, backend), nodes, ranks, gpus).unwrap();
            assert_eq!((got_device.name(), got_backend.name()), expected, "{device} {backend} {nodes} {ranks} {gpus}");
        }
    }

    #[test]
    fn what_the_machine_lacks_is_named() {
        for (device, backend, nodes, ranks, gpus, says) in [
            ("cuda", "auto", 1, 1, 0, "[fsdp] device: expected an NVIDIA GPU for \"cuda\", got none: no /dev/nvidia0"),
            ("auto", "nccl", 1, 1, 0, "[fsdp] backend: expected an NVIDIA GPU for \"nccl\", got none: no /dev/nvidia0"),
            ("cpu", "nccl", 1, 1, 8, "which is for GPUs"),
            ("auto", "nccl", 1, 4, 2, "NCCL wants one GPU a rank: 2 GPUs, --nproc 4"),
            ("auto", "auto", 1, 4, 2, "NCCL wants one GPU a rank: 2 GPUs, --nproc 4"),
            ("cpu", "auto", 2, 4, 2, "expected \"nccl\" with a launcher on each node, got \"auto\" without GPUs"),
            ("auto", "mpi", 2, 4, 0, "expected \"nccl\" with a launcher on each node, got \"mpi\""),
        ] {
            let message = resolved(&job(device, backend), nodes, ranks, gpus).unwrap_err();
            assert!(message.contains(says), "{device} {backend}: {message}");
        }
    }
}
