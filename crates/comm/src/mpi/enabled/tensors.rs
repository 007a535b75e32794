//! Collectives on plain tensors. They wait in a queue: all ranks start them in its order, a few at a time, so that the
//! memory for what is received stays small.
//!
//! A small all-reduce is one all-gather, after which each rank adds up everything. A large one is cut into chunks, and of
//! each chunk a rank adds up its piece (an all-to-all brings it) and gathers the others' sums.

use std::collections::VecDeque;
use std::ffi::c_int;

use fsdp_control::progress::Op;
use tch::{Device, Kind, Tensor};

use super::MpiGroup;
use super::communicator::{Communicator, Pieces, Request};
use super::process::Failed;
use crate::check::{check_tensor, num_bytes};
use crate::sum::{combine_into, element_bytes};
use crate::{Call, CommError, ReduceOp, Work};

/// Most bytes that a rank receives in a small all-reduce.
const SMALL_BYTES: usize = 256 * 1024;
/// Bytes of a chunk of a large all-reduce.
const CHUNK_BYTES: usize = 4 << 20;
/// Collectives, or chunks of them, that are under way at once.
const MAX_UNDER_WAY: usize = 4;

/// What was started and is not done.
#[derive(Debug)]
pub(super) struct Queue {
    items: VecDeque<Item>,
    communicator: Communicator,
    /// For the second half of an all-reduce. They begin in order of the queue too, but not in the same places between
    /// other collectives on all ranks.
    sums: Communicator,
    /// Number of the last collective.
    last_number: u64,
}

/// A collective, or a chunk of one.
#[derive(Debug)]
struct Item {
    number: u64,
    call: Call,
    what: What,
    /// Contiguous.
    input: Tensor,
    out: Tensor,
    /// What is received from each rank, until it is combined.
    received: Tensor,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Barrier,
    Broadcast { root: usize },
    AllGather,
    ReduceScatter,
    SmallAllReduce(ReduceOp),
    AllReduce(ReduceOp),
}

#[derive(Debug)]
enum State {
    Queued,
    Started(Request),
    /// An all-reduce gathers its sums.
    Gathering(Request),
    Done,
}

impl MpiGroup {
    pub(crate) fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        check_tensor(Op::AllReduce, tensor, tensor.numel(), tensor.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::AllReduce, Some(tensor.kind()), num_bytes(tensor), op as u8, "");
        self.queue.last_number += 1;
        if num_bytes(tensor) * self.world_size() <= SMALL_BYTES {
            self.enqueue(&call, What::SmallAllReduce(op), tensor, tensor)?;
        } else {
            let flat = tensor.view([-1]);
            for chunk in flat.split((CHUNK_BYTES / element_bytes(tensor.kind())) as i64, 0) {
                self.enqueue(&call, What::AllReduce(op), &chunk, &chunk)?;
            }
        }
        Ok(Work { number: self.queue.last_number })
    }

    pub(crate) fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        assert!(root < self.world_size(), "root {root} of {}", self.world_size());
        check_tensor(Op::Broadcast, tensor, tensor.numel(), tensor.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::Broadcast, Some(tensor.kind()), num_bytes(tensor), root as u8, "");
        self.run(&call, What::Broadcast { root }, tensor, tensor)
    }

    pub(crate) fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::AllGather, input, input.numel(), input.kind(), Device::Cpu)?;
        check_tensor(Op::AllGather, out, input.numel() * self.world_size(), input.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::AllGather, Some(input.kind()), num_bytes(out), 0, "");
        self.run(&call, What::AllGather, input, out)
    }

    pub(crate) fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::ReduceScatter, out, out.numel(), out.kind(), Device::Cpu)?;
        check_tensor(Op::ReduceScatter, input, out.numel() * self.world_size(), out.kind(), Device::Cpu)?;
        let call = self.calls.start(Op::ReduceScatter, Some(input.kind()), num_bytes(input), 0, "");
        self.run(&call, What::ReduceScatter, input, out)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), CommError> {
        let call = self.calls.start(Op::Barrier, None, 0, 0, "");
        let nothing = Tensor::zeros([0], (Kind::Int64, Device::Cpu));
        self.run(&call, What::Barrier, &nothing, &nothing)
    }

    pub(crate) fn wait_work(&mut self, work: Work) -> Result<(), CommError> {
        let Some(first) = self.queue.items.front().filter(|item| item.number <= work.number) else {
            return Ok(());
        };
        let call = first.call.clone();
        self.wait(&call, |group| Ok(group.queue.items.front().is_none_or(|item| item.number > work.number)))
    }

    fn run(&mut self, call: &Call, what: What, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        self.queue.last_number += 1;
        self.enqueue(call, what, input, out)?;
        self.wait_work(Work { number: self.queue.last_number })
    }

    fn enqueue(&mut self, call: &Call, what: What, input: &Tensor, out: &Tensor) -> Result<(), CommError> {
        self.queue.items.push_back(Item {
            number: self.queue.last_number,
            call: call.clone(),
            what,
            input: input.shallow_clone(),
            out: out.shallow_clone(),
            received: Tensor::new(),
            state: State::Queued,
        });
        self.go_on()
    }

    /// Starts, goes on with and removes what can be.
    pub(super) fn advance(&mut self) -> Result<(), CommError> {
        let Queue { items, communicator, sums, .. } = &mut self.queue;
        let mut failed = None;
        // Sums begin to be gathered in the queue's order.
        let mut may_gather = true;
        for item in items.iter_mut().take(MAX_UNDER_WAY) {
            match item.advance(communicator, sums, may_gather) {
                Ok(()) => may_gather &= !matches!(item.state, State::Queued | State::Started(_)),
                Err(error) => {
                    failed = Some((error, item.call.clone()));
                    break;
                }
            }
        }
        if let Some((error, call)) = failed {
            return Err(self.failed(error, &call));
        }
        while let Some(item) = self.queue.items.pop_front_if(|item| matches!(item.state, State::Done)) {
            if self.queue.items.front().is_none_or(|next| next.number != item.number) {
                self.calls.done(&item.call);
            }
        }
        Ok(())
    }
}

impl Queue {
    /// Both communicators are for nothing else.
    pub fn new(communicator: Communicator, sums: Communicator) -> Self {
        Queue { items: VecDeque::new(), communicator, sums, last_number: 0 }
    }
}

impl Drop for Queue {
    /// MPI may still write what is under way, after an error.
    fn drop(&mut self) {
        std::mem::forget(std::mem::take(&mut self.items));
    }
}

impl Item {
    fn advance(&mut self, communicator: &Communicator, sums: &Communicator, may_gather: bool) -> Result<(), Failed> {
        if matches!(self.state, State::Queued) {
            self.state = match self.what {
                What::Barrier => State::Started(communicator.start_barrier()?),
                _ if self.input.numel() == 0 => State::Done, // on all ranks
                _ => State::Started(self.start(communicator)?),
            };
        }
        if let State::Started(request) = &mut self.state
            && (may_gather || !matches!(self.what, What::AllReduce(_)))
            && request.is_done()?
        {
            self.combine(communicator);
            self.state = match self.what {
                What::AllReduce(_) => {
                    let pieces = self.pieces(communicator);
                    let element = element_bytes(self.out.kind());
                    // SAFETY: the pieces are those of the tensor, which the caller and this queue leave alone.
                    State::Gathering(unsafe { sums.start_all_gather_pieces(address(&self.out), pieces, element)? })
                }
                _ => State::Done,
            };
        }
        if let State::Gathering(request) = &mut self.state
            && request.is_done()?
        {
            self.state = State::Done;
        }
        Ok(())
    }

    fn start(&mut self, communicator: &Communicator) -> Result<Request, Failed> {
        let (input, out) = (address(&self.input).cast_const(), address(&self.out));
        let element = element_bytes(self.input.kind());
        let world_size = communicator.size();
        // SAFETY: the tensors are contiguous, of the lengths that were checked; the caller leaves them alone until the
        // collective has been waited for. What is received goes to memory of the item, which lives until MPI has left it.
        unsafe {
            match self.what {
                What::Barrier => unreachable!("it has no tensors"),
                What::Broadcast { root } => communicator.start_broadcast(out, num_bytes(&self.out), root),
                What::AllGather => communicator.start_all_gather(input, out, num_bytes(&self.input)),
                What::SmallAllReduce(_) => {
                    let to = self.receive(world_size * self.input.numel());
                    communicator.start_all_gather(input, to, num_bytes(&self.input))
                }
                What::ReduceScatter => {
                    let to = self.receive(self.input.numel());
                    communicator.start_exchange_ranges(input, to, num_bytes(&self.out))
                }
                What::AllReduce(_) => {
                    let sent = self.pieces(communicator);
                    let own = sent.counts[communicator.rank()];
                    let to = self.receive(world_size * own as usize);
                    let starts = (0..world_size as c_int).map(|rank| rank * own).collect();
                    let received = Pieces { counts: vec![own; world_size], starts };
                    communicator.start_exchange(input, sent, to, received, element)
                }
            }
        }
    }

    /// Combines what has been received.
    fn combine(&self, communicator: &Communicator) {
        let (rank, world_size) = (communicator.rank(), communicator.size());
        let kind = self.out.kind();
        let run = |op: ReduceOp, out: *mut u8, numel: usize, own: Option<*const u8>| {
            let range_bytes = numel * element_bytes(kind);
            let sources: Vec<*const u8> = (0..world_size)
                .map(|source| match own {
                    Some(own) if source == rank => own,
                    // SAFETY: `received` has as many ranges as there are ranks.
                    _ => unsafe { address(&self.received).add(source * range_bytes) }.cast_const(),
                })
                .collect();
            // SAFETY: all are ranges of `numel` elements, which MPI has left; `out` is in another tensor than the sources.
            unsafe { combine_into(kind, op, &sources, out, numel) };
        };
        match self.what {
            What::Barrier | What::Broadcast { .. } | What::AllGather => {}
            What::SmallAllReduce(op) => run(op, address(&self.out), self.out.numel(), None),
            What::ReduceScatter => {
                let numel = self.out.numel();
                // SAFETY: this rank's range of the input.
                let own = unsafe { address(&self.input).add(rank * num_bytes(&self.out)) };
                run(ReduceOp::Sum, address(&self.out), numel, Some(own));
            }
            What::AllReduce(op) => {
                let pieces = self.pieces(communicator);
                let (start, numel) = (pieces.starts[rank] as usize, pieces.counts[rank] as usize);
                if numel > 0 {
                    // SAFETY: this rank's piece of the tensor.
                    run(op, unsafe { address(&self.out).add(start * element_bytes(kind)) }, numel, None);
                }
            }
        }
    }

    /// How the elements of an all-reduce are dealt out to the ranks.
    fn pieces(&self, communicator: &Communicator) -> Pieces {
        let numel = self.out.numel();
        let piece = numel.div_ceil(communicator.size());
        let start = |rank: usize| (rank * piece).min(numel);
        Pieces {
            counts: (0..communicator.size()).map(|rank| (start(rank + 1) - start(rank)) as c_int).collect(),
            starts: (0..communicator.size()).map(|rank| start(rank) as c_int).collect(),
        }
    }

    /// Memory for so many elements of other ranks.
    fn receive(&mut self, numel: usize) -> *mut u8 {
        self.received = Tensor::empty([numel.max(1) as i64], (self.input.kind(), Device::Cpu));
        address(&self.received)
    }
}

fn address(tensor: &Tensor) -> *mut u8 {
    tensor.data_ptr().cast()
}
