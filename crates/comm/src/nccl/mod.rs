//! A GPU for each rank, over NCCL.
//!
//! - `library.rs`: `libnccl.so.2`, loaded at run time.
//! - `communicator.rs`: one NCCL communicator, non-blocking; its errors, its end.
//! - `lane.rs`: streams, and the marks (events) by which they wait for each other.
//! - `memory.rs`, `gather.rs`, `reduce.rs`: the buffers.
//! - `plain.rs`: collectives on plain tensors.
//! - `watchdog.rs`, `failure.rs`, `board.rs`: errors and ranks that stay away; who is missing.
//!
//! # Streams and events
//!
//! The host issues work, and waits for the device in [`crate::ProcessGroup::barrier`] only. But it does wait in each
//! collective until NCCL's own thread has put it into its lane, and so for the device where a queue is full. Work goes
//! to *lanes*: the caller's (whichever stream is current, the *compute* lane below) and one of each group's own, where
//! its collectives run in the order of the calls. A group of all ranks or of a shard carries gathers and reduces in its
//! lane; the replicas' group has another one, so their all-reduce runs beside them.
//!
//! NCCL's streams and libtorch's do not wait for each other by themselves. **Every edge between lanes is an event, and a
//! buffer changes hands only through one:**
//!
//! | call | edge |
//! |---|---|
//! | `begin_write` | the lane waits for the buffer's *released* event |
//! | (the caller writes its range in the lane, `enter_gather_stream`) | none needed; written elsewhere, the lane waits for it |
//! | `shards_changed` | the lane waits for what compute holds: the optimizer's update |
//! | `start_all_gather` | records *gathered* in the lane |
//! | `wait_all_gather` | compute waits for *gathered* |
//! | `release` | records *released* in compute, after the last read |
//! | `begin_reduce` | compute waits for *drained* |
//! | `start_reduce_scatter` | the lane waits for what compute holds (the gradients); records *reduced* in the lane |
//! | `wait_reduce_scatter` | compute waits for *reduced*, takes the own range, records *drained* |
//! | plain tensors | the lane waits for compute at the start, compute for the lane at the end |
//!
//! So the next unit's gather waits only for the reader of its own slot, runs under the present unit's compute, and a
//! reduce-scatter runs under the next backward. That other *ranks* have released a slot needs no counter as in `shm`: a
//! collective moves data only once all its ranks are in it, and each comes into it after its own release.
//!
//! Memory that NCCL works on belongs to the group (buffers, kept until the process ends) or is held until compute has
//! waited for the lane (plain tensors), so libtorch's allocator, which knows only its own streams, never gives it to others
//! too early.
//!
//! # A group of one
//!
//! It asks NCCL for no collective: those in place have nothing to do, the others are a copy in the lane. All else (edges,
//! records, the watch) is as for more ranks. NCCL 2.28.9 loses some 200 bytes for each collective of one rank.
//!
//! # A known cost
//!
//! On a non-blocking communicator NCCL starts a thread for each group of calls, and the host waits until that thread is done
//! with putting them into the lane: so it is for each collective here. A communicator that blocks needs no thread, but a
//! call on it may not come back where a rank stays away, while it holds the lock that the watchdog needs to abort.

mod board;
mod communicator;
mod failure;
mod gather;
mod lane;
mod library;
mod memory;
mod plain;
mod reduce;
mod watchdog;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fsdp_control::progress::{Op, ProgressHandle};
use fsdp_control::store::Store;
use fsdp_torch_ext::accelerator;
use libloading::os::unix::Library as Handle;
use tch::{Device, Kind, Tensor};

use crate::flight::FlightRecord;
use crate::{Call, CommError};
use board::Board;
use communicator::Communicator;
use lane::{Lane, Mark};
use library::{Functions, Library, cudaStream_t, ncclComm_t, ncclUniqueId, unavailable};
use plain::Started;
use watchdog::Watchdog;

pub use gather::NcclGatherBuffer;
pub use lane::LaneGuard;
pub use library::missing_symbols;
pub use reduce::NcclReduceBuffer;

/// The NVIDIA driver's library.
const DRIVER: &str = "libcuda.so.1";

/// This rank's side of a group of processes with a GPU each.
#[derive(Debug)]
pub struct NcclGroup {
    device: Device,
    rank: usize,
    timeout: Duration,
    communicator: Arc<Communicator>,
    watchdog: Arc<Watchdog>,
    calls: FlightRecord,
    /// Where this group's collectives run.
    lane: Lane,
    /// For edges that nobody waits for later.
    passing: Mark,
    /// Collectives on plain tensors that were started and not waited for.
    started: VecDeque<Started>,
    last_number: u64,
    /// Marks to use again.
    spare: Vec<Mark>,
    /// One element, which a barrier sums.
    barrier: Tensor,
    /// Bytes of the buffers that NCCL has allocated.
    num_registered_bytes: u64,
}

impl NcclGroup {
    pub(crate) fn connect(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        device: Device,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        check_device(device)?;
        Self::with_library(Path::new(library::NAME), store, rank, world_size, device, timeout, progress)
    }

    /// As [`crate::ProcessGroup::connect_nccl`], with a library of the caller's choice and on any device. For tests, which
    /// have a double of NCCL that works on the CPU.
    #[doc(hidden)]
    pub fn with_library(
        path: &Path,
        store: &mut Store,
        rank: usize,
        world_size: usize,
        device: Device,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        let library = Library::open(path)?;
        // Groups on one store are told apart by their number, which each rank counts for itself.
        let number = store.add(&format!("nccl/rank-{rank}/groups"), 1)?;
        let prefix = format!("nccl/{number}");
        let calls = FlightRecord::new("world", progress);
        let call = calls.start(Op::Barrier, None, 0, 0, "rendezvous");
        let failed = |message| CommError::Nccl { rank, message, is_remote: false, call: Some(call.clone()) };
        let lane = Lane::new(device)?;
        let _on_device = lane.enter()?;

        if rank == 0 {
            let mut id = ncclUniqueId { internal: [0; 128] };
            // SAFETY: `id` is a place for one.
            let status = unsafe { (library.functions.ncclGetUniqueId)(&mut id) };
            if status != library::SUCCESS {
                return Err(failed(format!("ncclGetUniqueId: {}", library.text(status, None))));
            }
            store.set(&format!("{prefix}/id"), &id.internal.map(|c| c as u8))?;
        }
        // Before NCCL meets, which cannot say who does not come. The counters tell who has come and who has not.
        if let Some(progress) = calls.progress() {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        store.barrier(&format!("{prefix}/set"), rank, world_size, timeout)?;
        let got = store.get(&format!("{prefix}/id"), timeout)?;
        let bytes: [u8; 128] = got.as_slice().try_into().map_err(|_| CommError::Rendezvous {
            other_rank: 0,
            got: format!("{} bytes as NCCL's unique id", got.len()),
        })?;
        let id = ncclUniqueId { internal: bytes.map(|byte| byte as _) };
        let raw = communicator::init(library, id, rank, world_size, "world", timeout).map_err(failed)?;
        if let Some(progress) = calls.progress() {
            progress.leave();
        }

        let board = Board::start(store, prefix, rank, world_size)?;
        let watchdog = Watchdog::start(timeout, board)?;
        let members = (0..world_size).collect();
        let communicator = Communicator::new(library, raw, rank, members, calls.clone(), watchdog.vitals());
        calls.done(&call);
        Self::new(device, rank, timeout, communicator, watchdog, calls, lane)
    }

    fn new(
        device: Device,
        rank: usize,
        timeout: Duration,
        communicator: Arc<Communicator>,
        watchdog: Arc<Watchdog>,
        calls: FlightRecord,
        lane: Lane,
    ) -> Result<Self, CommError> {
        watchdog.add(&communicator);
        Ok(NcclGroup {
            device,
            rank,
            timeout,
            communicator,
            watchdog,
            calls,
            lane,
            passing: Mark::new(device)?,
            started: VecDeque::new(),
            last_number: 0,
            spare: Vec::new(),
            barrier: Tensor::f_zeros([1], (Kind::Float, device))?,
            num_registered_bytes: 0,
        })
    }

    pub(crate) fn split(&mut self, _: &mut Store, color: usize, name: &str) -> Result<Self, CommError> {
        let world_size = self.world_size();
        let own = Tensor::from_slice(&[color as i64]).f_to_device(self.device)?;
        let colors = Tensor::f_zeros([world_size as i64], (Kind::Int64, self.device))?;
        self.all_gather_into_tensor(&colors, &own)?;
        let colors = colors.f_to_device(Device::Cpu)?;
        let of_color: Vec<usize> =
            (0..world_size).filter(|&rank| colors.int64_value(&[rank as i64]) == color as i64).collect();
        let rank = of_color.iter().position(|&rank| rank == self.rank).expect("this rank gave its color");
        let members = of_color.iter().map(|&rank| self.communicator.members[rank]).collect();

        let call = self.calls.start(Op::Barrier, None, 0, 0, &format!("split {name}"));
        let color = i32::try_from(color).expect("a color is a small number");
        let lane = Lane::new(self.device)?;
        let raw = {
            let _on_device = lane.enter()?;
            self.communicator.split(&call, color, self.rank, name, self.timeout)?
        };
        self.calls.done(&call);
        let calls = self.calls.split(name);
        let (library, run_rank) = (self.communicator.library, self.communicator.rank);
        let communicator = Communicator::new(library, raw, run_rank, members, calls.clone(), self.watchdog.vitals());
        Self::new(self.device, rank, self.timeout, communicator, Arc::clone(&self.watchdog), calls, lane)
    }

    /// Ends in good order: all ranks have called all collectives, and they are done.
    pub(crate) fn close(mut self) -> Result<(), CommError> {
        self.barrier()?;
        self.communicator.close(&self.lane)
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn world_size(&self) -> usize {
        self.communicator.members.len()
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn num_registered_bytes(&self) -> u64 {
        self.num_registered_bytes
    }

    pub(crate) fn check(&self) -> Result<(), CommError> {
        self.communicator.check()
    }

    pub(crate) fn write_flight_record(&self, path: &Path) -> Result<(), CommError> {
        self.calls.write(path)
    }

    pub(crate) fn enter_gather_stream(&self) -> Result<LaneGuard, CommError> {
        Ok(self.lane.enter()?)
    }

    pub(crate) fn shards_changed(&mut self) -> Result<(), CommError> {
        self.communicator.check()?;
        Ok(self.lane.follow_current(&mut self.passing)?)
    }

    /// Puts a collective into the lane. `make` makes all its calls of NCCL and gives the status of the last one; a group of
    /// one makes none, see [`Self::copy_alone`].
    fn issue(
        &mut self,
        name: &'static str,
        call: &Call,
        make: impl FnOnce(&Functions, ncclComm_t, cudaStream_t) -> library::Status,
    ) -> Result<(), CommError> {
        if self.world_size() == 1 {
            self.communicator.begin(call)?;
        } else {
            let stream = self.lane.handle()?;
            self.communicator.make(name, call, |nccl, raw| make(nccl, raw, stream))?;
        }
        Ok(self.communicator.is_issued(&self.lane, self.device)?)
    }

    /// In a group of one: what a collective of `input` gives in `out`, which is as large. Before [`Self::issue`].
    fn copy_alone(&self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        if self.world_size() == 1 {
            let _in_lane = self.lane.enter()?;
            tch::no_grad(|| out.f_view([-1])?.f_copy_(&input.f_view([-1])?))?;
        }
        Ok(())
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        // Nothing is left to be told of a failure here: whoever wants to know calls `close`.
        let _ = self.communicator.close(&self.lane);
    }
}

/// Makes several calls of NCCL one, which the communicator starts together. `calls` gives the status of the first one that
/// failed.
fn grouped(nccl: &Functions, calls: impl FnOnce() -> library::Status) -> library::Status {
    // SAFETY: no preconditions; each start has its end on the same thread.
    unsafe {
        let started = (nccl.ncclGroupStart)();
        if started != library::SUCCESS {
            return started;
        }
        let made = calls();
        let ended = (nccl.ncclGroupEnd)();
        if made != library::SUCCESS && made != library::IN_PROGRESS { made } else { ended }
    }
}

/// # Errors
/// [`CommError::Unavailable`] unless `device` is a GPU that libtorch can use.
fn check_device(device: Device) -> Result<(), CommError> {
    let Device::Cuda(index) = device else {
        return Err(unavailable(format!(
            "it is for GPUs, and this rank's device is {device:?}; use \"shm\" or \"mpi\""
        )));
    };
    // SAFETY: the driver's initialisers have no preconditions.
    match unsafe { Handle::new(DRIVER) } {
        Ok(driver) => std::mem::forget(driver), // libtorch uses it too
        Err(_) => {
            let instead = "or use the backend \"shm\" or \"mpi\"";
            return Err(unavailable(format!("{DRIVER} was not found; install the NVIDIA driver, {instead}")));
        }
    }
    let num_devices = accelerator::device_count()?;
    if index >= num_devices {
        let missing = format!(
            "there is no GPU {index}, CUDA has {num_devices}; see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or start fewer \
             ranks a host"
        );
        return Err(unavailable(missing));
    }
    Ok(())
}
