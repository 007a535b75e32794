//! All-gather: one mapping shared by all ranks. A rank writes its own ranges in place; nothing is copied.

use std::sync::Arc;

use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use super::channel::{Cell, Channel};
use super::{Data, ShmGroup, check_segments, view};
use crate::{Call, CommError, Phase, Segment};

/// A buffer whose contents are gathered from all ranks' ranges. It goes through *free*, *writing*
/// ([`crate::ProcessGroup::begin_write`]), *started*, *whole* ([`crate::ProcessGroup::wait_all_gather`]) and back to free
/// ([`crate::ProcessGroup::release`]).
#[derive(Debug)]
pub struct GatherBuffer {
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

impl GatherBuffer {
    /// The memory as a 1-D tensor that aliases it, with a version counter of its own: autograd does not see writes through
    /// another view. It may be used for the rest of the process's life, at the times that the protocol allows.
    ///
    /// # Panics
    /// The range is outside of the buffer, or not aligned for `kind`.
    pub fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        view(self.data, kind, offset_bytes, numel)
    }

    pub fn len_bytes(&self) -> usize {
        self.data.len_bytes
    }
}

impl ShmGroup {
    pub(crate) fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<GatherBuffer, CommError> {
        let num_cells = self.world_size();
        let memory = self.share_memory(name, len_bytes, 0..1, num_cells)?[0];
        let channel = self.new_channel(Cell::all_of(memory, 0, num_cells));
        Ok(GatherBuffer { channel, data: Data::new(memory, num_cells, len_bytes), n: 0, state: State::Free })
    }

    pub(crate) fn try_begin_write(&mut self, buffer: &mut GatherBuffer) -> Result<bool, CommError> {
        assert!(matches!(buffer.state, State::Free | State::Writing), "begin_write in state {:?}", buffer.state);
        if buffer.state == State::Free && buffer.channel.all_reached(Phase::Released, buffer.n) {
            buffer.n = buffer.n.wrapping_add(1);
            buffer.state = State::Writing;
        }
        Ok(buffer.state == State::Writing)
    }

    pub(crate) fn begin_write(&mut self, buffer: &mut GatherBuffer, unit: &str) -> Result<(), CommError> {
        if !self.try_begin_write(buffer)? {
            // The call that is about to start.
            let seq = self.seq + 1;
            let num_bytes = buffer.data.len_bytes as u64;
            let call = Call { op: Op::AllGather, seq, kind: None, num_bytes, detail: 0, unit: unit.to_owned() };
            self.wait(&buffer.channel, Phase::Released, buffer.n, &call)?;
            assert!(self.try_begin_write(buffer)?);
        }
        Ok(())
    }

    pub(crate) fn start_all_gather(
        &mut self,
        buffer: &mut GatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        assert_eq!(buffer.state, State::Writing, "start_all_gather without begin_write");
        let (kind, num_bytes) = check_segments(buffer.data, segments, self.world_size());
        let call = self.start_call(Op::AllGather, kind, num_bytes, 0, unit);
        buffer.channel.publish(buffer.n, &call);
        buffer.state = State::Started(call);
        Ok(())
    }

    pub(crate) fn wait_all_gather(&mut self, buffer: &mut GatherBuffer) -> Result<(), CommError> {
        let State::Started(call) = &buffer.state else {
            panic!("wait_all_gather in state {:?}", buffer.state);
        };
        self.wait(&buffer.channel, Phase::Written, buffer.n, call)?;
        buffer.state = State::Whole;
        Ok(())
    }

    pub(crate) fn release(&mut self, buffer: &mut GatherBuffer) {
        assert_eq!(buffer.state, State::Whole, "release without wait_all_gather");
        buffer.channel.release(buffer.n);
        buffer.state = State::Free;
    }
}
