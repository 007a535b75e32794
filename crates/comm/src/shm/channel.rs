//! The counters by which ranks tell each other what they have written and released, and a short record of each call, so
//! that ranks that call different things find out.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use fsdp_control::memory::SharedMemory;
use fsdp_control::progress::{MAX_UNIT_BYTES, Op};
use rustix::thread::futex;

use crate::sum::{kind_code, kind_from_code};
use crate::{Call, Phase};

/// Uses of one channel whose calls are kept; a rank is never more than this far ahead of another one.
pub(super) const NUM_CALLS: u32 = 8;

/// One rank's side of a channel, in shared memory. Only that rank writes it.
///
/// The counters number uses from 1 and wrap around; see [`reached`].
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Cell {
    /// Last use whose data this rank has written. A futex word.
    written: AtomicU32,
    /// Last use that this rank has finished reading. A futex word.
    released: AtomicU32,
    /// What this rank called for use n, at n % NUM_CALLS; valid once `written` has reached n.
    calls: [CallCell; NUM_CALLS as usize],
}

/// A [`Call`] in shared memory.
#[derive(Debug)]
#[repr(C)]
pub(super) struct CallCell {
    /// Bytes from the lowest: op, kind, detail.
    what: AtomicU64,
    num_bytes: AtomicU64,
    unit: [AtomicU64; MAX_UNIT_BYTES / 8],
    seq: AtomicU64,
}

/// All ranks' sides of a buffer (or of the staging area).
#[derive(Debug)]
pub(super) struct Channel {
    /// The same on all ranks.
    pub id: usize,
    rank: usize,
    /// By rank.
    cells: Vec<&'static Cell>,
}

impl Channel {
    pub fn new(id: usize, rank: usize, cells: Vec<&'static Cell>) -> Self {
        Channel { id, rank, cells }
    }

    /// Tells all that this rank has written its data of use `n`.
    pub fn publish(&self, n: u32, call: &Call) {
        let own = self.cells[self.rank];
        own.call(n).store(call);
        own.written.store(n, Ordering::Release);
        wake(&own.written);
    }

    /// Tells all that this rank has finished reading use `n`.
    pub fn release(&self, n: u32) {
        let own = self.cells[self.rank];
        own.released.store(n, Ordering::Release);
        wake(&own.released);
    }

    pub fn reached(&self, rank: usize, phase: Phase, n: u32) -> bool {
        reached(self.word(rank, phase).load(Ordering::Acquire), n)
    }

    pub fn all_reached(&self, phase: Phase, n: u32) -> bool {
        (0..self.cells.len()).all(|rank| self.reached(rank, phase, n))
    }

    /// The futex word of a rank's counter.
    pub fn word(&self, rank: usize, phase: Phase) -> &'static AtomicU32 {
        match phase {
            Phase::Written => &self.cells[rank].written,
            Phase::Released => &self.cells[rank].released,
        }
    }

    /// The first rank that has written use `n` for another call than this rank, which has written it too; and its call.
    pub fn find_mismatch(&self, n: u32) -> Option<(usize, Call)> {
        let own = self.cells[self.rank].call(n);
        for (rank, cell) in self.cells.iter().enumerate() {
            if self.reached(rank, Phase::Written, n) && !cell.call(n).same_as(own) {
                return Some((rank, cell.call(n).load()));
            }
        }
        None
    }
}

impl Cell {
    /// The `count` cells at the start of a mapping.
    pub fn all_of(memory: &'static SharedMemory, offset_bytes: usize, count: usize) -> Vec<&'static Cell> {
        assert!(offset_bytes.is_multiple_of(align_of::<Cell>()));
        assert!(offset_bytes + count * size_of::<Cell>() <= memory.len_bytes());
        // SAFETY: inside of the page-aligned mapping, aligned; it lives as long as the process, and a cell is all
        // atomics, for which any bits are valid and other processes' writes are no data race.
        (0..count).map(|i| unsafe { &*memory.start().add(offset_bytes).cast::<Cell>().add(i) }).collect()
    }

    fn call(&self, n: u32) -> &CallCell {
        &self.calls[(n % NUM_CALLS) as usize]
    }
}

impl CallCell {
    pub fn store(&self, call: &Call) {
        let kind = call.kind.map_or(0, kind_code);
        let what = u64::from_le_bytes([call.op as u8, kind, call.detail, 0, 0, 0, 0, 0]);
        self.what.store(what, Ordering::Relaxed);
        self.num_bytes.store(call.num_bytes, Ordering::Relaxed);
        self.seq.store(call.seq, Ordering::Relaxed);
        let mut bytes = [0; MAX_UNIT_BYTES];
        let len = call.unit.len().min(MAX_UNIT_BYTES);
        bytes[..len].copy_from_slice(&call.unit.as_bytes()[..len]);
        for (word, chunk) in self.unit.iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
    }

    pub fn load(&self) -> Call {
        let [op, kind, detail, ..] = self.what.load(Ordering::Relaxed).to_le_bytes();
        let mut bytes = [0; MAX_UNIT_BYTES];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&self.unit) {
            *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        let len = bytes.iter().position(|&b| b == 0).unwrap_or(MAX_UNIT_BYTES);
        Call {
            op: Op::from_code(op.into()).unwrap_or_default(),
            seq: self.seq.load(Ordering::Relaxed),
            kind: kind_from_code(kind),
            num_bytes: self.num_bytes.load(Ordering::Relaxed),
            detail,
            unit: String::from_utf8_lossy(&bytes[..len]).into_owned(),
        }
    }

    /// Everything but the sequence number agrees: starts on different buffers may have changed places.
    fn same_as(&self, other: &CallCell) -> bool {
        let same = |a: &AtomicU64, b: &AtomicU64| a.load(Ordering::Relaxed) == b.load(Ordering::Relaxed);
        same(&self.what, &other.what)
            && same(&self.num_bytes, &other.num_bytes)
            && self.unit.iter().zip(&other.unit).all(|(a, b)| same(a, b))
    }
}

/// Whether a counter has come to use `n`. Counters wrap around after 2^32 uses, and no two are ever half that apart.
pub(super) fn reached(counter: u32, n: u32) -> bool {
    counter.wrapping_sub(n) as i32 >= 0
}

/// Wakes all processes that wait on a word.
fn wake(word: &AtomicU32) {
    futex::wake(word, futex::Flags::empty(), i32::MAX as u32).expect("the word is mapped and aligned");
}

#[cfg(test)]
mod tests {
    use super::reached;

    #[test]
    fn counters_wrap_around() {
        for (counter, n, expected) in [
            (0, 0, true),
            (0, 1, false),
            (1, 1, true),
            (0, 0u32.wrapping_sub(7), true),
            (u32::MAX, 0, false),
            (0, u32::MAX, true),
            (3, u32::MAX, true),
            (u32::MAX, 3, false),
        ] {
            assert_eq!(reached(counter, n), expected, "{counter} {n}");
        }
    }
}
