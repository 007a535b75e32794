//! `libnccl.so.2`, loaded when the first group is made, so that one binary runs with and without it.
//!
//! The types and signatures are cudarc's, compared with ours by the compiler below. Its loader is not used: it knows the
//! library only by names that NCCL's packages do not ship (`libnccl.so`, never `libnccl.so.2`), offers no way to hand it
//! a library that is open already, and panics where there is none. Its safe layer panics in `Drop`.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;

use cudarc::nccl::sys;
use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};

use crate::CommError;

pub(super) use sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

/// What every NCCL package calls the library.
pub(super) const NAME: &str = "libnccl.so.2";
/// `ncclCommSplit` came with it.
const OLDEST: &str = "2.18";
/// From this version on, buffers are registered.
const FIRST_WITH_REGISTRATION: c_int = 21900;

/// An `ncclResult_t`, as a number: a newer library may return one that the enum lacks.
pub(super) type Status = c_uint;

pub(super) const SUCCESS: Status = sys::ncclResult_t::ncclSuccess as Status;
pub(super) const IN_PROGRESS: Status = sys::ncclResult_t::ncclInProgress as Status;
/// A peer's process ended, or the network between.
pub(super) const REMOTE_ERROR: Status = sys::ncclResult_t::ncclRemoteError as Status;

/// Declares the functions that are loaded. Each is compared with cudarc's declaration of it.
macro_rules! functions {
    (required { $($name:ident($($arg:ty),*);)* } optional { $($opt:ident($($opt_arg:ty),*);)* }) => {
        /// NCCL's functions under their own names.
        #[derive(Debug)]
        #[expect(non_snake_case, reason = "NCCL's names")]
        pub(super) struct Functions {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> Status,)*
            $(pub $opt: Option<unsafe extern "C" fn($($opt_arg),*) -> Status>,)*
            ncclGetErrorString: unsafe extern "C" fn(Status) -> *const c_char,
            ncclGetLastError: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
        }

        /// Names of all functions that are loaded.
        const NAMES: &[&str] =
            &[$(stringify!($name),)* $(stringify!($opt),)* "ncclGetErrorString", "ncclGetLastError"];

        $(const _: unsafe fn($($arg),*) -> sys::ncclResult_t = sys::$name;)*
        $(const _: unsafe fn($($opt_arg),*) -> sys::ncclResult_t = sys::$opt;)*

        impl Functions {
            /// The name of the first one that is missing.
            fn load(handle: &Handle) -> Result<Self, &'static str> {
                // SAFETY: the types are those of NCCL's header, by way of cudarc; an `ncclResult_t` is passed as an int.
                unsafe {
                    Ok(Functions {
                        $($name: symbol(handle, stringify!($name))?,)*
                        $($opt: symbol(handle, stringify!($opt)).ok(),)*
                        ncclGetErrorString: symbol(handle, "ncclGetErrorString")?,
                        ncclGetLastError: symbol(handle, "ncclGetLastError")?,
                    })
                }
            }
        }
    };
}

functions! {
    required {
        ncclGetVersion(*mut c_int);
        ncclGetUniqueId(*mut ncclUniqueId);
        ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut sys::ncclConfig_t);
        ncclCommSplit(ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut sys::ncclConfig_t);
        ncclCommFinalize(ncclComm_t);
        ncclCommDestroy(ncclComm_t);
        ncclCommAbort(ncclComm_t);
        ncclCommGetAsyncError(ncclComm_t, *mut sys::ncclResult_t);
        ncclGroupStart();
        ncclGroupEnd();
        ncclAllGather(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t);
        ncclReduceScatter(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
        ncclAllReduce(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
        ncclBroadcast(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t);
    }
    optional {
        ncclMemAlloc(*mut *mut c_void, usize);
        ncclCommRegister(ncclComm_t, *mut c_void, usize, *mut *mut c_void);
    }
}

/// # Safety
/// `F` is the type of the function of that name.
unsafe fn symbol<F: Copy>(handle: &Handle, name: &'static str) -> Result<F, &'static str> {
    // SAFETY: the caller's promise; the library is never closed (see `Library::open`).
    unsafe { handle.get::<F>(name).map(|symbol| *symbol).map_err(|_| name) }
}

/// The library, open until the process ends: its threads may run to the end.
#[derive(Debug)]
pub(super) struct Library {
    pub functions: Functions,
    /// As NCCL codes it: 2.28.9 is 22809.
    version: c_int,
}

impl Library {
    /// Opens the library at a path, or of a name that the loader finds. What libtorch has loaded already is found too.
    ///
    /// # Errors
    /// [`CommError::Unavailable`]
    pub fn open(path: &Path) -> Result<&'static Library, CommError> {
        let handle = open(path)?;
        let functions = Functions::load(&handle).map_err(|name| {
            let what = format!("{} has no {name}; NCCL {OLDEST} or newer is needed", path.display());
            unavailable(what)
        })?;
        let mut version = 0;
        // SAFETY: `version` is a place for one int.
        let status = unsafe { (functions.ncclGetVersion)(&mut version) };
        std::mem::forget(handle);
        let library = Box::leak(Box::new(Library { functions, version }));
        if status != SUCCESS {
            return Err(unavailable(format!("{}: {}", path.display(), library.text(status, None))));
        }
        Ok(library)
    }

    /// `ncclMemAlloc` and `ncclCommRegister`, where this version has them.
    #[expect(clippy::type_complexity, reason = "two functions of the table above")]
    pub fn registration(
        &self,
    ) -> Option<(
        unsafe extern "C" fn(*mut *mut c_void, usize) -> Status,
        unsafe extern "C" fn(ncclComm_t, *mut c_void, usize, *mut *mut c_void) -> Status,
    )> {
        let is_new = self.version >= FIRST_WITH_REGISTRATION;
        self.functions.ncclMemAlloc.zip(self.functions.ncclCommRegister).filter(|_| is_new)
    }

    /// NCCL's own text for a status: what it is, and what it says of its last error.
    pub fn text(&self, status: Status, comm: Option<ncclComm_t>) -> String {
        // SAFETY: both give a text that NCCL keeps, or null; the communicator is alive.
        let (what, last) = unsafe {
            let last = (self.functions.ncclGetLastError)(comm.unwrap_or(std::ptr::null_mut()));
            (text((self.functions.ncclGetErrorString)(status)), text(last))
        };
        if last.is_empty() { what } else { format!("{what} ({last})") }
    }
}

/// One line of a C text.
///
/// # Safety
/// It is null or ends with a zero.
unsafe fn text(chars: *const c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(chars) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn open(path: &Path) -> Result<Handle, CommError> {
    // SAFETY: NCCL's initialisers have no preconditions.
    unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| {
        let why = match std::error::Error::source(&error) {
            Some(source) => source.to_string(),
            None => error.to_string(),
        };
        let name = path.display();
        unavailable(format!("{name} was not found ({why}); install NCCL, or add its folder to LD_LIBRARY_PATH"))
    })
}

pub(super) fn unavailable(missing: String) -> CommError {
    CommError::Unavailable { backend: "nccl", missing }
}

/// How communicators are made: no call of ours blocks, and NCCL's logs name the group.
pub(super) fn config(name: &str) -> sys::ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    // Kept: NCCL may keep the pointer. Groups are few.
    let name = CString::new(name).unwrap_or_default().into_raw();
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22800,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: name,
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// What [`Library::open`] finds missing in the library at `path`, the functions that it can do without included. For
/// tests.
#[doc(hidden)]
pub fn missing_symbols(path: &Path) -> Result<Vec<&'static str>, CommError> {
    let handle = open(path)?;
    // SAFETY: the address is not used.
    let has = |name: &'static &str| unsafe { symbol::<*const c_void>(&handle, name) }.is_ok();
    let missing = NAMES.iter().filter(|name| !has(name)).copied().collect();
    std::mem::forget(handle);
    Ok(missing)
}
