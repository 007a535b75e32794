//! Ranks of one host over shared memory. Nothing is left behind by a crash: the memory has no name.
//!
//! - `rendezvous.rs`: how ranks find each other and open each other's memory.
//! - `channel.rs`: the counters by which ranks tell what they have written and released.
//! - `wait.rs`: waiting for counters without burning a core; peers that died, stay away, or call something else.
//! - `gather.rs`, `reduce.rs`: the buffers.
//! - `staging.rs`: collectives on plain tensors, in chunks through a small common area.
//!
//! Everything rests on two **monotone counters** that each rank has for each buffer, `written` and `released`. Use number
//! n of a buffer may be written when *all* ranks have released use n - 1, and read when *all* have written use n. One of
//! the two is not enough: after a barrier on `written` alone, a fast rank would write its range of the next use into the
//! buffer from which a slow one still reads.
//!
//! "Asynchronous" means progress on call: a start publishes and never waits, the work is done in the wait.
//!
//! **Mappings stay until the process ends.** Tensors alias them and nothing ties a tensor's life to a mapping; buffers are
//! few, made once and used to the end, so keeping them costs nothing and makes every alias safe.

mod channel;
mod gather;
mod reduce;
mod rendezvous;
mod staging;
mod wait;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fsdp_control::memory::SharedMemory;
use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use crate::CommError;
use crate::check::check_range;
use crate::flight::FlightRecord;
use channel::{Cell, Channel};
use rendezvous::Peer;
use staging::Staging;
use wait::Waiting;

pub use gather::ShmGatherBuffer;
pub use reduce::ShmReduceBuffer;

/// What a page of any common system divides: data starts at a multiple of it.
const ALIGN_BYTES: usize = 4096;

/// This rank's side of a group of processes of one host.
#[derive(Debug)]
pub struct ShmGroup {
    rank: usize,
    /// By rank of this group, the rank of the run, for messages.
    run_ranks: Vec<usize>,
    timeout: Duration,
    calls: FlightRecord,
    /// All ranks, this one included.
    peers: Vec<Peer>,
    /// For each rank, what it waits for.
    waiting: Vec<&'static Waiting>,
    /// The staging area's channel, then those of the buffers in order of their making: the same on all ranks.
    channels: Vec<Arc<Channel>>,
    staging: Staging,
}

impl ShmGroup {
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn world_size(&self) -> usize {
        self.peers.len()
    }

    pub(crate) fn write_flight_record(&self, path: &Path) -> Result<(), CommError> {
        self.calls.write(path)
    }

    /// Makes the memory of a buffer: on each rank of `owners` one mapping of `num_cells` cells and `len_bytes` bytes, which
    /// all ranks map. Gives the mappings in order of the owners.
    fn share_memory(
        &mut self,
        name: &str,
        len_bytes: usize,
        owners: std::ops::Range<usize>,
        num_cells: usize,
    ) -> Result<Vec<&'static SharedMemory>, CommError> {
        let total_bytes = data_offset_bytes(num_cells) + len_bytes.max(1);
        let own = if owners.contains(&self.rank) {
            Some(SharedMemory::create(&format!("fsdp-{name}"), total_bytes)?)
        } else {
            None
        };
        let own_fd = own.as_ref().map_or(-1, |(_, fd)| std::os::fd::AsRawFd::as_raw_fd(fd));
        let fds = Tensor::zeros([self.world_size() as i64], (Kind::Int64, tch::Device::Cpu));
        let call = self.calls.start(Op::NewBuffer, Some(Kind::Int64), len_bytes, 0, name);
        self.exchange(call, &Tensor::from_slice(&[i64::from(own_fd)]), &fds)?;
        let mut memories = Vec::new();
        let (mut own_memory, _own_fd) = own.unzip();
        for owner in owners {
            let memory = match own_memory.take_if(|_| owner == self.rank) {
                Some(memory) => memory,
                None => {
                    let fd = fds.int64_value(&[owner as i64]) as i32;
                    SharedMemory::open_of_process(self.peers[owner].pid, fd, total_bytes)?
                }
            };
            memories.push(keep(memory));
        }
        self.barrier()?; // all have opened it; the descriptor can go
        Ok(memories)
    }

    fn new_channel(&mut self, cells: Vec<&'static Cell>) -> Arc<Channel> {
        let channel = Arc::new(Channel::new(self.channels.len(), self.rank, cells));
        self.channels.push(Arc::clone(&channel));
        channel
    }
}

/// Where the data starts after so many cells.
fn data_offset_bytes(num_cells: usize) -> usize {
    (num_cells * size_of::<Cell>()).next_multiple_of(ALIGN_BYTES)
}

/// Keeps a mapping until the process ends; see the module.
fn keep(memory: SharedMemory) -> &'static SharedMemory {
    Box::leak(Box::new(memory))
}

/// A typed alias of part of a mapping's data.
///
/// # Panics
/// The part is not inside of the data, or not aligned for `kind`.
fn view(data: Data, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
    let start = data.range(kind, offset_bytes, numel);
    // SAFETY: the range is inside of a mapping that stays until the process ends, aligned, and any bits are valid
    // numbers. Who may write when is the protocol's matter (see the module).
    unsafe { Tensor::from_blob(start, &[numel as i64], &[1], kind, tch::Device::Cpu) }
}

/// The data part of a mapping.
#[derive(Clone, Copy, Debug)]
struct Data {
    memory: &'static SharedMemory,
    offset_bytes: usize,
    len_bytes: usize,
}

impl Data {
    fn new(memory: &'static SharedMemory, num_cells: usize, len_bytes: usize) -> Self {
        let offset_bytes = data_offset_bytes(num_cells);
        assert!(offset_bytes + len_bytes <= memory.len_bytes());
        Data { memory, offset_bytes, len_bytes }
    }

    /// Address of `numel` elements at `offset_bytes`, which are checked to be inside and aligned.
    fn range(self, kind: Kind, offset_bytes: usize, numel: usize) -> *mut u8 {
        check_range(self.len_bytes, kind, offset_bytes, numel);
        // SAFETY: inside of the mapping: the end is, by the check here and the assertion in `new`.
        unsafe { self.memory.start().add(self.offset_bytes + offset_bytes) }
    }
}
