//! Memory of the buffers.

use std::ffi::c_void;

use tch::Kind;

use super::NcclGroup;
use super::library::SUCCESS;
use crate::memory::Memory;
use crate::{Call, CommError};

impl NcclGroup {
    /// Allocates `len_bytes` of zeros: by NCCL and registered with the communicator, where its version can do that, so that
    /// collectives work on it without copies of their own; else by libtorch.
    pub(super) fn allocate(&mut self, call: &Call, len_bytes: usize) -> Result<Memory, CommError> {
        self.communicator.check()?;
        let Some((mem_alloc, register)) = self.communicator.library.registration() else {
            return Memory::zeros(len_bytes, self.device);
        };
        let size_bytes = len_bytes.max(1);
        let mut start: *mut c_void = std::ptr::null_mut();
        let status = {
            let _on_device = self.lane.enter()?;
            // SAFETY: `start` is a place for one pointer; the device is current.
            unsafe { mem_alloc(&mut start, size_bytes) }
        };
        if status != SUCCESS {
            let message = format!("ncclMemAlloc: {}", self.communicator.library.text(status, None));
            let rank = self.communicator.rank;
            return Err(CommError::Nccl { rank, message, is_remote: false, call: Some(call.clone()) });
        }
        // The registration ends with the communicator.
        let mut registration = std::ptr::null_mut();
        self.communicator.make("ncclCommRegister", call, |_, raw| {
            // SAFETY: the communicator is alive, the memory was just allocated with that size, and the handle's place
            // outlives the call.
            unsafe { register(raw, start, size_bytes, &mut registration) }
        })?;
        self.communicator.forget_last();
        self.num_registered_bytes += size_bytes as u64;
        // SAFETY: just allocated with that size, by pages, and never freed.
        let memory = unsafe { Memory::at(start.cast(), len_bytes, self.device) };
        let _zeros = memory.view(Kind::Uint8, 0, len_bytes).f_zero_()?;
        Ok(memory)
    }
}
