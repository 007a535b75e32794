//! Buffers. Each rank has the whole of a gather buffer, so writing needs no other rank's leave: a range goes out from its
//! place, and those of the others come to theirs. A reduce buffer has a second half for the others' ranges.

use fsdp_control::progress::Op;
use tch::{Device, Kind, Tensor};

use super::MpiGroup;
use super::communicator::{Communicator, Request};
use crate::check::{check_out, check_segments};
use crate::memory::Memory;
use crate::sum::{element_bytes, sum_into};
use crate::{Call, CommError, Segment};

/// The MPI side of a [`crate::GatherBuffer`].
#[derive(Debug)]
pub struct MpiGatherBuffer {
    communicator: Communicator,
    memory: Memory,
    state: State,
}

/// The MPI side of a [`crate::ReduceBuffer`].
#[derive(Debug)]
pub struct MpiReduceBuffer {
    communicator: Communicator,
    own: Memory,
    /// The others' summands for this rank's ranges: in a segment's place the n-th range is rank n's. This rank's own
    /// ranges are never written, nor read.
    received: Memory,
    state: State,
}

#[derive(Debug)]
enum State {
    Free,
    Writing,
    Started(Call, Vec<Segment>, Vec<Request>),
    Whole,
}

impl MpiGatherBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.memory.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
}

impl MpiReduceBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.own.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.own.len_bytes()
    }
}

impl MpiGroup {
    pub(crate) fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<MpiGatherBuffer, CommError> {
        let communicator = self.new_communicator(name, len_bytes)?;
        Ok(MpiGatherBuffer { communicator, memory: Memory::zeros(len_bytes, Device::Cpu)?, state: State::Free })
    }

    pub(crate) fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<MpiReduceBuffer, CommError> {
        let communicator = self.new_communicator(name, len_bytes)?;
        let (own, received) = (Memory::zeros(len_bytes, Device::Cpu)?, Memory::untouched(len_bytes)?);
        Ok(MpiReduceBuffer { communicator, own, received, state: State::Free })
    }

    fn new_communicator(&mut self, name: &str, len_bytes: usize) -> Result<Communicator, CommError> {
        let call = self.calls.start(Op::NewBuffer, None, len_bytes, 0, name);
        let communicator = self.duplicate(&call)?;
        self.calls.done(&call);
        Ok(communicator)
    }

    pub(crate) fn try_begin_write(&mut self, buffer: &mut MpiGatherBuffer) -> Result<bool, CommError> {
        assert!(matches!(buffer.state, State::Free | State::Writing), "begin_write in state {:?}", buffer.state);
        buffer.state = State::Writing;
        self.go_on()?;
        Ok(true)
    }

    pub(crate) fn begin_write(&mut self, buffer: &mut MpiGatherBuffer, _: &str) -> Result<(), CommError> {
        self.try_begin_write(buffer).map(|_| ())
    }

    pub(crate) fn start_all_gather(
        &mut self,
        buffer: &mut MpiGatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert!(matches!(buffer.state, State::Writing), "start_all_gather without begin_write");
        let (kind, num_bytes) = check_segments(buffer.len_bytes(), segments, self.world_size());
        let call = self.calls.start(Op::AllGather, kind, num_bytes, 0, unit);
        let mut requests = Vec::new();
        for segment in segments {
            let start = buffer.memory.range(segment.kind, segment.offset_bytes, segment.numel);
            let range_bytes = segment.numel / self.world_size() * element_bytes(segment.kind);
            // SAFETY: the segment is inside of memory that stays. The protocol has nobody touch it until the gather has
            // been waited for.
            let request = unsafe { buffer.communicator.start_all_gather_in_place(start, range_bytes) };
            requests.push(request.map_err(|failed| self.failed(failed, &call))?);
        }
        buffer.state = State::Started(call, segments.to_vec(), requests);
        self.go_on()
    }

    pub(crate) fn wait_all_gather(&mut self, buffer: &mut MpiGatherBuffer) -> Result<(), CommError> {
        let State::Started(call, _, requests) = &mut buffer.state else {
            panic!("wait_all_gather in state {:?}", buffer.state);
        };
        self.wait_requests(requests, call)?;
        self.calls.done(call);
        buffer.state = State::Whole;
        Ok(())
    }

    pub(crate) fn release(&mut self, buffer: &mut MpiGatherBuffer) -> Result<(), CommError> {
        assert!(matches!(buffer.state, State::Whole), "release without wait_all_gather");
        buffer.state = State::Free;
        self.go_on()
    }

    pub(crate) fn begin_reduce(&mut self, buffer: &mut MpiReduceBuffer, _: &str) -> Result<(), CommError> {
        assert!(matches!(buffer.state, State::Free), "begin_reduce of a buffer in use");
        buffer.state = State::Writing;
        self.go_on()
    }

    pub(crate) fn start_reduce_scatter(
        &mut self,
        buffer: &mut MpiReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert!(matches!(buffer.state, State::Writing), "start_reduce_scatter without begin_reduce");
        let (kind, num_bytes) = check_segments(buffer.len_bytes(), segments, self.world_size());
        let call = self.calls.start(Op::ReduceScatter, kind, num_bytes, 0, unit);
        let mut requests = Vec::new();
        for Segment { kind, offset_bytes, numel } in segments.iter().copied() {
            let from = buffer.own.range(kind, offset_bytes, numel);
            let to = buffer.received.range(kind, offset_bytes, numel);
            let range_bytes = numel / self.world_size() * element_bytes(kind);
            // SAFETY: the segment is inside of both memories, which stay. The protocol has nobody touch the own one until
            // the sum has been waited for, and nobody else sees the other one.
            let request = unsafe { buffer.communicator.start_exchange_ranges(from, to, range_bytes) };
            requests.push(request.map_err(|failed| self.failed(failed, &call))?);
        }
        buffer.state = State::Started(call, segments.to_vec(), requests);
        self.go_on()
    }

    pub(crate) fn wait_reduce_scatter(
        &mut self,
        buffer: &mut MpiReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        let State::Started(call, segments, requests) = &mut buffer.state else {
            panic!("wait_reduce_scatter in state {:?}", buffer.state);
        };
        let world_size = self.world_size();
        assert_eq!(out.len(), segments.len(), "one output for each segment");
        for (out, segment) in out.iter().zip(&*segments) {
            check_out(out, segment.numel / world_size, Device::Cpu);
        }
        self.wait_requests(requests, call)?;
        for (out, segment) in out.iter().zip(&*segments) {
            let numel = segment.numel / world_size;
            if numel == 0 {
                continue; // an empty tensor may have a null address, of which no slice can be made
            }
            let sources: Vec<*const u8> = (0..world_size)
                .map(|rank| {
                    let memory = if rank == self.rank() { buffer.own } else { buffer.received };
                    let offset_bytes = segment.offset_bytes + rank * numel * element_bytes(segment.kind);
                    memory.range(segment.kind, offset_bytes, numel).cast_const()
                })
                .collect();
            // SAFETY: the output was checked to be so many contiguous f32, and is in neither memory. The sources are
            // checked ranges, which MPI has left.
            unsafe {
                let out = std::slice::from_raw_parts_mut(out.data_ptr().cast::<f32>(), numel);
                sum_into(segment.kind, &sources, out, accumulate);
            }
        }
        self.calls.done(call);
        buffer.state = State::Free;
        Ok(())
    }
}
