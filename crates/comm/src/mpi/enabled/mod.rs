//! Ranks under MPI. It needs MPI 3.1 (Open MPI, MPICH and those made from them).
//!
//! - `process.rs`: the process's MPI: start, end, error texts.
//! - `communicator.rs`: communicators, and the nonblocking collectives on addresses.
//! - `wait.rs`: waiting without burning a core; peers that stay away, or call something else.
//! - `buffers.rs`: gather and reduce buffers.
//! - `tensors.rs`: collectives on plain tensors.
//!
//! **Progress on call.** MPI moves data only inside of its own functions. Each call of a group lets everything go on that
//! was started; between two calls nothing moves but what the network's hardware does by itself.
//!
//! **Sums are made here**, in order of rank and in f32, by the loops of `shm`: so both back ends give the same bits, bf16
//! and f16 are rounded once, and NaN wins a maximum, of which MPI's operations promise nothing. MPI carries the summands:
//! an all-to-all of the ranges, then, where all ranks want the sum, an all-gather of the summed ranges. That moves no more
//! bytes than MPI's own algorithms, and Open MPI's reduce-scatter is the slower one by far.
//!
//! **A communicator for each buffer**, and some more. Collectives of one communicator must be started in the same order by
//! all ranks; those on different buffers may change places.
//!
//! **What is not told apart.** Ranks that call different collectives are found out when one of them has waited for the
//! group's timeout. If the calls are on one buffer, or both on plain tensors, they may meet: then MPI objects to the lengths
//! (Open MPI), or does not and the data is wrong (MPICH). Finding that out costs another message in each call, which this
//! program's fixed order does not need. A rank that dies is the business of `mpirun` or `srun`, which end the others.

mod buffers;
mod communicator;
mod process;
mod tensors;
mod wait;

use std::path::Path;
use std::time::Duration;

use fsdp_control::progress::{Op, ProgressHandle};
use fsdp_control::store::Store;
use tch::{Device, Kind, Tensor};

use crate::flight::FlightRecord;
use crate::{Call, CommError};
use communicator::Communicator;
use process::Failed;
use tensors::Queue;

pub use buffers::{MpiGatherBuffer, MpiReduceBuffer};
pub use process::abort_job;

/// What the first collective of a group is for, in messages.
const RENDEZVOUS: &str = "rendezvous";

/// This rank's side of a group of processes that an MPI job started.
#[derive(Debug)]
pub struct MpiGroup {
    /// For making others, and for what ranks tell each other when a wait was too long.
    communicator: Communicator,
    queue: Queue,
    /// By rank of the group: its rank in the run.
    run_ranks: Vec<usize>,
    timeout: Duration,
    calls: FlightRecord,
    /// Not split from another one: MPI ends with it.
    is_first: bool,
}

impl MpiGroup {
    pub(crate) fn connect(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        let calls = FlightRecord::new("world", progress);
        // MPI's start waits for all processes without a limit, so they meet at the store before.
        let number = store.add(&format!("mpi/rank-{rank}/groups"), 1)?;
        if let Some(progress) = calls.progress() {
            let upcoming = calls.upcoming(Op::Barrier, 0, RENDEZVOUS);
            progress.enter(upcoming.op, upcoming.seq, &upcoming.unit, upcoming.num_bytes);
        }
        store.barrier(&format!("mpi/{number}/start"), rank, world_size, timeout)?;

        let failed = |Failed(message)| CommError::Mpi { rank, message, call: None };
        process::start().map_err(failed)?;
        let world = Communicator::world().map_err(failed)?;
        if world.size() != world_size {
            let missing = format!(
                "MPI knows {} process(es) of this job and the run has {world_size} rank(s): all ranks must be started by \
                 one `mpirun`, or one `srun` with the --mpi that the library was built for (such as pmix)",
                world.size()
            );
            return Err(CommError::Unavailable { backend: "mpi", missing });
        }
        // Our ranks, whatever order MPI has.
        let communicator = world.split(0, rank).map_err(failed)?;
        if communicator.rank() != rank {
            let message = format!("two processes say that they are rank {}", communicator.rank().min(rank));
            return Err(CommError::Mpi { rank, message, call: None });
        }
        let mut group = Self::new(communicator, (0..world_size).collect(), timeout, calls)?;
        group.is_first = true;
        Ok(group)
    }

    /// The store is for other back ends.
    pub(crate) fn split(&mut self, _: &mut Store, color: usize, name: &str) -> Result<Self, CommError> {
        let world_size = self.world_size();
        let colors = Tensor::zeros([world_size as i64], (Kind::Int64, Device::Cpu));
        // Also a meeting with a time limit before MPI's split, which has none.
        self.all_gather_into_tensor(&colors, &Tensor::from_slice(&[color as i64]))?;
        let run_ranks = (0..world_size)
            .filter(|&rank| colors.int64_value(&[rank as i64]) == color as i64)
            .map(|rank| self.run_ranks[rank])
            .collect();
        let communicator = self.communicator.split(color, self.rank()).map_err(|failed| self.error(failed, None))?;
        Self::new(communicator, run_ranks, self.timeout, self.calls.split(name))
    }

    fn new(
        communicator: Communicator,
        run_ranks: Vec<usize>,
        timeout: Duration,
        calls: FlightRecord,
    ) -> Result<Self, CommError> {
        // The queue is empty until it has communicators of its own.
        let queue = Queue::new(communicator, communicator);
        let mut group = MpiGroup { communicator, queue, run_ranks, timeout, calls, is_first: false };
        let call = group.calls.start(Op::Barrier, None, 0, 0, RENDEZVOUS);
        group.queue = Queue::new(group.duplicate(&call)?, group.duplicate(&call)?);
        group.calls.done(&call);
        Ok(group)
    }

    pub(crate) fn close(mut self) -> Result<(), CommError> {
        self.barrier()?; // with a time limit, which MPI's end has not
        if self.is_first { process::finish().map_err(|failed| self.error(failed, None)) } else { Ok(()) }
    }

    pub(crate) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    pub(crate) fn world_size(&self) -> usize {
        self.communicator.size()
    }

    pub(crate) fn write_flight_record(&self, path: &Path) -> Result<(), CommError> {
        self.calls.write(path)
    }

    /// A communicator of the same ranks for other collectives. Collective.
    fn duplicate(&mut self, call: &Call) -> Result<Communicator, CommError> {
        let started = self.communicator.start_duplicate();
        let (request, duplicate) = started.map_err(|failed| self.failed(failed, call))?;
        self.wait_requests(&mut [request], call)?;
        duplicate.finish().map_err(|failed| self.error(failed, Some(call)))
    }

    fn error(&self, Failed(message): Failed, call: Option<&Call>) -> CommError {
        CommError::Mpi { rank: self.run_ranks[self.rank()], message, call: call.cloned() }
    }
}
