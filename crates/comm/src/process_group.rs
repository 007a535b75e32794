use std::time::Duration;

use fsdp_control::progress::ProgressHandle;
use fsdp_control::store::Store;
use tch::{Kind, Tensor};

use crate::CommError;
use crate::shm::{GatherBuffer, ReduceBuffer, ShmGroup};

/// The ranks of a run, seen from one of them. A world of 1 goes the same ways.
#[derive(Debug)]
pub enum ProcessGroup {
    Shm(ShmGroup),
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

/// Errors of all collectives: [`CommError::PeerLost`], [`CommError::Timeout`] (a peer that lives, but stayed away for
/// longer than the group's timeout) and [`CommError::Mismatch`]. Misuse of a buffer (steps out of order, a segment
/// outside of it) is a bug of the caller and panics.
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

    pub fn rank(&self) -> usize {
        let ProcessGroup::Shm(group) = self;
        group.rank()
    }

    pub fn world_size(&self) -> usize {
        let ProcessGroup::Shm(group) = self;
        group.world_size()
    }

    /// Returns when all ranks have called it.
    pub fn barrier(&mut self) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.barrier()
    }

    /// Allocates a buffer for all-gathers, of zeros. Collective. `shm`: one mapping for all ranks of the host.
    pub fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<GatherBuffer, CommError> {
        let ProcessGroup::Shm(group) = self;
        group.new_gather_buffer(name, len_bytes)
    }

    /// Allocates a buffer for reduce-scatters, of zeros. Collective. `shm`: one mapping a rank, read by all.
    pub fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<ReduceBuffer, CommError> {
        let ProcessGroup::Shm(group) = self;
        group.new_reduce_buffer(name, len_bytes)
    }

    /// Whether *all* ranks have released the buffer's last tenant. Then this rank may write its own ranges and go on to
    /// [`ProcessGroup::start_all_gather`]. Never waits.
    pub fn try_begin_write(&mut self, buffer: &mut GatherBuffer) -> Result<bool, CommError> {
        let ProcessGroup::Shm(group) = self;
        group.try_begin_write(buffer)
    }

    /// Waits until [`ProcessGroup::try_begin_write`] holds. Does nothing if it has already said so. `unit` is for messages.
    pub fn begin_write(&mut self, buffer: &mut GatherBuffer, unit: &str) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.begin_write(buffer, unit)
    }

    /// Publishes this rank's ranges of `segments`, which it has written. Never waits.
    pub fn start_all_gather(
        &mut self,
        buffer: &mut GatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.start_all_gather(buffer, segments, unit)
    }

    /// Returns when all ranks have written their ranges; then the segments are whole, and read-only.
    pub fn wait_all_gather(&mut self, buffer: &mut GatherBuffer) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.wait_all_gather(buffer)
    }

    /// This rank has read the buffer for the last time. Never waits.
    pub fn release(&mut self, buffer: &mut GatherBuffer) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.release(buffer);
        Ok(())
    }

    /// Waits until all peers have read this rank's last contents. Then it may write new ones.
    pub fn begin_reduce(&mut self, buffer: &mut ReduceBuffer, unit: &str) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.begin_reduce(buffer, unit)
    }

    /// Publishes this rank's contents of `segments` (f32, bf16 or f16). Never waits.
    pub fn start_reduce_scatter(
        &mut self,
        buffer: &mut ReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.start_reduce_scatter(buffer, segments, unit)
    }

    /// Sums this rank's range of each segment over all ranks, in f32, into `out` or onto what it holds.
    /// `out`: for each segment an f32 CPU tensor of `numel / world_size` contiguous elements.
    pub fn wait_reduce_scatter(
        &mut self,
        buffer: &mut ReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.wait_reduce_scatter(buffer, out, accumulate)
    }

    /// Starts to combine `tensor` (f32, f64, bf16, f16 or i64; contiguous, on the CPU) over all ranks, in place. It must
    /// be left alone until [`ProcessGroup::wait`]. bf16 and f16 are combined in f32 and rounded once. Never waits.
    ///
    /// # Errors
    /// As for all collectives, and [`CommError::BadTensor`].
    pub fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        let ProcessGroup::Shm(group) = self;
        group.start_all_reduce(tensor, op)
    }

    /// Finishes a started collective, and with it those started before.
    pub fn wait(&mut self, work: Work) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.wait_work(work)
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
        let ProcessGroup::Shm(group) = self;
        group.broadcast(tensor, root)
    }

    /// `out`, of world_size * n elements, = the `input`s of n elements of all ranks, in order of rank.
    ///
    /// # Errors
    /// As for [`ProcessGroup::start_all_reduce`].
    pub fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.all_gather_into_tensor(out, input)
    }

    /// `out`, of n elements, = this rank's piece of the sum of all `input`s of world_size * n elements.
    ///
    /// # Errors
    /// As for [`ProcessGroup::start_all_reduce`].
    pub fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        let ProcessGroup::Shm(group) = self;
        group.reduce_scatter_tensor(out, input)
    }
}
