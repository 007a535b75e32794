//! Collectives on plain tensors: in chunks through a common area that has a few slots for each rank. A chunk goes through
//! the same two conditions as a buffer: written by all before it is read, released by all before its slot is used again.

use std::collections::VecDeque;
use std::sync::Arc;

use fsdp_control::memory::SharedMemory;
use fsdp_control::progress::Op;
use tch::{Device, Kind, Tensor};

use super::ShmGroup;
use super::channel::{Cell, Channel, NUM_CALLS, reached};
use crate::check::{check_tensor, num_bytes};
use crate::sum::{combine_into, element_bytes};
use crate::{Call, CommError, Phase, ReduceOp, Work};

/// Chunks that a rank can publish before the first is released.
const NUM_SLOTS: u32 = NUM_CALLS;
/// What a rank can put into one chunk.
const SLOT_BYTES: usize = 128 * 1024;

/// Bytes of the area.
pub(super) fn len_bytes(world_size: usize) -> usize {
    world_size * NUM_SLOTS as usize * SLOT_BYTES
}

/// The area, and the collectives that were started and not finished, in order.
#[derive(Debug)]
pub(super) struct Staging {
    rank: usize,
    world_size: usize,
    channel: Arc<Channel>,
    memory: &'static SharedMemory,
    data_offset_bytes: usize,
    queue: VecDeque<Staged>,
    /// Number of the last collective, and of the last chunk, that was started.
    last_number: u64,
    last_chunk: u32,
}

/// One collective, cut into chunks of the elements that each rank contributes (to each rank's output).
#[derive(Debug)]
struct Staged {
    number: u64,
    call: Call,
    op: StagedOp,
    element_bytes: usize,
    kind: Kind,
    input: Tensor,
    out: Tensor,
    /// Elements that the chunks cut: of the input (all-reduce, all-gather, broadcast) or of the output (reduce-scatter).
    numel: usize,
    chunk_numel: usize,
    first_chunk: u32,
    num_chunks: u32,
    num_published: u32,
    num_consumed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum StagedOp {
    AllReduce(ReduceOp),
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
    Barrier,
}

impl ShmGroup {
    pub(crate) fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        check_tensor(Op::AllReduce, tensor, tensor.numel(), tensor.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::AllReduce, Some(tensor.kind()), num_bytes(tensor), op as u8, "");
        Ok(self.staging.start(StagedOp::AllReduce(op), call, tensor, tensor))
    }

    pub(crate) fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        assert!(root < self.world_size(), "root {root} of {}", self.world_size());
        check_tensor(Op::Broadcast, tensor, tensor.numel(), tensor.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::Broadcast, Some(tensor.kind()), num_bytes(tensor), root as u8, "");
        let work = self.staging.start(StagedOp::Broadcast { root }, call, tensor, tensor);
        self.wait_work(work)
    }

    pub(crate) fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::AllGather, input, input.numel(), input.kind(), Device::Cpu)?;
        check_tensor(Op::AllGather, out, input.numel() * self.world_size(), input.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::AllGather, Some(input.kind()), num_bytes(out), 0, "");
        self.exchange(call, input, out)
    }

    pub(crate) fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::ReduceScatter, out, out.numel(), out.kind(), Device::Cpu)?;
        check_tensor(Op::ReduceScatter, input, out.numel() * self.world_size(), out.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::ReduceScatter, Some(input.kind()), num_bytes(input), 0, "");
        let work = self.staging.start(StagedOp::ReduceScatter, call, input, out);
        self.wait_work(work)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), CommError> {
        let call = self.calls.start(Op::Barrier, None, 0, 0, "");
        self.staged_barrier(call)
    }

    pub(super) fn staged_barrier(&mut self, call: Call) -> Result<(), CommError> {
        let nothing = Tensor::zeros([0], (Kind::Int64, Device::Cpu));
        let work = self.staging.start(StagedOp::Barrier, call, &nothing, &nothing);
        self.wait_work(work)
    }

    /// An all-gather of tensors that are known to fit.
    pub(super) fn exchange(&mut self, call: Call, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        let work = self.staging.start(StagedOp::AllGather, call, input, out);
        self.wait_work(work)
    }

    pub(crate) fn wait_work(&mut self, work: Work) -> Result<(), CommError> {
        // Chunks are released in order, so the collectives that were started before come first.
        while let Some(staged) = self.staging.queue.front().filter(|staged| staged.number <= work.number) {
            if staged.num_consumed == staged.num_chunks {
                self.calls.done(&staged.call);
                self.staging.queue.pop_front();
                continue;
            }
            let (call, is_published) = (staged.call.clone(), staged.num_published > staged.num_consumed);
            let chunk = staged.first_chunk.wrapping_add(staged.num_consumed);
            let channel = self.staging.channel();
            if is_published {
                self.wait(&channel, Phase::Written, chunk, &call)?;
                self.staging.consume_first();
            } else {
                self.wait(&channel, Phase::Released, chunk.wrapping_sub(NUM_SLOTS), &call)?;
            }
            self.staging.publish_ready();
        }
        Ok(())
    }
}

impl Staging {
    pub fn new(
        memory: &'static SharedMemory,
        data_offset_bytes: usize,
        cells_offset_bytes: usize,
        rank: usize,
        world_size: usize,
    ) -> Self {
        assert!(data_offset_bytes + len_bytes(world_size) <= memory.len_bytes());
        let channel = Arc::new(Channel::new(0, rank, Cell::all_of(memory, cells_offset_bytes, world_size)));
        let queue = VecDeque::new();
        Staging { rank, world_size, channel, memory, data_offset_bytes, queue, last_number: 0, last_chunk: 0 }
    }

    pub fn channel(&self) -> Arc<Channel> {
        Arc::clone(&self.channel)
    }

    /// Whether this rank has called the collective that chunk `n` belongs to.
    pub fn has_started(&self, n: u32) -> bool {
        reached(self.last_chunk, n)
    }

    fn start(&mut self, op: StagedOp, call: Call, input: &Tensor, out: &Tensor) -> Work {
        let element_bytes = element_bytes(input.kind());
        let (numel, pieces) = match op {
            StagedOp::ReduceScatter => (out.numel(), self.world_size),
            _ => (input.numel(), 1),
        };
        let chunk_numel = SLOT_BYTES / (element_bytes * pieces);
        assert!(chunk_numel > 0, "{pieces} ranks are too many for a slot of {SLOT_BYTES} bytes");
        let num_chunks = numel.div_ceil(chunk_numel).max(1) as u32; // an empty one meets the others too
        let staged = Staged {
            number: self.last_number + 1,
            call,
            op,
            element_bytes,
            kind: input.kind(),
            input: input.shallow_clone(),
            out: out.shallow_clone(),
            numel,
            chunk_numel,
            first_chunk: self.last_chunk.wrapping_add(1),
            num_chunks,
            num_published: 0,
            num_consumed: 0,
        };
        self.last_number = staged.number;
        self.last_chunk = self.last_chunk.wrapping_add(num_chunks);
        self.queue.push_back(staged);
        self.publish_ready();
        Work { number: self.last_number }
    }

    /// Publishes, in order, the chunks whose slots all ranks have released. Never waits.
    pub fn publish_ready(&mut self) {
        for i in 0..self.queue.len() {
            while self.queue[i].num_published < self.queue[i].num_chunks {
                let staged = &self.queue[i];
                let chunk = staged.first_chunk.wrapping_add(staged.num_published);
                if !self.channel.all_reached(Phase::Released, chunk.wrapping_sub(NUM_SLOTS)) {
                    return;
                }
                self.write(staged, staged.num_published as usize, self.slot(self.rank, chunk));
                self.channel.publish(chunk, &staged.call);
                self.queue[i].num_published += 1;
            }
        }
    }

    /// Reads the next chunk of the first collective, which all ranks have written, and releases it.
    fn consume_first(&mut self) {
        let staged = self.queue.front().expect("the caller has one");
        let chunk = staged.first_chunk.wrapping_add(staged.num_consumed);
        self.read(staged, staged.num_consumed as usize, chunk);
        self.channel.release(chunk);
        self.queue.front_mut().expect("the caller has one").num_consumed += 1;
    }

    /// Copies this rank's part of chunk `i` into its slot.
    fn write(&self, staged: &Staged, i: usize, slot: *mut u8) {
        let (start, numel) = staged.range(i);
        let input = |at: usize| staged.input_at(at);
        let copy = |from: *const u8, to_element: usize| {
            // SAFETY: `range` and `slot` are inside of the tensor and of the slot, which other ranks leave alone until
            // this chunk is published; the tensor is not in the area.
            unsafe {
                let to = slot.add(to_element * staged.element_bytes);
                std::ptr::copy_nonoverlapping(from, to, numel * staged.element_bytes);
            }
        };
        match staged.op {
            StagedOp::AllReduce(_) | StagedOp::AllGather => copy(input(start), 0),
            StagedOp::Broadcast { root } if root == self.rank => copy(input(start), 0),
            StagedOp::Broadcast { .. } | StagedOp::Barrier => {}
            StagedOp::ReduceScatter => {
                for rank in 0..self.world_size {
                    copy(input(rank * staged.numel + start), rank * staged.chunk_numel);
                }
            }
        }
    }

    /// Copies or combines chunk `i` of all ranks into the output.
    fn read(&self, staged: &Staged, i: usize, chunk: u32) {
        let (start, numel) = staged.range(i);
        if numel == 0 {
            return; // an empty tensor may have a null address, of which no slice can be made
        }
        let copy = |rank: usize, to_element: usize| {
            // SAFETY: as in `write`, the other way; all ranks have written the chunk and leave it until it is released.
            unsafe {
                let from = self.slot(rank, chunk).cast_const();
                std::ptr::copy_nonoverlapping(from, staged.out_at(to_element), numel * staged.element_bytes);
            }
        };
        let combine = |op: ReduceOp, at_element: usize| {
            let at_bytes = at_element * staged.element_bytes;
            let sources: Vec<*const u8> = (0..self.world_size)
                // SAFETY: the piece is inside of the slot: `chunk_numel` is chosen so.
                .map(|rank| unsafe { self.slot(rank, chunk).add(at_bytes) }.cast_const())
                .collect();
            // SAFETY: as above, for each rank's slot.
            unsafe { combine_into(staged.kind, op, &sources, staged.out_at(start), numel) };
        };
        match staged.op {
            StagedOp::AllReduce(op) => combine(op, 0),
            StagedOp::ReduceScatter => combine(ReduceOp::Sum, self.rank * staged.chunk_numel),
            StagedOp::AllGather => (0..self.world_size).for_each(|rank| copy(rank, rank * staged.numel + start)),
            StagedOp::Broadcast { root } if root != self.rank => copy(root, start),
            StagedOp::Broadcast { .. } | StagedOp::Barrier => {}
        }
    }

    fn slot(&self, rank: usize, chunk: u32) -> *mut u8 {
        let slot = rank * NUM_SLOTS as usize + (chunk % NUM_SLOTS) as usize;
        // SAFETY: inside of the mapping, as `new` asserts.
        unsafe { self.memory.start().add(self.data_offset_bytes + slot * SLOT_BYTES) }
    }
}

impl Staged {
    /// Start and length of chunk `i`, in elements.
    fn range(&self, i: usize) -> (usize, usize) {
        let start = i * self.chunk_numel;
        (start, self.chunk_numel.min(self.numel - start))
    }

    fn input_at(&self, element: usize) -> *const u8 {
        assert!(element <= self.input.numel());
        // SAFETY: inside of the contiguous tensor, or one past it.
        unsafe { self.input.data_ptr().cast_const().cast::<u8>().add(element * self.element_bytes) }
    }

    fn out_at(&self, element: usize) -> *mut u8 {
        assert!(element <= self.out.numel());
        // SAFETY: inside of the contiguous tensor, or one past it.
        unsafe { self.out.data_ptr().cast::<u8>().add(element * self.element_bytes) }
    }
}
