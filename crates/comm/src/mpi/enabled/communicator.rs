//! MPI's communicators, data types and requests, and its nonblocking collectives on addresses.
//!
//! rsmpi's raw bindings, not its own layer: that one gives no errors back, knows no `MPI_IN_PLACE`, and ties requests to
//! borrows, while a buffer here is written and read in turns.
//!
//! **Counts** of MPI are 32 bits wide. A range of a buffer is therefore *one* element, of a data type of its size.

use std::ffi::{c_int, c_void};

use mpi::ffi::*;

use super::process::{Failed, check};

/// Bytes of the blocks that a range of more than [`i32::MAX`] bytes is made of.
const BLOCK_BYTES: usize = 1 << 30;

unsafe extern "C" {
    /// `in_place.c`: MPI's constant is a macro, with another value in each MPI library.
    fn fsdp_mpi_in_place() -> *const c_void;
}

/// Processes that talk to each other, apart from the messages of other communicators. It lasts until MPI ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Communicator {
    raw: MPI_Comm,
    rank: usize,
    size: usize,
}

/// For each rank how many elements, and where they start, counted in elements.
#[derive(Debug)]
pub(super) struct Pieces {
    pub counts: Vec<c_int>,
    pub starts: Vec<c_int>,
}

/// An operation that was started. What it reads and writes must stay until it is done.
#[derive(Debug)]
pub(super) struct Request {
    raw: MPI_Request,
    /// What MPI may use until then.
    kept: Kept,
}

/// The arguments of a call that are more than numbers.
#[derive(Debug, Default)]
struct Kept {
    _ty: Option<Type>,
    _pieces: Vec<Pieces>,
}

impl Communicator {
    /// All processes of the job, once MPI has been started.
    pub fn world() -> Result<Self, Failed> {
        // SAFETY: the constant is set by the library; MPI runs, as the caller says.
        Self::of(unsafe { RSMPI_COMM_WORLD })
    }

    fn of(raw: MPI_Comm) -> Result<Self, Failed> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a communicator that MPI gave; the results are written to live variables. Errors are to be returned
        // from here on, where MPI's default is to end the job.
        unsafe {
            check("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(raw, RSMPI_ERRORS_RETURN))?;
            check("MPI_Comm_rank", MPI_Comm_rank(raw, &mut rank))?;
            check("MPI_Comm_size", MPI_Comm_size(raw, &mut size))?;
        }
        Ok(Communicator { raw, rank: rank as usize, size: size as usize })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// The communicator of those that give the same color, in order of their keys. Waits for all, without a limit.
    pub fn split(&self, color: usize, key: usize) -> Result<Self, Failed> {
        let mut raw = self.raw;
        // SAFETY: a live communicator, and a live variable for the new one.
        let code = unsafe { MPI_Comm_split(self.raw, color as c_int, key as c_int, &mut raw) };
        check("MPI_Comm_split", code)?;
        Self::of(raw)
    }

    /// Starts to make another communicator of the same ranks; [`Duplicate::finish`] gives it when the request is done.
    pub fn start_duplicate(&self) -> Result<(Request, Duplicate), Failed> {
        let duplicate = Duplicate(Box::leak(Box::new(self.raw)));
        let request = Request::start("MPI_Comm_idup", Kept::default(), |request| {
            // SAFETY: a live communicator; the new one goes to where it stays for ever.
            unsafe { MPI_Comm_idup(self.raw, duplicate.0, request) }
        })?;
        Ok((request, duplicate))
    }

    pub fn start_barrier(&self) -> Result<Request, Failed> {
        Request::start("MPI_Ibarrier", Kept::default(), |request| {
            // SAFETY: a live communicator.
            unsafe { MPI_Ibarrier(self.raw, request) }
        })
    }

    /// Starts to gather ranges that lie behind one another from `start`, each rank's own in its place.
    ///
    /// # Safety
    /// `size` ranges of memory, which nobody else writes, nor the own one reads, until the request is done.
    pub unsafe fn start_all_gather_in_place(&self, start: *mut u8, range_bytes: usize) -> Result<Request, Failed> {
        let (kept, range) = Kept::of(Type::of_bytes(range_bytes)?, Vec::new());
        Request::start("MPI_Iallgather", kept, |request| {
            // SAFETY: the caller's promise; the request keeps the type.
            unsafe { MPI_Iallgather(fsdp_mpi_in_place(), 0, range, start.cast(), 1, range, self.raw, request) }
        })
    }

    /// Starts to gather ranges of `range_bytes` bytes: this rank's from `from`, all of them to `to`.
    ///
    /// # Safety
    /// `from` is one range, `to` are `size` ranges of other memory; both are left alone until the request is done.
    pub unsafe fn start_all_gather(&self, from: *const u8, to: *mut u8, range_bytes: usize) -> Result<Request, Failed> {
        let (kept, range) = Kept::of(Type::of_bytes(range_bytes)?, Vec::new());
        Request::start("MPI_Iallgather", kept, |request| {
            // SAFETY: the caller's promise; the request keeps the type.
            unsafe { MPI_Iallgather(from.cast(), 1, range, to.cast(), 1, range, self.raw, request) }
        })
    }

    /// Starts to gather pieces of unequal lengths, each rank's own in its place.
    ///
    /// # Safety
    /// As for [`Communicator::start_all_gather_in_place`].
    pub unsafe fn start_all_gather_pieces(
        &self,
        start: *mut u8,
        pieces: Pieces,
        element_bytes: usize,
    ) -> Result<Request, Failed> {
        let (counts, starts) = (pieces.counts.as_ptr(), pieces.starts.as_ptr());
        let (kept, element) = Kept::of(Type::of_bytes(element_bytes)?, vec![pieces]);
        Request::start("MPI_Iallgatherv", kept, |request| {
            // SAFETY: the caller's promise; the request keeps the pieces and the type.
            unsafe {
                let own = fsdp_mpi_in_place();
                MPI_Iallgatherv(own, 0, element, start.cast(), counts, starts, element, self.raw, request)
            }
        })
    }

    /// Starts to send each rank its piece of `from`, and to receive a piece from each.
    ///
    /// # Safety
    /// The pieces are inside of `from` and `to`, which do not overlap and are left alone until the request is done.
    pub unsafe fn start_exchange(
        &self,
        from: *const u8,
        sent: Pieces,
        to: *mut u8,
        received: Pieces,
        element_bytes: usize,
    ) -> Result<Request, Failed> {
        let (counts, starts) = (sent.counts.as_ptr(), sent.starts.as_ptr());
        let (to_counts, to_starts) = (received.counts.as_ptr(), received.starts.as_ptr());
        let (kept, element) = Kept::of(Type::of_bytes(element_bytes)?, vec![sent, received]);
        Request::start("MPI_Ialltoallv", kept, |request| {
            let (from, to) = (from.cast(), to.cast());
            // SAFETY: the caller's promise; the request keeps the pieces and the type.
            unsafe {
                MPI_Ialltoallv(from, counts, starts, element, to, to_counts, to_starts, element, self.raw, request)
            }
        })
    }

    /// Starts to send each rank its range of `from`, and to receive this rank's range of each other one, in order of
    /// rank. The own range stays where it is: `to` keeps what it holds there.
    ///
    /// # Safety
    /// As for [`Communicator::start_exchange`], with `size` ranges in both.
    pub unsafe fn start_exchange_ranges(
        &self,
        from: *const u8,
        to: *mut u8,
        range_bytes: usize,
    ) -> Result<Request, Failed> {
        let pieces = || Pieces {
            counts: (0..self.size).map(|rank| c_int::from(rank != self.rank)).collect(),
            starts: (0..self.size as c_int).collect(),
        };
        // SAFETY: the caller's promise.
        unsafe { self.start_exchange(from, pieces(), to, pieces(), range_bytes) }
    }

    /// Starts to copy `num_bytes` bytes of rank `root` to all.
    ///
    /// # Safety
    /// The memory is left alone until the request is done.
    pub unsafe fn start_broadcast(&self, start: *mut u8, num_bytes: usize, root: usize) -> Result<Request, Failed> {
        let (kept, all) = Kept::of(Type::of_bytes(num_bytes)?, Vec::new());
        Request::start("MPI_Ibcast", kept, |request| {
            // SAFETY: the caller's promise; the request keeps the type.
            unsafe { MPI_Ibcast(start.cast(), 1, all, root as c_int, self.raw, request) }
        })
    }

    /// Starts to send a message to one rank.
    pub fn start_send(&self, message: &'static [u64], to: usize) -> Result<Request, Failed> {
        Request::start("MPI_Isend", Kept::default(), |request| {
            let count = message.len() as c_int;
            // SAFETY: the message stays for ever.
            unsafe { MPI_Isend(message.as_ptr().cast(), count, RSMPI_UINT64_T, to as c_int, 0, self.raw, request) }
        })
    }

    /// The rank whose message has come, if one has. MPI lets all that was started go on in this call.
    pub fn probe(&self) -> Result<Option<usize>, Failed> {
        let mut flag = 0;
        let mut status = std::mem::MaybeUninit::<MPI_Status>::uninit();
        // SAFETY: a live communicator; the status is written where a message has come.
        unsafe {
            let code = MPI_Iprobe(RSMPI_ANY_SOURCE, 0, self.raw, &mut flag, status.as_mut_ptr());
            check("MPI_Iprobe", code)?;
            Ok((flag != 0).then(|| status.assume_init().MPI_SOURCE as usize))
        }
    }

    /// The message of a rank, which has come.
    pub fn receive<const N: usize>(&self, from: usize) -> Result<[u64; N], Failed> {
        let mut message = [0u64; N];
        let start = message.as_mut_ptr().cast();
        // SAFETY: live memory of that many numbers; a longer message is an error.
        let code =
            unsafe { MPI_Recv(start, N as c_int, RSMPI_UINT64_T, from as c_int, 0, self.raw, RSMPI_STATUS_IGNORE) };
        check("MPI_Recv", code)?;
        Ok(message)
    }
}

/// A communicator in the making.
#[derive(Debug)]
pub(super) struct Duplicate(*mut MPI_Comm);

impl Duplicate {
    /// The communicator, whose request is done.
    pub fn finish(self) -> Result<Communicator, Failed> {
        // SAFETY: memory that was leaked for this; MPI has written it, as the request is done.
        Communicator::of(unsafe { *self.0 })
    }
}

impl Request {
    fn start(name: &'static str, kept: Kept, start: impl FnOnce(&mut MPI_Request) -> c_int) -> Result<Self, Failed> {
        // SAFETY: a constant that the library sets.
        let mut raw = unsafe { RSMPI_REQUEST_NULL };
        check(name, start(&mut raw))?;
        Ok(Request { raw, kept })
    }

    /// Looks whether it is done, and lets all that was started go on.
    pub fn is_done(&mut self) -> Result<bool, Failed> {
        let mut flag = 0;
        // SAFETY: a request that MPI gave, or its null request, which counts as done.
        let code = unsafe { MPI_Test(&mut self.raw, &mut flag, RSMPI_STATUS_IGNORE) };
        check("MPI_Test", code)?;
        if flag != 0 {
            self.kept = Kept::default();
        }
        Ok(flag != 0)
    }
}

impl Drop for Request {
    /// What MPI may still read stays: after an error a request is dropped before it is done.
    fn drop(&mut self) {
        std::mem::forget(std::mem::take(&mut self.kept));
    }
}

impl Kept {
    /// And the type for the call.
    fn of(ty: Type, pieces: Vec<Pieces>) -> (Self, MPI_Datatype) {
        let raw = ty.0;
        (Kept { _ty: Some(ty), _pieces: pieces }, raw)
    }
}

/// A data type of some bytes.
#[derive(Debug)]
struct Type(MPI_Datatype);

impl Type {
    fn of_bytes(num_bytes: usize) -> Result<Self, Failed> {
        let ty = match c_int::try_from(num_bytes) {
            // SAFETY: a constant that the library sets.
            Ok(count) => Self::repeat(count, unsafe { RSMPI_UINT8_T })?,
            Err(_) => {
                // SAFETY: as above.
                let byte = unsafe { RSMPI_UINT8_T };
                let block = Self::repeat(BLOCK_BYTES as c_int, byte)?;
                let rest = Self::repeat((num_bytes % BLOCK_BYTES) as c_int, byte)?;
                let num_blocks = num_bytes / BLOCK_BYTES;
                let lengths = [num_blocks as c_int, 1];
                let offsets = [0, (num_blocks * BLOCK_BYTES) as MPI_Aint];
                let types = [block.0, rest.0];
                let mut whole = byte;
                // SAFETY: two entries in each array, as the first argument says.
                let code = unsafe {
                    MPI_Type_create_struct(2, lengths.as_ptr(), offsets.as_ptr(), types.as_ptr(), &mut whole)
                };
                check("MPI_Type_create_struct", code)?;
                Type(whole)
            }
        };
        let mut raw = ty.0;
        // SAFETY: a type that was made above.
        check("MPI_Type_commit", unsafe { MPI_Type_commit(&mut raw) })?;
        Ok(ty)
    }

    fn repeat(count: c_int, of: MPI_Datatype) -> Result<Self, Failed> {
        let mut raw = of;
        // SAFETY: a live type, and a live variable for the new one.
        check("MPI_Type_contiguous", unsafe { MPI_Type_contiguous(count, of, &mut raw) })?;
        Ok(Type(raw))
    }
}

impl Drop for Type {
    fn drop(&mut self) {
        // SAFETY: a type that was made here. It can only fail for a handle that is none.
        unsafe { MPI_Type_free(&mut self.0) };
    }
}
