//! A run: from what was typed to the ranks, and what became of them.

use std::io::IsTerminal;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fsdp_checkpoint::sharded;
use fsdp_config::{Backend, Resume, Strategy};
use fsdp_control::env::{StartedBy, WorkerEnv, prepared_vars};
use fsdp_control::lifeline::{self, Lifeline};
use fsdp_control::lock::Lock;
use fsdp_control::progress::Progress;
use fsdp_control::store::StoreServer;
use fsdp_control::{ControlError, ExitStatus, error_file, host_name};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal};

use crate::cli::{JobArgs, RunArgs};
use crate::failure::Failure;
use crate::folder;
use crate::link::{Farewell, Hello, Message};
use crate::meeting;
use crate::mpirun::{self, MpirunStart};
use crate::nodes::{self, Nodes};
use crate::place::Place;
use crate::preflight::{Checked, load_config, preflight};
use crate::rank::{RankProcess, RankStart};
use crate::signals::{Arrived, Signals};
use crate::supervise::Supervisor;
use crate::{processes, verdict, worker};

/// How long the kernel has to end what ranks left behind.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(2);

/// How long the terminal has to take the report.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// How long a node whose config cannot be read tries to tell the others: what the config has where it does not say.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(600);

/// Runs the job to its end.
pub fn launch(args: &RunArgs) -> Result<ExitStatus, Failure> {
    let place = Place::find(args)?;
    // From here on a signal does not end the launcher: it ends the run.
    let mut signals = Signals::install().map_err(|e| Failure::failed(format!("cannot take over signals: {e}")))?;
    let checked = preflight_until_signal(&args.job, place.num_nodes, &mut signals);
    let (mut nodes, ranks, checked) = meet(&place, &args.job, checked, &mut signals)?;
    let result = run(&place, &ranks, &checked, &mut nodes, &mut signals);
    if let Err(failure) = &result {
        nodes.give_up(&format!("node {} (host {})", place.node_rank, host_name()), failure);
    }
    result
}

/// The ranks of this node among all.
#[derive(Debug)]
struct LocalRanks {
    first_rank: usize,
    num_local: usize,
    world_size: usize,
}

/// Checks the job on a thread of its own, because it may take long, and a signal is to end it at once.
///
/// # Errors
/// Something is wrong with the job, or a signal.
fn preflight_until_signal(job: &JobArgs, num_nodes: usize, signals: &mut Signals) -> Result<Checked, Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot run the checks: {error}"));
    let (here, there) = UnixStream::pair().map_err(failed)?;
    let job = job.clone();
    let check = move || {
        // Dropping it makes the other end readable.
        let _there = there;
        preflight(&job, num_nodes)
    };
    // Where a signal comes first, the thread ends with the process: it reads files and holds nothing.
    let checks = std::thread::Builder::new().name("preflight".to_owned()).spawn(check).map_err(failed)?;
    loop {
        let mut fds = vec![PollFd::new(&here, PollFlags::IN)];
        fds.extend(signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let is_done = !fds[0].revents().is_empty();
        if signals.take() != Arrived::Nothing {
            return Err(nodes::stopped_early());
        }
        if is_done {
            return checks.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }
}

/// Comes together with the other nodes' launchers, if there are any.
///
/// # Errors
/// The job is wrong here or elsewhere, nodes do not come or differ, or a signal. All launchers have been told.
fn meet(
    place: &Place,
    job: &JobArgs,
    mut checked: Result<Checked, Failure>,
    signals: &mut Signals,
) -> Result<(Nodes, LocalRanks, Checked), Failure> {
    let num_local = job.nproc;
    if place.num_nodes == 1 {
        let checked = checked?;
        let is_mpi = checked.config.fsdp.backend == Backend::Mpi;
        let num_machines = if is_mpi { place.num_machines } else { 1 };
        if place.num_machines > num_machines {
            crate::say(&format!(
                "fsdp-launch: warning: this SLURM job has {} nodes, and this run uses one; use all with srun \
                 --ntasks-per-node=1 fsdp-launch",
                place.num_machines
            ));
        }
        let world_size = num_local * num_machines;
        checked.check_ranks(world_size, num_local)?;
        return Ok((Nodes::alone(), LocalRanks { first_rank: 0, num_local, world_size }, checked));
    }
    let patience = match &mut checked {
        Ok(checked) => Duration::from_secs(checked.config.fsdp.timeout_secs),
        Err(failure) => {
            failure.message = format!("node {} (host {}): {}", place.node_rank, host_name(), failure.message);
            // The others may come much later; they are to hear it all the same.
            failure.say();
            match failure.status {
                ExitStatus::Stopped => nodes::STOPPED_PATIENCE,
                _ => load_config(job).map_or(REFUSAL_PATIENCE, |c| Duration::from_secs(c.fsdp.timeout_secs)),
            }
        }
    };
    let hello = Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        num_nodes: place.num_nodes,
        node_rank: place.node_rank,
        host: host_name(),
        machine: fsdp_control::machine_identity(),
        num_ranks: num_local,
        job: match &checked {
            Ok(checked) => Ok(checked.config.to_toml()),
            Err(failure) => Err(failure.into()),
        },
    };
    if !place.is_head() {
        let joined = nodes::join(place, hello, patience, signals);
        // What is wrong here is more to the point than what the head makes of it, or that it was not there.
        let checked = checked?;
        let (nodes, first_rank, world_size) = joined?;
        return Ok((nodes, LocalRanks { first_rank, num_local, world_size }, checked));
    }
    let gathered = listen(place).and_then(|listener| meeting::gather(listener, &hello, patience, signals));
    let checked = checked?;
    let (mut nodes, hellos) = gathered?;
    let world_size = num_local + hellos.iter().map(|hello| hello.num_ranks).sum::<usize>();
    let fits = checked.check_ranks(world_size, num_local).and_then(|()| check_nodes(&checked, &hello, &hellos));
    if let Err(failure) = fits {
        nodes.dismiss(&Message::Verdict(Farewell::from(&failure)));
        return Err(failure);
    }
    Ok((nodes, LocalRanks { first_rank: 0, num_local, world_size }, checked))
}

/// Checks what depends on which nodes came.
fn check_nodes(checked: &Checked, head: &Hello, others: &[Hello]) -> Result<(), Failure> {
    let fsdp = &checked.config.fsdp;
    if fsdp.backend == Backend::Shm
        && let Some(other) = others.iter().find(|other| other.machine != head.machine)
    {
        return Err(Failure::bad_input(format!(
            "[fsdp] backend: expected \"nccl\" for nodes on several machines, got \"shm\", which is for one (node 0 is host \
             {}, node {} is host {}); change it, or use one machine",
            head.host, other.node_rank, other.host
        )));
    }
    if fsdp.strategy == Strategy::HybridShard
        && fsdp.shard_size.is_none()
        && let Some(other) = others.iter().find(|other| other.num_ranks != head.num_ranks)
    {
        return Err(Failure::bad_input(format!(
            "[fsdp] shard_size: expected as many ranks on all nodes where it is not set, got {} on node 0 (host {}) and {} \
             on node {} (host {}); set it, or give all nodes the same --nproc",
            head.num_ranks, head.host, other.num_ranks, other.node_rank, other.host
        )));
    }
    Ok(())
}

/// Listens on the master port of all interfaces.
fn listen(place: &Place) -> Result<TcpListener, Failure> {
    let host = all_interfaces(place)?;
    TcpListener::bind((host, place.master_port)).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another process uses it; choose another --master-port on all machines",
            _ => "choose another --master-port on all machines",
        };
        Failure::bad_input(format!("cannot listen on port {}: {error}; {hint}", place.master_port))
    })
}

/// The address that stands for all interfaces, of the kind that the master address has.
fn all_interfaces(place: &Place) -> Result<&'static str, Failure> {
    let mut addrs = (place.master_addr.as_str(), place.master_port).to_socket_addrs().map_err(|error| {
        Failure::bad_input(format!(
            "--master-addr: expected a name or address of this machine, got {:?}: {error}",
            place.master_addr
        ))
    })?;
    Ok(if addrs.any(|addr| addr.is_ipv4()) { "0.0.0.0" } else { "::" })
}

/// Starts the ranks of this node and stays with them to their end.
fn run(
    place: &Place,
    ranks: &LocalRanks,
    checked: &Checked,
    nodes: &mut Nodes,
    signals: &mut Signals,
) -> Result<ExitStatus, Failure> {
    let worker = worker::find()?;
    // Within a SLURM job mpirun may start even a few ranks on another node than this one.
    let is_spread = checked.mpirun.is_some() && std::env::var_os("SLURM_JOB_ID").is_some();
    let is_on_one_machine = place.num_nodes == 1 && ranks.num_local == ranks.world_size && !is_spread;
    let dir = &checked.config.output.dir;
    let log_dir = dir.join("logs");
    folder::create_dir(&log_dir)?;
    // The folder may be one for all nodes: the head's launcher alone locks it and owns what has no node in its name.
    let (config_path, _lock) = match place.node_rank {
        0 => {
            let lock = Lock::take(dir, "fsdp-launch").map_err(Failure::bad_input)?;
            error_file::remove_all(&log_dir).map_err(Failure::bad_input)?;
            (dir.join("config.toml"), Some(lock))
        }
        node_rank => (dir.join(format!("config.node-{node_rank}.toml")), None),
    };
    folder::write_resolved(&checked.config, &config_path)?;
    let store = if place.is_head() { Some(serve_store(place, is_on_one_machine)?) } else { None };
    let master_port = store.as_ref().map_or(place.master_port, |store| store.local_addr().port());

    let spare = processes::children();
    lifeline::become_subreaper().map_err(Failure::failed)?;
    let lifeline = Lifeline::new().map_err(Failure::failed)?;
    let progress = Progress::create(ranks.num_local).map_err(Failure::failed)?;
    let inherit = [lifeline.inherit_fd(), progress.inherit_fd()];
    if signals.take() != Arrived::Nothing {
        return Err(nodes::stopped_early());
    }
    nodes.start_all();
    let started = if let Some(mpirun) = &checked.mpirun {
        let mpi_master_addr = if is_on_one_machine { place.master_addr.clone() } else { host_name() };
        let start = MpirunStart {
            mpirun,
            worker: &worker,
            config: &config_path,
            log_dir: &log_dir,
            vars: &prepared_vars(&mpi_master_addr, master_port, terminal_width()),
            num_ranks: ranks.world_size,
            num_local_ranks: ranks.num_local,
            store: store.as_ref().expect("mpirun is the only node's").local_addr(),
        };
        vec![RankProcess::start_mpirun(&start).map_err(|e| Failure::failed(format!("cannot start mpirun: {e}")))?]
    } else {
        start_ranks(ranks.num_local, &spare, |local_rank| RankStart {
            program: &worker,
            config: &config_path,
            env: WorkerEnv {
                started_by: StartedBy::Launcher,
                run_id: None,
                rank: ranks.first_rank + local_rank,
                local_rank,
                world_size: ranks.world_size,
                local_world_size: ranks.num_local,
                group_rank: place.node_rank,
                master_addr: place.master_addr.clone(),
                master_port,
                lifeline_fd: Some(lifeline.inherit_fd()),
                progress_fd: Some(progress.inherit_fd()),
                terminal_width: terminal_width(),
            },
            inherit: &inherit,
            log_dir: &log_dir,
        })?
    };

    let mut supervisor = Supervisor::new(started, &progress, &log_dir, signals, nodes);
    supervisor.run()?;
    drop(lifeline);
    processes::end_orphans(&spare, ORPHAN_PATIENCE);
    if checked.mpirun.is_some() {
        mpirun::remove_empty_outputs(&log_dir, ranks.world_size);
    }

    let (status, lines) = match supervisor.verdict.take() {
        Some(farewell) => (farewell.status(), farewell.lines),
        None => {
            // The report comes first, whatever the file system says.
            let checkpoints = sharded::list(&dir.join("checkpoints")).unwrap_or_else(|error| {
                supervisor.stderr.push_line(&format!("fsdp-launch: {error}"));
                Vec::new()
            });
            let newest = checkpoints.last().map(|(_, path)| path.as_path());
            let resumes = checked.config.checkpoint.resume == Resume::Auto;
            verdict::verdict(&supervisor.history, newest, resumes)
        }
    };
    lines.iter().for_each(|line| supervisor.stderr.push_line(line));
    if supervisor.nodes.is_head {
        supervisor.nodes.dismiss(&Message::Verdict(Farewell::new(status, lines)));
    }
    supervisor.stdout.finish(OUTPUT_PATIENCE);
    supervisor.stderr.finish(OUTPUT_PATIENCE);
    Ok(status)
}

fn serve_store(place: &Place, is_on_one_machine: bool) -> Result<StoreServer, Failure> {
    let host = if is_on_one_machine { &place.master_addr } else { all_interfaces(place)? };
    StoreServer::bind((host, place.master_port)).map_err(|error| match error {
        ControlError::PortInUse { .. } | ControlError::StoreBind { .. } => Failure::bad_input(error),
        _ => Failure::failed(error),
    })
}

/// Starts all ranks, or none.
fn start_ranks<'a>(
    num_ranks: usize,
    spare: &[Pid],
    start: impl Fn(usize) -> RankStart<'a>,
) -> Result<Vec<RankProcess>, Failure> {
    let mut ranks: Vec<RankProcess> = Vec::with_capacity(num_ranks);
    for rank in 0..num_ranks {
        match RankProcess::start(start(rank)) {
            Ok(process) => ranks.push(process),
            Err(error) => {
                ranks.iter().for_each(|started| processes::signal_group(started.pid, Signal::KILL));
                processes::end_orphans(spare, ORPHAN_PATIENCE);
                return Err(Failure::failed(format!(
                    "cannot start rank {rank} of this machine's {num_ranks}: {error}"
                )));
            }
        }
    }
    Ok(ranks)
}

/// Columns of the terminal on stderr, where the progress is drawn.
fn terminal_width() -> Option<u16> {
    let stderr = std::io::stderr();
    if !stderr.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stderr).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}
