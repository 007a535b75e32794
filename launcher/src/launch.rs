//! A run up to the start of its ranks: checks, and the launchers of all nodes.

use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fsdp_config::{Backend, Strategy};
use fsdp_control::{ExitStatus, host_name, ports};
use rustix::event::{PollFd, PollFlags};

use crate::attempts::{self, Ranks};
use crate::cli::{JobArgs, RunArgs};
use crate::failure::Failure;
use crate::link::{Assignment, Farewell, Hello, Message};
use crate::meeting;
use crate::nodes::{self, Nodes};
use crate::place::Place;
use crate::preflight::{Checked, load_config, preflight};
use crate::signals::{Arrived, Signals};
use crate::worker;

/// How long a node whose config cannot be read tries to tell the others: what the config has where it does not say.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(600);

/// Runs the job to its end.
pub fn launch(args: &RunArgs) -> Result<ExitStatus, Failure> {
    let place = Place::find(args)?;
    // From here on a signal does not end the launcher: it ends the run.
    let mut signals = Signals::install().map_err(|e| Failure::failed(format!("cannot take over signals: {e}")))?;
    let checked = preflight_until_signal(&args.job, place.num_nodes, &mut signals);
    let dir = checked.as_ref().ok().map(|checked| checked.config.output.dir.clone());
    let result = meet(&place, args, checked, &mut signals).and_then(|(mut nodes, ranks, checked)| {
        let result = attempts::run(&place, &ranks, &checked, &mut nodes, &mut signals);
        if let Err(failure) = &result {
            // The head's word is the run's status; what it hears from others it judges itself.
            let dir = &checked.config.output.dir;
            let failure = if nodes.is_head { failure.with_checkpoint(dir) } else { failure.clone() };
            nodes.give_up(&format!("node {} (host {})", place.node_rank, host_name()), &failure);
        }
        result
    });
    // What the launcher itself fails at takes no checkpoint away.
    result.map_err(|failure| dir.map_or(failure.clone(), |dir| failure.with_checkpoint(&dir)))
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
    args: &RunArgs,
    mut checked: Result<Checked, Failure>,
    signals: &mut Signals,
) -> Result<(Nodes, Ranks, Checked), Failure> {
    let (job, num_local, max_restarts) = (&args.job, args.job.nproc, args.max_restarts);
    // Of this launcher where it is the head, which all ranks then have.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let run_id = format!("{}-{}", since_epoch.as_secs(), std::process::id());
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
        return Ok((Nodes::alone(), Ranks { first_rank: 0, num_local, world_size, run_id, max_restarts }, checked));
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
        worker: worker::find().and_then(|worker| worker::digest(&worker)).unwrap_or_default(),
        job: match &checked {
            Ok(checked) => Ok(checked.config.to_toml()),
            Err(failure) => Err(failure.into()),
        },
    };
    if !place.is_head() {
        let joined = nodes::join(place, hello, patience, signals);
        // What is wrong here is more to the point than what the head makes of it, or that it was not there.
        let checked = checked?;
        let (nodes, assignment) = joined?;
        let Assignment { first_rank, world_size, run_id, max_restarts, .. } = assignment;
        return Ok((nodes, Ranks { first_rank, num_local, world_size, run_id, max_restarts }, checked));
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
    Ok((nodes, Ranks { first_rank: 0, num_local, world_size, run_id, max_restarts }, checked))
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
            std::io::ErrorKind::AddrInUse => {
                let holder = ports::holder(place.master_port).unwrap_or_else(|| "another process".to_owned());
                format!("{holder} uses it; choose another --master-port on all machines")
            }
            _ => "choose another --master-port on all machines".to_owned(),
        };
        Failure::bad_input(format!("cannot listen on port {}: {error}; {hint}", place.master_port))
    })
}

/// The address that stands for all interfaces, of the kind that the master address has.
pub fn all_interfaces(place: &Place) -> Result<&'static str, Failure> {
    let mut addrs = (place.master_addr.as_str(), place.master_port).to_socket_addrs().map_err(|error| {
        Failure::bad_input(format!(
            "--master-addr: expected a name or address of this machine, got {:?}: {error}",
            place.master_addr
        ))
    })?;
    Ok(if addrs.any(|addr| addr.is_ipv4()) { "0.0.0.0" } else { "::" })
}
