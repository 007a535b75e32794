//! Queues of device work and the edges between them.
//!
//! Everything on a GPU happens in some *lane*: a stream, of libtorch's pool. What one lane may only do after another one
//! has done something is a *mark*: recorded in the one, waited for in the other, by the device and not by the host.
//!
//! Each record, wait and use of a buffer is also a `tracing` event of target `fsdp_comm::order`, level trace. From these a
//! test proves without a GPU, where one queue hides a missing edge, that buffers change hands only through marks.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use fsdp_torch_ext::{Event, Stream, StreamGuard, TorchError};
use tch::Device;

use super::library::cudaStream_t;

/// Number of the lane that a caller's own work goes to.
const COMPUTE: u64 = 0;

thread_local! {
    /// Number of the lane that this thread has entered: on the CPU all lanes are one stream.
    static CURRENT: Cell<u64> = const { Cell::new(COMPUTE) };
}

static LAST_LANE: AtomicU64 = AtomicU64::new(COMPUTE);
static LAST_MARK: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    number: u64,
    stream: Stream,
}

impl Lane {
    /// A lane of its own, which the device prefers to the others: what it carries is short and waited for.
    pub fn new(device: Device) -> Result<Self, TorchError> {
        let stream = Stream::new_from_pool(device, true)?;
        Ok(Lane { number: LAST_LANE.fetch_add(1, Ordering::Relaxed) + 1, stream })
    }

    /// The lane of the stream that is current for this thread.
    pub fn current(device: Device) -> Result<Self, TorchError> {
        Ok(Lane { number: CURRENT.get(), stream: Stream::current(device)? })
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Makes it current for this thread, and its device.
    pub fn enter(&self) -> Result<LaneGuard, TorchError> {
        let stream = self.stream.enter()?;
        Ok(LaneGuard { outer: CURRENT.replace(self.number), _stream: stream })
    }

    /// What NCCL is given as stream: the device's handle. On the CPU, which has no queues, the lane's number.
    pub fn handle(&self) -> Result<cudaStream_t, TorchError> {
        match self.stream.device() {
            Device::Cpu => Ok(std::ptr::without_provenance_mut(self.number as usize)),
            _ => Ok(self.stream.native_handle()?.cast()),
        }
    }

    /// What is put into this lane from now on comes after the mark; nothing if it was never recorded.
    pub fn wait(&self, mark: &Mark) -> Result<(), TorchError> {
        if let Some(number) = mark.number {
            tracing::trace!(target: "fsdp_comm::order", wait = number, lane = self.number);
            self.stream.wait(&mark.event)?;
        }
        Ok(())
    }

    /// What is put into this lane from now on comes after all that the current lane holds.
    pub fn follow_current(&self, mark: &mut Mark) -> Result<(), TorchError> {
        let current = Lane::current(self.stream.device())?;
        if current.number == self.number && current.stream == self.stream {
            return Ok(());
        }
        mark.record(&current)?;
        self.wait(mark)
    }

    /// Whether all that it holds is done.
    pub fn is_done(&self) -> bool {
        self.stream.query().unwrap_or(false)
    }

    /// Tells the order's readers that the lane reads a buffer at this place.
    pub fn reads(&self, buffer: usize) {
        tracing::trace!(target: "fsdp_comm::order", read = buffer as u64, lane = self.number);
    }

    /// Tells the order's readers that the lane writes a buffer at this place.
    pub fn writes(&self, buffer: usize) {
        tracing::trace!(target: "fsdp_comm::order", write = buffer as u64, lane = self.number);
    }
}

/// Keeps a lane current for this thread; see [`crate::ProcessGroup::enter_gather_stream`].
#[derive(Debug)]
#[must_use = "the stream is current only while the guard lives"]
pub struct LaneGuard {
    /// Number of the lane that was current before.
    outer: u64,
    _stream: StreamGuard,
}

impl Drop for LaneGuard {
    fn drop(&mut self) {
        CURRENT.set(self.outer);
    }
}

/// A place in a lane.
#[derive(Debug)]
pub(super) struct Mark {
    event: Event,
    /// Number of the last record, among all of the process.
    number: Option<u64>,
}

impl Mark {
    pub fn new(device: Device) -> Result<Self, TorchError> {
        Ok(Mark { event: Event::new(device)?, number: None })
    }

    /// Marks all that the lane holds now; an earlier place is forgotten.
    pub fn record(&mut self, lane: &Lane) -> Result<(), TorchError> {
        let number = LAST_MARK.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::trace!(target: "fsdp_comm::order", record = number, lane = lane.number);
        self.event.record(&lane.stream)?;
        self.number = Some(number);
        Ok(())
    }

    /// Blocks the host until what it marks is done.
    pub fn synchronize(&self) -> Result<(), TorchError> {
        self.event.synchronize()
    }
}
