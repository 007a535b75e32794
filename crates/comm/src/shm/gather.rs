//! All-gather: one mapping shared by all ranks. A rank writes its own ranges in place; nothing is copied.

use std::sync::Arc;

use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use super::channel::{Cell, Channel};
use super::{Data, ShmGroup, view};
use crate::check::check_segments;
use crate::{Call, CommError, Phase, Segment};

/// The shm side of a [`crate::GatherBuffer`].
#[derive(Debug)]
pub struct ShmGatherBuffer {
    channel: Arc<Channel>,
    data: Data,
    /// Number of the present use, or of the last one when free.
    n: u32,
    state: State,
}

#[derive(Debug, PartialEq)]
enum State {
    Free,
    Writing,
    Started(Call),
    Whole,
}

impl ShmGatherBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        view(self.data, kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.data.len_bytes
    }
}

impl ShmGroup {
    pub(crate) fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<ShmGatherBuffer, CommError> {
        let num_cells = self.world_size();
        let memory = self.share_memory(name, len_bytes, 0..1, num_cells)?[0];
        let channel = self.new_channel(Cell::all_of(memory, 0, num_cells));
        Ok(ShmGatherBuffer { channel, data: Data::new(memory, num_cells, len_bytes), n: 0, state: State::Free })
    }

    pub(crate) fn try_begin_write(&mut self, buffer: &mut ShmGatherBuffer) -> Result<bool, CommError> {
        assert!(matches!(buffer.state, State::Free | State::Writing), "begin_write in state {:?}", buffer.state);
        if buffer.state == State::Free && buffer.channel.all_reached(Phase::Released, buffer.n) {
            buffer.n = buffer.n.wrapping_add(1);
            buffer.state = State::Writing;
        }
        Ok(buffer.state == State::Writing)
    }

    pub(crate) fn begin_write(&mut self, buffer: &mut ShmGatherBuffer, unit: &str) -> Result<(), CommError> {
        if !self.try_begin_write(buffer)? {
            let call = self.calls.upcoming(Op::AllGather, buffer.len_bytes(), unit);
            self.wait(&buffer.channel, Phase::Released, buffer.n, &call)?;
            assert!(self.try_begin_write(buffer)?);
        }
        Ok(())
    }

    pub(crate) fn start_all_gather(
        &mut self,
        buffer: &mut ShmGatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Writing, "start_all_gather without begin_write");
        let (kind, num_bytes) = check_segments(buffer.len_bytes(), segments, self.world_size());
        let call = self.calls.start(Op::AllGather, kind, num_bytes, 0, unit);
        buffer.channel.publish(buffer.n, &call);
        buffer.state = State::Started(call);
        Ok(())
    }

    pub(crate) fn wait_all_gather(&mut self, buffer: &mut ShmGatherBuffer) -> Result<(), CommError> {
        let State::Started(call) = &buffer.state else {
            panic!("wait_all_gather in state {:?}", buffer.state);
        };
        self.wait(&buffer.channel, Phase::Written, buffer.n, call)?;
        self.calls.done(call);
        buffer.state = State::Whole;
        Ok(())
    }

    pub(crate) fn release(&mut self, buffer: &mut ShmGatherBuffer) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Whole, "release without wait_all_gather");
        buffer.channel.release(buffer.n);
        buffer.state = State::Free;
        Ok(())
    }
}
