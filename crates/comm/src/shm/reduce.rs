//! Reduce-scatter: one mapping a rank, mapped by all. Each rank adds up its own range straight from all mappings.

use std::sync::Arc;

use fsdp_control::progress::Op;
use tch::{Device, Kind, Tensor};

use super::channel::{Cell, Channel};
use super::{Data, ShmGroup, view};
use crate::check::{check_out, check_segments};
use crate::sum::{element_bytes, sum_into};
use crate::{Call, CommError, Phase, Segment};

/// The shm side of a [`crate::ReduceBuffer`].
#[derive(Debug)]
pub struct ShmReduceBuffer {
    channel: Arc<Channel>,
    rank: usize,
    /// By rank.
    data: Vec<Data>,
    /// Number of the present use, or of the last one when free.
    n: u32,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Free,
    Writing,
    Started(Call, Vec<Segment>),
}

impl ShmReduceBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        view(self.data[self.rank], kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.data[self.rank].len_bytes
    }
}

impl ShmGroup {
    pub(crate) fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<ShmReduceBuffer, CommError> {
        let memories = self.share_memory(name, len_bytes, 0..self.world_size(), 1)?;
        let channel = self.new_channel(memories.iter().flat_map(|memory| Cell::all_of(memory, 0, 1)).collect());
        let data = memories.iter().map(|memory| Data::new(memory, 1, len_bytes)).collect();
        Ok(ShmReduceBuffer { channel, rank: self.rank, data, n: 0, state: State::Free })
    }

    pub(crate) fn begin_reduce(&mut self, buffer: &mut ShmReduceBuffer, unit: &str) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Free, "begin_reduce of a buffer in use");
        if !buffer.channel.all_reached(Phase::Released, buffer.n) {
            let call = self.calls.upcoming(Op::ReduceScatter, buffer.len_bytes(), unit);
            self.wait(&buffer.channel, Phase::Released, buffer.n, &call)?;
        }
        buffer.n = buffer.n.wrapping_add(1);
        buffer.state = State::Writing;
        Ok(())
    }

    pub(crate) fn start_reduce_scatter(
        &mut self,
        buffer: &mut ShmReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Writing, "start_reduce_scatter without begin_reduce");
        let (kind, num_bytes) = check_segments(buffer.len_bytes(), segments, self.world_size());
        let call = self.calls.start(Op::ReduceScatter, kind, num_bytes, 0, unit);
        buffer.channel.publish(buffer.n, &call);
        buffer.state = State::Started(call, segments.to_vec());
        Ok(())
    }

    pub(crate) fn wait_reduce_scatter(
        &mut self,
        buffer: &mut ShmReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        let State::Started(call, segments) = &buffer.state else {
            panic!("wait_reduce_scatter in state {:?}", buffer.state);
        };
        assert_eq!(out.len(), segments.len(), "one output for each segment");
        for (out, segment) in out.iter().zip(segments) {
            check_out(out, segment.numel / self.world_size(), Device::Cpu);
        }
        self.wait(&buffer.channel, Phase::Written, buffer.n, call)?;
        for (out, segment) in out.iter().zip(segments) {
            let numel = segment.numel / self.world_size();
            if numel == 0 {
                continue; // an empty tensor may have a null address, of which no slice can be made
            }
            let offset_bytes = segment.offset_bytes + self.rank * numel * element_bytes(segment.kind);
            let sources: Vec<*const u8> =
                buffer.data.iter().map(|data| data.range(segment.kind, offset_bytes, numel).cast_const()).collect();
            // SAFETY: the output was checked to be so many contiguous f32; it is not part of a mapping that anybody
            // writes. The sources are checked ranges that all ranks have written, and leave alone until this rank
            // releases them.
            unsafe {
                let out = std::slice::from_raw_parts_mut(out.data_ptr().cast::<f32>(), numel);
                sum_into(segment.kind, &sources, out, accumulate);
            }
        }
        buffer.channel.release(buffer.n);
        self.calls.done(call);
        buffer.state = State::Free;
        Ok(())
    }
}
