//! The file that the ranks of one communicator map: what each has called, and the data that it sends.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// What one rank can send in one collective. The file is sparse.
const AREA_BYTES: usize = 32 << 20;
const HEADER_BYTES: usize = 4096;

/// One rank's side. All zero at first.
#[repr(C, align(128))]
pub struct Cell {
    pub has_joined: AtomicU64,
    /// Number of the last collective whose data are in the area, and of the last one that was read.
    pub written: AtomicU64,
    pub read: AtomicU64,
    /// What collective `written` is; see `worker.rs`.
    pub call: [AtomicU64; 3],
}

#[derive(Clone, Copy)]
pub struct Shared {
    start: *mut u8,
    world_size: usize,
}

// SAFETY: cells are atomics, and areas are handed over by them.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the file of a communicator; whoever comes first makes it. It stays mapped.
    pub fn open(key: &str, world_size: usize) -> Self {
        assert!(world_size * size_of::<Cell>() <= HEADER_BYTES);
        let path = format!("{}/comm-{key}", crate::variable("NCCL_DOUBLE_DIR"));
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let len_bytes = HEADER_BYTES + world_size * AREA_BYTES;
        file.set_len(len_bytes as u64).unwrap();
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len_bytes, flags, MapFlags::SHARED, file.as_fd(), 0) };
        Shared { start: start.unwrap().cast(), world_size }
    }

    pub fn cells(&self) -> &[Cell] {
        // SAFETY: inside of the mapping, aligned to its page; atomics, for which any bits are valid.
        unsafe { std::slice::from_raw_parts(self.start.cast::<Cell>(), self.world_size) }
    }

    /// Address of a rank's area.
    pub fn area(&self, rank: usize, len_bytes: usize) -> *mut u8 {
        assert!(rank < self.world_size && len_bytes <= AREA_BYTES, "{len_bytes} bytes of rank {rank}");
        // SAFETY: inside of the mapping.
        unsafe { self.start.add(HEADER_BYTES + rank * AREA_BYTES) }
    }
}

pub fn all_reached(cells: &[Cell], counter: fn(&Cell) -> &AtomicU64, n: u64) -> bool {
    cells.iter().all(|cell| counter(cell).load(Ordering::Acquire) >= n)
}
