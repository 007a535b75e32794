//! Reduce-scatter in place, in the group's lane: a rank's own range of its buffer becomes the sum.

use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use super::gather::is_error;
use super::lane::{Lane, Mark};
use super::library::{SUCCESS, Status, ncclRedOp_t};
use super::plain::nccl_kind;
use super::{NcclGroup, grouped};
use crate::check::{check_out, check_segments};
use crate::memory::Memory;
use crate::sum::element_bytes;
use crate::{CommError, Segment};

/// The NCCL side of a [`crate::ReduceBuffer`].
#[derive(Debug)]
pub struct NcclReduceBuffer {
    memory: Memory,
    /// After the reduce-scatter.
    reduced: Mark,
    /// After the sums were taken out.
    drained: Mark,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Free,
    Writing,
    Started(Vec<Segment>),
}

impl NcclReduceBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.memory.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
}

impl NcclGroup {
    pub(crate) fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<NcclReduceBuffer, CommError> {
        let call = self.calls.start(Op::NewBuffer, None, len_bytes, 0, name);
        let memory = self.allocate(&call, len_bytes)?;
        let (reduced, mut drained) = (Mark::new(self.device)?, Mark::new(self.device)?);
        let current = Lane::current(self.device)?;
        current.writes(memory.id());
        drained.record(&current)?; // after the zeros
        self.calls.done(&call);
        Ok(NcclReduceBuffer { memory, reduced, drained, state: State::Free })
    }

    pub(crate) fn begin_reduce(&mut self, buffer: &mut NcclReduceBuffer, _unit: &str) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Free, "begin_reduce of a buffer in use");
        self.communicator.check()?;
        Lane::current(self.device)?.wait(&buffer.drained)?;
        buffer.state = State::Writing;
        Ok(())
    }

    pub(crate) fn start_reduce_scatter(
        &mut self,
        buffer: &mut NcclReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Writing, "start_reduce_scatter without begin_reduce");
        let (rank, world_size, memory) = (self.rank, self.world_size(), buffer.memory);
        let (kind, num_bytes) = check_segments(memory.len_bytes(), segments, world_size);
        let call = self.calls.start(Op::ReduceScatter, kind, num_bytes, 0, unit);
        Lane::current(self.device)?.writes(memory.id());
        self.lane.follow_current(&mut self.passing)?;
        self.issue("ncclReduceScatter", &call, |nccl, raw, stream| {
            let reduce = |segment: &Segment| -> Status {
                let numel = segment.numel / world_size;
                let own_offset_bytes = segment.offset_bytes + rank * numel * element_bytes(segment.kind);
                let own = memory.range(segment.kind, own_offset_bytes, numel);
                let whole = memory.range(segment.kind, segment.offset_bytes, segment.numel);
                let (kind, sum) = (nccl_kind(segment.kind), ncclRedOp_t::ncclSum);
                // SAFETY: both are checked ranges of memory that stays; the own range is where in-place reductions want
                // it. The communicator is alive and the stream is the lane's.
                unsafe { (nccl.ncclReduceScatter)(whole.cast(), own.cast(), numel, kind, sum, raw, stream) }
            };
            grouped(nccl, || segments.iter().map(reduce).find(|&status| is_error(status)).unwrap_or(SUCCESS))
        })?;
        self.lane.writes(memory.id());
        buffer.reduced.record(&self.lane)?;
        buffer.state = State::Started(segments.to_vec());
        Ok(())
    }

    pub(crate) fn wait_reduce_scatter(
        &mut self,
        buffer: &mut NcclReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        let State::Started(segments) = &buffer.state else {
            panic!("wait_reduce_scatter in state {:?}", buffer.state);
        };
        assert_eq!(out.len(), segments.len(), "one output for each segment");
        let world_size = self.world_size();
        for (out, segment) in out.iter().zip(segments) {
            check_out(out, segment.numel / world_size, self.device);
        }
        self.communicator.check()?;
        let current = Lane::current(self.device)?;
        current.wait(&buffer.reduced)?;
        for (out, segment) in out.iter().zip(segments) {
            let numel = segment.numel / world_size;
            let own_offset_bytes = segment.offset_bytes + self.rank * numel * element_bytes(segment.kind);
            let own = buffer.memory.view(segment.kind, own_offset_bytes, numel);
            let mut out = out.shallow_clone();
            if accumulate {
                let _same = out.f_add_(&own)?;
            } else {
                out.f_copy_(&own)?;
            }
        }
        current.reads(buffer.memory.id());
        buffer.drained.record(&current)?;
        buffer.state = State::Free;
        Ok(())
    }
}
