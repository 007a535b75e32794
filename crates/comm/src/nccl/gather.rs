//! All-gather in place, in the group's lane.

use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use super::lane::{Lane, Mark};
use super::library::{SUCCESS, Status};
use super::plain::nccl_kind;
use super::{NcclGroup, grouped};
use crate::check::check_segments;
use crate::memory::Memory;
use crate::sum::element_bytes;
use crate::{CommError, Segment};

/// The NCCL side of a [`crate::GatherBuffer`].
#[derive(Debug)]
pub struct NcclGatherBuffer {
    memory: Memory,
    /// After the last read of the last tenant.
    released: Mark,
    /// After the gather.
    gathered: Mark,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Free,
    Writing,
    Started,
    Whole,
}

impl NcclGatherBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.memory.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
}

impl NcclGroup {
    pub(crate) fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<NcclGatherBuffer, CommError> {
        let call = self.calls.start(Op::NewBuffer, None, len_bytes, 0, name);
        let memory = self.allocate(&call, len_bytes)?;
        let (mut released, gathered) = (Mark::new(self.device)?, Mark::new(self.device)?);
        let current = Lane::current(self.device)?;
        current.writes(memory.id());
        released.record(&current)?; // after the zeros
        self.calls.done(&call);
        Ok(NcclGatherBuffer { memory, released, gathered, state: State::Free })
    }

    /// Never waits, so it always may: the lane waits.
    pub(crate) fn try_begin_write(&mut self, buffer: &mut NcclGatherBuffer) -> Result<bool, CommError> {
        assert!(matches!(buffer.state, State::Free | State::Writing), "begin_write in state {:?}", buffer.state);
        self.communicator.check()?;
        if buffer.state == State::Free {
            self.lane.wait(&buffer.released)?;
            buffer.state = State::Writing;
        }
        Ok(true)
    }

    pub(crate) fn begin_write(&mut self, buffer: &mut NcclGatherBuffer, _unit: &str) -> Result<(), CommError> {
        self.try_begin_write(buffer).map(|_| ())
    }

    pub(crate) fn start_all_gather(
        &mut self,
        buffer: &mut NcclGatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Writing, "start_all_gather without begin_write");
        let (rank, world_size, memory) = (self.rank, self.world_size(), buffer.memory);
        let (kind, num_bytes) = check_segments(memory.len_bytes(), segments, world_size);
        let call = self.calls.start(Op::AllGather, kind, num_bytes, 0, unit);
        // The caller has written its ranges: in this lane, or in its own, which this one then follows.
        Lane::current(self.device)?.writes(memory.id());
        self.lane.follow_current(&mut self.passing)?;
        self.issue("ncclAllGather", &call, |nccl, raw, stream| {
            let gather = |segment: &Segment| -> Status {
                let numel = segment.numel / world_size;
                let own_offset_bytes = segment.offset_bytes + rank * numel * element_bytes(segment.kind);
                let own = memory.range(segment.kind, own_offset_bytes, numel);
                let whole = memory.range(segment.kind, segment.offset_bytes, segment.numel);
                // SAFETY: both are checked ranges of memory that stays; the own range is where in-place gathers want it.
                // The communicator is alive and the stream is the lane's.
                unsafe { (nccl.ncclAllGather)(own.cast(), whole.cast(), numel, nccl_kind(segment.kind), raw, stream) }
            };
            grouped(nccl, || segments.iter().map(gather).find(|&status| is_error(status)).unwrap_or(SUCCESS))
        })?;
        self.lane.writes(memory.id());
        buffer.gathered.record(&self.lane)?;
        buffer.state = State::Started;
        Ok(())
    }

    pub(crate) fn wait_all_gather(&mut self, buffer: &mut NcclGatherBuffer) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Started, "wait_all_gather without start_all_gather");
        self.communicator.check()?;
        Lane::current(self.device)?.wait(&buffer.gathered)?;
        buffer.state = State::Whole;
        Ok(())
    }

    pub(crate) fn release(&mut self, buffer: &mut NcclGatherBuffer) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Whole, "release without wait_all_gather");
        let current = Lane::current(self.device)?;
        current.reads(buffer.memory.id());
        buffer.released.record(&current)?;
        buffer.state = State::Free;
        Ok(())
    }
}

/// Of a call inside of a group.
pub(super) fn is_error(status: Status) -> bool {
    status != SUCCESS && status != super::library::IN_PROGRESS
}
