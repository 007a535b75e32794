//! Bandwidth of the back ends: `bandwidth [WORLD_SIZE [ROUNDS [shm|mpi|nccl]]]` starts that many ranks of itself (default 2,
//! 20 rounds, shm) and prints a JSON line for each collective and size. `mpi` needs the crate's feature, and `mpirun`; `nccl`
//! a GPU for each rank.
//!
//! Bandwidth = bytes of the full buffer / time of a round, the median over rounds of the slowest rank. A round of
//! `all_gather` is what a parameter gather does: copy the own range into the slot, start, wait, release. A round of
//! `reduce_scatter` begins with gradients in the buffer, as backward leaves them: start, wait (with the sum into the
//! shard), begin the next. A round of `all_reduce` is one of a plain f32 tensor, in place.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use fsdp_comm::{ProcessGroup, ReduceOp, Segment};
use fsdp_control::ExitStatus;
use fsdp_control::env::{StartedBy, WorkerEnv, prepared_vars};
use fsdp_control::lifeline;
use fsdp_control::store::{Store, StoreServer};
use fsdp_torch_ext::accelerator;
use tch::{Device, Kind, Tensor};

const SIZES_MIB: [usize; 2] = [16, 64];
const GPU_SIZES_MIB: [usize; 3] = [16, 64, 256];
const NUM_WARMUP: usize = 3;

fn main() -> ExitCode {
    let number = |i: usize, default: usize| std::env::args().nth(i).map_or(Ok(default), |arg| arg.parse());
    let backend = std::env::args().nth(3).unwrap_or_else(|| "shm".into());
    let (Ok(world_size @ 1..), Ok(rounds @ 1..), "shm" | "mpi" | "nccl") =
        (number(1, 2), number(2, 20), backend.as_str())
    else {
        eprintln!("usage: bandwidth [WORLD_SIZE [ROUNDS [shm|mpi|nccl]]]");
        return ExitStatus::BadInput.into();
    };
    match WorkerEnv::from_env() {
        Ok(env) => rank(&env, rounds, &backend),
        Err(_) => launch(world_size, &backend),
    }
}

/// Starts the ranks, with the same arguments.
fn launch(world_size: usize, backend: &str) -> ExitCode {
    let server = StoreServer::bind(("127.0.0.1", 0)).expect("a free port");
    let port = server.local_addr().port();
    let program = std::env::current_exe().expect("this program has a path");
    let mut children = Vec::new();
    if backend == "mpi" {
        let mut command = Command::new("mpirun");
        command.args(["--oversubscribe", "--allow-run-as-root", "-n", &world_size.to_string()]).arg(program);
        command.args(std::env::args().skip(1)).envs(prepared_vars("127.0.0.1", port, None));
        children.extend(command.spawn().inspect_err(|error| eprintln!("bandwidth: mpirun: {error}")));
    } else {
        for rank in 0..world_size {
            let env = WorkerEnv {
                started_by: StartedBy::Launcher,
                run_id: None,
                rank,
                local_rank: rank,
                world_size,
                local_world_size: world_size,
                group_rank: 0,
                master_addr: "127.0.0.1".into(),
                master_port: port,
                lifeline_fd: None,
                progress_fd: None,
                terminal_width: None,
            };
            let mut command = Command::new(&program);
            command.args(std::env::args().skip(1)).envs(env.vars());
            lifeline::prepare_child(&mut command, &[]);
            children.push(command.spawn().expect("this program can be started again"));
        }
    }
    let ok = children.iter_mut().all(|child| child.wait().is_ok_and(|status| status.success()));
    if ok && !children.is_empty() { ExitStatus::Done } else { ExitStatus::Failed }.into()
}

fn rank(env: &WorkerEnv, rounds: usize, backend: &str) -> ExitCode {
    tch::set_num_threads(1);
    let timeout = Duration::from_secs(60);
    let gpu = Device::Cuda(env.local_rank);
    if backend == "nccl"
        && let Err(error) = accelerator::load_cuda().and_then(|()| accelerator::set_current(gpu))
    {
        eprintln!("bandwidth: {error}");
        return ExitStatus::BadInput.into();
    }
    let connect = |mut store: Store| match backend {
        "mpi" => ProcessGroup::connect_mpi(&mut store, env.rank, env.world_size, timeout, None),
        "nccl" => ProcessGroup::connect_nccl(&mut store, env.rank, env.world_size, gpu, timeout, None),
        _ => ProcessGroup::connect_shm(&mut store, env.rank, env.world_size, timeout, None),
    };
    let result = Store::connect((&env.master_addr, env.master_port), timeout)
        .map_err(fsdp_comm::CommError::from)
        .and_then(connect)
        .and_then(|mut group| {
            measure(&mut group, rounds, backend)?;
            group.close()
        });
    match result {
        Ok(()) => ExitStatus::Done.into(),
        Err(error) => {
            eprintln!("bandwidth: {error}");
            ExitStatus::Failed.into()
        }
    }
}

fn measure(group: &mut ProcessGroup, rounds: usize, backend: &str) -> Result<(), fsdp_comm::CommError> {
    let (rank, world_size, device) = (group.rank(), group.world_size(), group.device());
    let sizes: &[usize] = if device == Device::Cpu { &SIZES_MIB } else { &GPU_SIZES_MIB };
    for &mib in sizes {
        let n = (mib << 20) / 4 / world_size; // f32 elements of a rank's range
        let segments = [Segment { kind: Kind::Float, offset_bytes: 0, numel: n * world_size }];
        let shard = Tensor::ones([n as i64], (Kind::Float, device));

        let mut slot = group.new_gather_buffer("slot", n * world_size * 4)?;
        let mut own = slot.view(Kind::Float, rank * n * 4, n);
        report(group, backend, "all_gather", mib, rounds, |group| {
            group.begin_write(&mut slot, "bench")?;
            own.copy_(&shard);
            group.start_all_gather(&mut slot, &segments, "bench")?;
            group.wait_all_gather(&mut slot)?;
            group.release(&mut slot)
        })?;

        let mut grads = group.new_reduce_buffer("grads", n * world_size * 4)?;
        group.begin_reduce(&mut grads, "bench")?;
        let _ = grads.view(Kind::Float, 0, n * world_size).fill_(1.0);
        report(group, backend, "reduce_scatter", mib, rounds, |group| {
            group.start_reduce_scatter(&mut grads, &segments, "bench")?;
            group.wait_reduce_scatter(&mut grads, &[&shard], false)?;
            group.begin_reduce(&mut grads, "bench")
        })?;

        let tensor = Tensor::zeros([(n * world_size) as i64], (Kind::Float, device));
        report(group, backend, "all_reduce", mib, rounds, |group| group.all_reduce(&tensor, ReduceOp::Sum))?;
    }
    Ok(())
}

/// Times rounds of one collective; rank 0 prints.
fn report(
    group: &mut ProcessGroup,
    backend: &str,
    name: &str,
    mib: usize,
    rounds: usize,
    mut round: impl FnMut(&mut ProcessGroup) -> Result<(), fsdp_comm::CommError>,
) -> Result<(), fsdp_comm::CommError> {
    let mut secs = Vec::new();
    for i in 0..NUM_WARMUP + rounds {
        group.barrier()?;
        let start = Instant::now();
        round(group)?;
        if group.device() != Device::Cpu {
            accelerator::synchronize(group.device())?;
        }
        let slowest = Tensor::from_slice(&[start.elapsed().as_secs_f64()]).to_device(group.device());
        group.all_reduce(&slowest, ReduceOp::Max)?;
        if i >= NUM_WARMUP {
            secs.push(slowest.double_value(&[0]));
        }
    }
    secs.sort_by(f64::total_cmp);
    let median = secs[secs.len() / 2];
    if group.rank() == 0 {
        let gib_per_sec = mib as f64 / 1024.0 / median;
        println!(
            r#"{{"backend":"{backend}","collective":"{name}","world_size":{},"mib":{mib},"secs":{median:.6},"gib_per_sec":{gib_per_sec:.3}}}"#,
            group.world_size()
        );
    }
    Ok(())
}
