//! Anonymous shared memory: a `memfd` mapped by several processes. It has no name in any file system, so it goes with
//! its last user, however that ends.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::ControlError;

/// A shared mapping of a whole `memfd`, unmapped on drop. Starts as zeros, page-aligned. It holds no descriptor.
///
/// Its size is sealed at creation: no process can shrink it under another one, which would be a SIGBUS there.
#[derive(Debug)]
pub struct SharedMemory {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the mapping is plain memory at a fixed address for the life of the value; the methods give out only its
// address, and whoever reads or writes through the address answers for the ordering.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; no method changes anything through `&self`.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes and maps `len_bytes` (above 0) bytes. `name` shows in `/proc/<pid>/maps` only. The descriptor is what other
    /// processes map it by; the mapping does not need it.
    ///
    /// # Errors
    /// The system refuses the descriptor, the size or the mapping.
    pub fn create(name: &str, len_bytes: usize) -> Result<(Self, OwnedFd), ControlError> {
        assert!(len_bytes > 0, "shared memory of no bytes");
        let failed = |source: rustix::io::Errno| {
            ControlError::system(format!("cannot make {len_bytes} bytes of shared memory ({name})"), source)
        };
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
        rustix::fs::ftruncate(&fd, len_bytes as u64).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
        let memory = Self::map(&fd, len_bytes).map_err(failed)?;
        Ok((memory, fd))
    }

    /// Maps shared memory that [`SharedMemory::create`] made, in this process or another one.
    ///
    /// # Errors
    /// `fd` is not such memory (size not sealed, or not of `len_bytes` bytes), or it cannot be mapped.
    pub fn open(fd: OwnedFd, len_bytes: usize) -> Result<Self, ControlError> {
        let foreign = |reason: String| ControlError::Foreign { what: "shared memory".into(), reason };
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|e| foreign(format!("it has no seals ({e})")))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(foreign("its size is not sealed".into()));
        }
        let failed = |source: rustix::io::Errno| {
            ControlError::system(format!("cannot map {len_bytes} bytes of shared memory"), source)
        };
        let actual = rustix::fs::fstat(&fd).map_err(failed)?.st_size;
        if actual != len_bytes as i64 {
            return Err(foreign(format!("expected {len_bytes} bytes, got {actual}")));
        }
        Self::map(&fd, len_bytes).map_err(failed)
    }

    /// Maps shared memory of another process of this user on this host: its descriptor `fd` there.
    ///
    /// # Errors
    /// That process is gone or of another user, or as [`SharedMemory::open`].
    pub fn open_of_process(pid: u32, fd: i32, len_bytes: usize) -> Result<Self, ControlError> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| ControlError::system(format!("cannot open the shared memory {path}"), source))?;
        Self::open(file.into(), len_bytes)
    }

    fn map(fd: &OwnedFd, len_bytes: usize) -> rustix::io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing; `fd` is at least this long and
        // sealed against shrinking.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len_bytes, protection, MapFlags::SHARED, fd, 0) }?;
        // A hint: a kernel without huge pages for shared memory refuses it, and nothing is lost.
        // SAFETY: the range is the mapping made above; this advice does not change its contents.
        let _ = unsafe { rustix::mm::madvise(start, len_bytes, Advice::LinuxHugepage) };
        let start = NonNull::new(start.cast()).expect("mmap never returns null for a chosen address");
        Ok(SharedMemory { start, len_bytes })
    }

    /// First byte of the mapping. Other processes may write to it at any time.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the range is exactly the mapping made in `map`; the owner of the value has given up its addresses.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast::<c_void>(), self.len_bytes) };
    }
}
