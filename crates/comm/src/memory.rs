//! Memory of this process for buffers.

use tch::{Device, Kind, Tensor};

use crate::CommError;
use crate::check::check_range;

/// Memory on the host or a device. It stays until the process ends, as the mappings of `shm` do: tensors alias it and
/// nothing ties their lives to it, and a library may write it while an error is on its way up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    start: *mut u8,
    len_bytes: usize,
    device: Device,
}

impl Memory {
    /// # Errors
    /// The device has not that much left.
    pub fn zeros(len_bytes: usize, device: Device) -> Result<Self, CommError> {
        Ok(Self::leak(Tensor::f_zeros([len_bytes.max(1) as i64], (Kind::Uint8, device))?, len_bytes))
    }

    /// Of the host, with any contents. Pages that nobody writes take no memory.
    #[cfg(feature = "mpi")]
    pub fn untouched(len_bytes: usize) -> Result<Self, CommError> {
        Ok(Self::leak(Tensor::f_empty([len_bytes.max(1) as i64], (Kind::Uint8, Device::Cpu))?, len_bytes))
    }

    /// Of a library's allocator.
    ///
    /// # Safety
    /// `start` is the address of `len_bytes` on `device`, aligned for any element, that stay until the process ends.
    pub unsafe fn at(start: *mut u8, len_bytes: usize, device: Device) -> Self {
        Memory { start, len_bytes, device }
    }

    /// A tensor's memory, which libtorch aligns for any element.
    fn leak(tensor: Tensor, len_bytes: usize) -> Self {
        let (start, device) = (tensor.data_ptr().cast(), tensor.device());
        std::mem::forget(tensor);
        Memory { start, len_bytes, device }
    }

    /// A number that is this memory's alone.
    pub fn id(self) -> usize {
        self.start.addr()
    }

    pub fn len_bytes(self) -> usize {
        self.len_bytes
    }

    /// A typed alias of part of it.
    ///
    /// # Panics
    /// The part is not inside, or not aligned for `kind`.
    pub fn view(self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        let start = self.range(kind, offset_bytes, numel);
        // SAFETY: the range is inside of memory that stays until the process ends, aligned, and any bits are valid
        // numbers. Who may write when is the protocol's matter (see `shm/mod.rs`).
        unsafe { Tensor::from_blob(start, &[numel as i64], &[1], kind, self.device) }
    }

    /// Address of `numel` elements at `offset_bytes`, which are checked to be inside and aligned.
    pub fn range(self, kind: Kind, offset_bytes: usize, numel: usize) -> *mut u8 {
        check_range(self.len_bytes, kind, offset_bytes, numel);
        // SAFETY: inside of the memory, by the check.
        unsafe { self.start.add(offset_bytes) }
    }
}
