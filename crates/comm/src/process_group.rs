use std::path::Path;
use std::time::Duration;

use fsdp_control::progress::ProgressHandle;
use fsdp_control::store::Store;
use tch::{Device, Kind, Tensor};

use crate::CommError;
use crate::mpi::{MpiGatherBuffer, MpiGroup, MpiReduceBuffer};
use crate::nccl::{LaneGuard, NcclGatherBuffer, NcclGroup, NcclReduceBuffer};
use crate::shm::{ShmGatherBuffer, ShmGroup, ShmReduceBuffer};
use crate::staged::{StagedGatherBuffer, StagedGroup, StagedReduceBuffer};

/// The ranks of a run, or some of them, seen from one of them. A world of 1 goes the same ways.
#[derive(Debug)]
pub enum ProcessGroup {
    /// Processes of one host, over shared memory.
    Shm(ShmGroup),
    /// A GPU each.
    Nccl(NcclGroup),
    /// Processes that an MPI started, on the CPU.
    Mpi(MpiGroup),
    /// A device each, or one for several, over one of the host's back ends.
    Staged(StagedGroup),
}

/// A buffer whose contents are gathered from all ranks' ranges. It goes through *free*, *writing*
/// ([`ProcessGroup::begin_write`]), *started*, *whole* ([`ProcessGroup::wait_all_gather`]) and back to free
/// ([`ProcessGroup::release`]).
#[derive(Debug)]
pub enum GatherBuffer {
    Shm(ShmGatherBuffer),
    Nccl(NcclGatherBuffer),
    Mpi(MpiGatherBuffer),
    Staged(StagedGatherBuffer),
}

/// A rank's own gradients, to be summed over the ranks. It goes through *free*, *writing*
/// ([`ProcessGroup::begin_reduce`]), *started* and back to free ([`ProcessGroup::wait_reduce_scatter`]).
#[derive(Debug)]
pub enum ReduceBuffer {
    Shm(ShmReduceBuffer),
    Nccl(NcclReduceBuffer),
    Mpi(MpiReduceBuffer),
    Staged(StagedReduceBuffer),
}

/// A run of elements of one type in a buffer. Rank r's *range* is the r-th of `world_size` equal pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub kind: Kind,
    /// Where it starts in the buffer; a multiple of the element size.
    pub offset_bytes: usize,
    /// Elements of all ranks; a multiple of the world size.
    pub numel: usize,
}

/// How an all-reduce combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    Sum,
    /// NaN wins.
    Max,
}

/// A collective on plain tensors that was started, to give to [`ProcessGroup::wait`].
#[derive(Debug)]
#[must_use = "a started collective ends in ProcessGroup::wait"]
pub struct Work {
    /// Number of the collective among those on plain tensors.
    pub(crate) number: u64,
}

/// Evaluates an expression on the group of whichever back end.
macro_rules! on_group {
    ($self:ident, $group:ident => $do:expr) => {
        match $self {
            ProcessGroup::Shm($group) => $do,
            ProcessGroup::Nccl($group) => $do,
            ProcessGroup::Mpi($group) => $do,
            ProcessGroup::Staged($group) => $do,
        }
    };
}

/// Evaluates an expression on a group and a buffer, which must be of one back end.
macro_rules! on_both {
    ($self:ident, $type:ident $buffer:ident, $group:ident => $do:expr) => {
        match ($self, $buffer) {
            (ProcessGroup::Shm($group), $type::Shm($buffer)) => $do,
            (ProcessGroup::Nccl($group), $type::Nccl($buffer)) => $do,
            (ProcessGroup::Mpi($group), $type::Mpi($buffer)) => $do,
            (ProcessGroup::Staged($group), $type::Staged($buffer)) => $do,
            (group, buffer) => panic!("{buffer:?} is not a buffer of {group:?}"),
        }
    };
}

/// Evaluates an expression on the buffer of whichever back end.
macro_rules! on_buffer {
    ($self:ident, $type:ident, $buffer:ident => $do:expr) => {
        match $self {
            $type::Shm($buffer) => $do,
            $type::Nccl($buffer) => $do,
            $type::Mpi($buffer) => $do,
            $type::Staged($buffer) => $do,
        }
    };
}

impl GatherBuffer {
    /// The memory as a 1-D tensor that aliases it, with a version counter of its own: autograd does not see writes through
    /// another view. It may be used for the rest of the process's life, at the times that the protocol allows.
    ///
    /// # Panics
    /// The range is outside of the buffer, or not aligned for `kind`.
    pub fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        on_buffer!(self, GatherBuffer, buffer => buffer.view(kind, offset_bytes, numel))
    }

    pub fn len_bytes(&self) -> usize {
        on_buffer!(self, GatherBuffer, buffer => buffer.len_bytes())
    }
}

impl ReduceBuffer {
    /// This rank's memory as a 1-D tensor; see [`GatherBuffer::view`].
    ///
    /// # Panics
    /// The range is outside of the buffer, or not aligned for `kind`.
    pub fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        on_buffer!(self, ReduceBuffer, buffer => buffer.view(kind, offset_bytes, numel))
    }

    pub fn len_bytes(&self) -> usize {
        on_buffer!(self, ReduceBuffer, buffer => buffer.len_bytes())
    }
}

/// Errors of all collectives: [`CommError::PeerLost`], [`CommError::Timeout`] (a peer that lives, but stayed away for
/// longer than the group's timeout), [`CommError::Mismatch`], and what the back end's library reports. Misuse of a buffer
/// (steps out of order, a segment outside of it, a buffer of another back end) is a bug of the caller and panics.
///
/// "Waits" below is the host's on `shm` and `mpi`. On `nccl` the host waits for the device in [`ProcessGroup::barrier`]
/// only (and where its queues are full): *streams* wait, and what a call says of "now" holds for the work that is put into
/// the current stream from then on.
impl ProcessGroup {
    /// Makes a group of processes of one host over shared memory. All ranks call it; they find each other through the
    /// store. `timeout` holds for this and for each later wait. The rank keeps `progress` up to date.
    ///
    /// # Errors
    /// A rank does not come, ranks are on different hosts, or a process may not open another one's memory.
    pub fn connect_shm(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        Ok(ProcessGroup::Shm(ShmGroup::connect(store, rank, world_size, timeout, progress)?))
    }

    /// Makes a group of processes with a GPU each, over NCCL. All ranks call it; the store carries NCCL's unique id. The
    /// rest is as for [`ProcessGroup::connect_shm`].
    ///
    /// # Errors
    /// [`CommError::Unavailable`] where `device` is not a GPU that works, or NCCL is missing; a rank does not come; what
    /// NCCL reports.
    pub fn connect_nccl(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        device: Device,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        Ok(ProcessGroup::Nccl(NcclGroup::connect(store, rank, world_size, device, timeout, progress)?))
    }

    /// Makes a group of all processes that one MPI job started. The rest is as for [`ProcessGroup::connect_shm`].
    ///
    /// # Errors
    /// [`CommError::Unavailable`] in a build without the feature `mpi`; MPI has another rank or world size for this
    /// process, as when no MPI started it.
    pub fn connect_mpi(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        Ok(ProcessGroup::Mpi(MpiGroup::connect(store, rank, world_size, timeout, progress)?))
    }

    /// The same group with buffers and tensors on `device`: each collective copies to the host, goes over the group's back
    /// end and copies back. For devices without NCCL, and several ranks on one device. `device` may be the host itself,
    /// which is slow, and is how this is tested without a GPU.
    ///
    /// # Panics
    /// The group is not one of the host (`shm`, `mpi`).
    pub fn staged(self, device: Device) -> Self {
        assert!(matches!(self, ProcessGroup::Shm(_) | ProcessGroup::Mpi(_)), "{self:?} cannot be staged");
        ProcessGroup::Staged(StagedGroup::new(self, device))
    }

    /// Divides the group: ranks that give the same `color` form one, in order of their ranks here. Collective; the new
    /// groups' collectives may run beside this one's. `name` (such as "shard") is for messages and the flight record;
    /// groups that are split from the same one differ in it.
    pub fn split(&mut self, store: &mut Store, color: usize, name: &str) -> Result<Self, CommError> {
        Ok(match self {
            ProcessGroup::Shm(group) => ProcessGroup::Shm(group.split(store, color, name)?),
            ProcessGroup::Nccl(group) => ProcessGroup::Nccl(group.split(store, color, name)?),
            ProcessGroup::Mpi(group) => ProcessGroup::Mpi(group.split(store, color, name)?),
            ProcessGroup::Staged(group) => ProcessGroup::Staged(group.split(store, color, name)?),
        })
    }

    /// Ends in good order. All ranks call it, on the group that they connected, when the run has succeeded. `mpi`: MPI
    /// ends with it for this process; a process that ends without is one that failed, and `mpirun` ends the others.
    pub fn close(self) -> Result<(), CommError> {
        match self {
            ProcessGroup::Shm(_) => Ok(()),
            ProcessGroup::Nccl(group) => group.close(),
            ProcessGroup::Mpi(group) => group.close(),
            ProcessGroup::Staged(group) => group.close(),
        }
    }

    pub fn rank(&self) -> usize {
        on_group!(self, group => group.rank())
    }

    pub fn world_size(&self) -> usize {
        on_group!(self, group => group.world_size())
    }

    /// Where buffers are, and the tensors that collectives take.
    pub fn device(&self) -> Device {
        match self {
            ProcessGroup::Shm(_) | ProcessGroup::Mpi(_) => Device::Cpu,
            ProcessGroup::Nccl(group) => group.device(),
            ProcessGroup::Staged(group) => group.device(),
        }
    }

    /// Bytes of buffers on the device that libtorch's allocator does not know of: NCCL has allocated them. 0 on hosts.
    pub fn num_registered_bytes(&self) -> u64 {
        match self {
            ProcessGroup::Shm(_) | ProcessGroup::Mpi(_) | ProcessGroup::Staged(_) => 0,
            ProcessGroup::Nccl(group) => group.num_registered_bytes(),
        }
    }

    /// The failure of this group, or of one that was split from the same, if there is one: what the next call would
    /// return. After a failure the device goes on as if all collectives were done, over whatever the buffers hold; so
    /// whoever has waited for the device by other means than this group's asks here before using what it computed. Waits
    /// for nobody but, once there is a failure, the few seconds in which its cause is found. `shm` and `mpi`: always well,
    /// the call that fails says so itself.
    pub fn check(&self) -> Result<(), CommError> {
        match self {
            ProcessGroup::Shm(_) | ProcessGroup::Mpi(_) => Ok(()),
            ProcessGroup::Nccl(group) => group.check(),
            ProcessGroup::Staged(group) => group.check(),
        }
    }

    /// Writes the last 256 collectives of this rank on this group to a file, oldest first, a JSON line each: `group`,
    /// `seq`, `op`, `unit`, `bytes` (of all ranks), `dtype`, `issued_us` and `done_us` (wall clock, microseconds since
    /// 1970; null = not seen to be done).
    ///
    /// # Errors
    /// [`CommError::FlightRecord`]
    pub fn write_flight_record(&self, path: &Path) -> Result<(), CommError> {
        on_group!(self, group => group.write_flight_record(path))
    }

    /// Returns when all ranks have called it, and (`nccl`) all collectives started before are done.
    pub fn barrier(&mut self) -> Result<(), CommError> {
        on_group!(self, group => group.barrier())
    }

    /// Allocates a buffer for all-gathers, of zeros. Collective. `shm`: one mapping for all ranks of the host.
    pub fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<GatherBuffer, CommError> {
        Ok(match self {
            ProcessGroup::Shm(group) => GatherBuffer::Shm(group.new_gather_buffer(name, len_bytes)?),
            ProcessGroup::Nccl(group) => GatherBuffer::Nccl(group.new_gather_buffer(name, len_bytes)?),
            ProcessGroup::Mpi(group) => GatherBuffer::Mpi(group.new_gather_buffer(name, len_bytes)?),
            ProcessGroup::Staged(group) => GatherBuffer::Staged(group.new_gather_buffer(name, len_bytes)?),
        })
    }

    /// Allocates a buffer for reduce-scatters, of zeros. Collective. `shm`: one mapping a rank, read by all.
    pub fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<ReduceBuffer, CommError> {
        Ok(match self {
            ProcessGroup::Shm(group) => ReduceBuffer::Shm(group.new_reduce_buffer(name, len_bytes)?),
            ProcessGroup::Nccl(group) => ReduceBuffer::Nccl(group.new_reduce_buffer(name, len_bytes)?),
            ProcessGroup::Mpi(group) => ReduceBuffer::Mpi(group.new_reduce_buffer(name, len_bytes)?),
            ProcessGroup::Staged(group) => ReduceBuffer::Staged(group.new_reduce_buffer(name, len_bytes)?),
        })
    }

    /// Makes the stream current on which this rank writes its range of a gather buffer, between
    /// [`ProcessGroup::begin_write`] and [`ProcessGroup::start_all_gather`]; so the write and the gather leave the compute
    /// stream alone. `None` where there is nothing to switch, on the host.
    pub fn enter_gather_stream(&self) -> Result<Option<LaneGuard>, CommError> {
        match self {
            ProcessGroup::Shm(_) | ProcessGroup::Mpi(_) | ProcessGroup::Staged(_) => Ok(None),
            ProcessGroup::Nccl(group) => group.enter_gather_stream().map(Some),
        }
    }

    /// What is written into gather buffers from now on comes after the work that the current stream has been given so
    /// far: the optimizer's update of the shards.
    pub fn shards_changed(&mut self) -> Result<(), CommError> {
        match self {
            ProcessGroup::Shm(_) | ProcessGroup::Mpi(_) | ProcessGroup::Staged(_) => Ok(()),
            ProcessGroup::Nccl(group) => group.shards_changed(),
        }
    }

    /// Whether *all* ranks have released the buffer's last tenant. Then this rank may write its own ranges and go on to
    /// [`ProcessGroup::start_all_gather`]. Never waits. `nccl`: always.
    pub fn try_begin_write(&mut self, buffer: &mut GatherBuffer) -> Result<bool, CommError> {
        on_both!(self, GatherBuffer buffer, group => group.try_begin_write(buffer))
    }

    /// Waits until [`ProcessGroup::try_begin_write`] holds. Does nothing if it has already said so. `unit` is for messages.
    pub fn begin_write(&mut self, buffer: &mut GatherBuffer, unit: &str) -> Result<(), CommError> {
        on_both!(self, GatherBuffer buffer, group => group.begin_write(buffer, unit))
    }

    /// Publishes this rank's ranges of `segments`, which it has written. Never waits.
    pub fn start_all_gather(
        &mut self,
        buffer: &mut GatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        on_both!(self, GatherBuffer buffer, group => group.start_all_gather(buffer, segments, unit))
    }

    /// Returns when all ranks have written their ranges; then the segments are whole, and read-only.
    pub fn wait_all_gather(&mut self, buffer: &mut GatherBuffer) -> Result<(), CommError> {
        on_both!(self, GatherBuffer buffer, group => group.wait_all_gather(buffer))
    }

    /// This rank has read the buffer for the last time. Never waits.
    pub fn release(&mut self, buffer: &mut GatherBuffer) -> Result<(), CommError> {
        on_both!(self, GatherBuffer buffer, group => group.release(buffer))
    }

    /// Waits until all peers have read this rank's last contents. Then it may write new ones.
    pub fn begin_reduce(&mut self, buffer: &mut ReduceBuffer, unit: &str) -> Result<(), CommError> {
        on_both!(self, ReduceBuffer buffer, group => group.begin_reduce(buffer, unit))
    }

    /// Publishes this rank's contents of `segments` (f32, bf16 or f16). Never waits.
    pub fn start_reduce_scatter(
        &mut self,
        buffer: &mut ReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        on_both!(self, ReduceBuffer buffer, group => group.start_reduce_scatter(buffer, segments, unit))
    }

    /// Sums this rank's range of each segment over all ranks into `out` or onto what it holds, in f32 (`nccl`: in the
    /// segment's type). `out`: for each segment an f32 tensor of `numel / world_size` contiguous elements on
    /// [`ProcessGroup::device`].
    pub fn wait_reduce_scatter(
        &mut self,
        buffer: &mut ReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        on_both!(self, ReduceBuffer buffer, group => group.wait_reduce_scatter(buffer, out, accumulate))
    }

    /// Starts to combine `tensor` (f32, f64, bf16, f16 or i64; contiguous, on [`ProcessGroup::device`]) over all ranks, in
    /// place. It must be left alone until [`ProcessGroup::wait`]. On the host, bf16 and f16 are combined in f32 and rounded
    /// once. Never waits.
    ///
    /// # Errors
    /// As for all collectives, and [`CommError::BadTensor`].
    pub fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        on_group!(self, group => group.start_all_reduce(tensor, op))
    }

    /// Finishes a started collective, and with it those started before.
    pub fn wait(&mut self, work: Work) -> Result<(), CommError> {
        on_group!(self, group => group.wait_work(work))
    }

    /// [`ProcessGroup::start_all_reduce`] and [`ProcessGroup::wait`].
    pub fn all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<(), CommError> {
        let work = self.start_all_reduce(tensor, op)?;
        self.wait(work)
    }

    /// Copies `tensor` of rank `root` to all.
    ///
    /// # Errors
    /// As for [`ProcessGroup::start_all_reduce`].
    pub fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        on_group!(self, group => group.broadcast(tensor, root))
    }

    /// `out`, of world_size * n elements, = the `input`s of n elements of all ranks, in order of rank.
    ///
    /// # Errors
    /// As for [`ProcessGroup::start_all_reduce`].
    pub fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        on_group!(self, group => group.all_gather_into_tensor(out, input))
    }

    /// `out`, of n elements, = this rank's piece of the sum of all `input`s of world_size * n elements.
    ///
    /// # Errors
    /// As for [`ProcessGroup::start_all_reduce`].
    pub fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        on_group!(self, group => group.reduce_scatter_tensor(out, input))
    }
}
