//! A test double of `libnccl`, not NCCL: it exports NCCL's functions, and moves data between processes of one host through
//! a shared file, on host pointers. It is built with the tests only (as an example of type cdylib), and the product never
//! loads it. It carries the marker symbol `nccl_double_is_not_nccl`.
//!
//! What it keeps of the real one: communicators are non-blocking, so calls may return `ncclInProgress` and end in a thread
//! of the communicator (`worker.rs`); calls between group start and end are made together; ranks that call different
//! things hang; memory is registered with one communicator. What it has not: streams. A stream handle is only a number in
//! its log, and data have moved when the communicator says `ncclSuccess`.
//!
//! - `lib.rs`: the exported functions. `worker.rs`: what a communicator does. `shared.rs`: the file. `numbers.rs`: sums.
//!
//! Environment: `NCCL_DOUBLE_DIR` is the folder of the files and of `log-RANK.jsonl`, one line for each call.
//! `NCCL_DOUBLE_VERSION` is what `ncclGetVersion` says. `NCCL_DOUBLE_FAULT` goes wrong on purpose, by rank of the run:
//! `never_join RANK N` (its N-th collective never joins its peers'), `async_error RANK N STATUS` (its N-th collective ends
//! with a status), `stuck RANK N` (its N-th call of a collective does not come back), `slow_init MILLISECONDS`,
//! `slow_finalize MILLISECONDS`.

mod numbers;
mod shared;
mod worker;

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use numbers::DataType;
use worker::{Collective, Communicator, Op, Task};

/// Tells whoever looks that this is the double.
#[unsafe(no_mangle)]
static nccl_double_is_not_nccl: c_int = 1;

type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_ARGUMENT: Status = 4;
const INVALID_USAGE: Status = 5;
const IN_PROGRESS: Status = 7;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    internal: [c_char; 128],
}

/// The start of an `ncclConfig_t`, as far as the double reads it.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    numbers: [c_int; 3],
    net_name: *const c_char,
    more_numbers: [c_int; 2],
    comm_name: *const c_char,
}

/// Calls between group start and end, with how deep the thread is in groups and the group's number.
#[derive(Default)]
struct Group {
    depth: u32,
    number: u64,
    calls: Vec<(*mut Communicator, Collective)>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}
static NUM_GROUPS: AtomicU64 = AtomicU64::new(0);
static NUM_CALLS: AtomicU64 = AtomicU64::new(0);
static NUM_IDS: AtomicU64 = AtomicU64::new(0);
static LOG: Mutex<()> = Mutex::new(());

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// Rank of the run.
fn run_rank() -> String {
    variable("RANK")
}

fn log(line: &str) {
    let _guard = LOG.lock();
    let path = format!("{}/log-{}.jsonl", variable("NCCL_DOUBLE_DIR"), run_rank());
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).expect("the log can be opened");
    file.write_all(format!("{line}\n").as_bytes()).expect("the log can be written");
}

/// The words after the fault's name, if this is the one that was asked for.
fn fault(name: &str) -> Option<Vec<u64>> {
    let text = variable("NCCL_DOUBLE_FAULT");
    let (what, numbers) = text.split_once(' ')?;
    (what == name).then(|| numbers.split(' ').map(|n| n.parse().expect("numbers")).collect())
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: *mut c_int) -> Status {
    // SAFETY: NCCL's contract: a place for one int.
    unsafe { *version = variable("NCCL_DOUBLE_VERSION").parse().unwrap_or(22809) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> Status {
    let key = format!("{}-{}", std::process::id(), NUM_IDS.fetch_add(1, Ordering::Relaxed));
    let mut internal = [0; 128];
    internal.iter_mut().zip(key.bytes()).for_each(|(to, from)| *to = from as c_char);
    // SAFETY: NCCL's contract: a place for one id.
    unsafe { *id = UniqueId { internal } };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut Communicator,
    world_size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> Status {
    // SAFETY: NCCL's contract: the configuration starts so, and its name is null or a C text.
    let (magic, blocking, name) = unsafe {
        let config = &*config;
        let name = if config.comm_name.is_null() { c"" } else { CStr::from_ptr(config.comm_name) };
        (config.magic, config.blocking, name.to_string_lossy())
    };
    log(&format!(r#"{{"call":"ncclCommInitRankConfig","ranks":{world_size},"blocking":{blocking},"name":"{name}"}}"#));
    if magic != 0xcafe_beef || blocking != 0 {
        return INVALID_ARGUMENT;
    }
    let key: String = id.internal.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect();
    let made = Communicator::new(&key, rank as usize, world_size as usize);
    made.push(Task::Join);
    // SAFETY: NCCL's contract: a place for one handle.
    unsafe { *comm = Box::into_raw(Box::new(made)) };
    IN_PROGRESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommSplit(
    comm: *mut Communicator,
    color: c_int,
    key: c_int,
    part: *mut *mut Communicator,
    config: *mut Config,
) -> Status {
    // SAFETY: NCCL's contract: the handle is alive, the configuration starts so.
    let (comm, magic) = unsafe { (&*comm, (*config).magic) };
    log(&format!(r#"{{"call":"ncclCommSplit","comm":"{}","color":{color},"key":{key}}}"#, comm.key()));
    if magic != 0xcafe_beef || color < 0 {
        return INVALID_ARGUMENT;
    }
    comm.push(Task::Split { color: color as u64, key: key as u64, place: worker::Place(part) });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(comm: *mut Communicator) -> Status {
    // SAFETY: NCCL's contract: the handle is alive.
    let comm = unsafe { &*comm };
    log(&format!(r#"{{"call":"ncclCommFinalize","comm":"{}"}}"#, comm.key()));
    comm.push(Task::Finalize);
    IN_PROGRESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(comm: *mut Communicator) -> Status {
    // SAFETY: NCCL's contract: the handle is alive, and this is its last use.
    let comm = unsafe { Box::from_raw(comm) };
    log(&format!(r#"{{"call":"ncclCommDestroy","comm":"{}"}}"#, comm.key()));
    if comm.status() != SUCCESS {
        return INVALID_USAGE;
    }
    comm.end();
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(comm: *mut Communicator) -> Status {
    // SAFETY: NCCL's contract: the handle is alive, and this is its last use.
    let comm = unsafe { Box::from_raw(comm) };
    log(&format!(r#"{{"call":"ncclCommAbort","comm":"{}"}}"#, comm.key()));
    comm.end();
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(comm: *mut Communicator, status: *mut Status) -> Status {
    // SAFETY: NCCL's contract: the handle is alive, and there is a place for one status.
    unsafe { *status = (*comm).status() };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(status: Status) -> *const c_char {
    let text = match status {
        SUCCESS => c"no error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unhandled error of the double",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_: *mut Communicator) -> *const c_char {
    c"the double\nwas told to fail".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> Status {
    GROUP.with_borrow_mut(|group| {
        group.depth += 1;
        if group.depth == 1 {
            group.number = NUM_GROUPS.fetch_add(1, Ordering::Relaxed) + 1;
        }
    });
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> Status {
    let calls = GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            return None;
        }
        group.depth -= 1;
        Some(if group.depth == 0 { std::mem::take(&mut group.calls) } else { Vec::new() })
    });
    let Some(calls) = calls else { return INVALID_USAGE };
    let is_empty = calls.is_empty();
    for (comm, collective) in calls {
        // SAFETY: NCCL's contract: the handle is alive.
        unsafe { &*comm }.push(Task::Collective(collective));
    }
    if is_empty { SUCCESS } else { IN_PROGRESS }
}

/// Logs a collective and makes it, or leaves it to the end of the group.
fn make(
    comm: *mut Communicator,
    name: &str,
    op: Op,
    data_type: c_int,
    (send, recv): (*const c_void, *mut c_void),
    (count, send_numel, recv_numel): (usize, usize, usize),
    stream: *mut c_void,
) -> Status {
    let Some(data_type) = DataType::from_code(data_type) else { return INVALID_ARGUMENT };
    // SAFETY: NCCL's contract: the handle is alive.
    let communicator = unsafe { &*comm };
    let (send, recv) = (send as usize, recv as usize);
    let (send_bytes, recv_bytes) = (send_numel * data_type.bytes(), recv_numel * data_type.bytes());
    let is_registered = communicator.is_registered(send, send_bytes) && communicator.is_registered(recv, recv_bytes);
    let group = GROUP.with_borrow(|group| if group.depth > 0 { group.number.to_string() } else { "null".into() });
    // Where the own part of the whole is, in place.
    let (whole, own, own_bytes) =
        if recv_bytes >= send_bytes { (recv, send, send_bytes) } else { (send, recv, recv_bytes) };
    let is_in_place = own == whole + if send_bytes == recv_bytes { 0 } else { communicator.rank() * own_bytes };
    log(&format!(
        r#"{{"call":"{name}","count":{count},"dtype":"{data_type:?}","op":"{op:?}","comm":"{}","stream":{},"group":{group},"registered":{is_registered},"in_place":{is_in_place}}}"#,
        communicator.key(),
        stream as usize,
    ));
    let number = NUM_CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    if fault("stuck").is_some_and(|at| at[0].to_string() == run_rank() && at[1] == number) {
        loop {
            std::thread::park();
        }
    }
    let collective = Collective { op, data_type, count, send, recv, send_bytes };
    GROUP.with_borrow_mut(|group| match group.depth {
        0 => communicator.push(Task::Collective(collective)),
        _ => group.calls.push((comm, collective)),
    });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllGather(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: c_int,
    comm: *mut Communicator,
    stream: *mut c_void,
) -> Status {
    // SAFETY: NCCL's contract: the handle is alive.
    let total = count * unsafe { &*comm }.world_size();
    make(comm, "ncclAllGather", Op::AllGather, data_type, (send, recv), (count, count, total), stream)
}

#[unsafe(no_mangle)]
extern "C" fn ncclReduceScatter(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: c_int,
    op: c_int,
    comm: *mut Communicator,
    stream: *mut c_void,
) -> Status {
    if op != 0 {
        return INVALID_ARGUMENT;
    }
    // SAFETY: NCCL's contract: the handle is alive.
    let total = count * unsafe { &*comm }.world_size();
    make(comm, "ncclReduceScatter", Op::ReduceScatter, data_type, (send, recv), (count, total, count), stream)
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: c_int,
    op: c_int,
    comm: *mut Communicator,
    stream: *mut c_void,
) -> Status {
    let op = match op {
        0 => Op::Sum,
        2 => Op::Max,
        _ => return INVALID_ARGUMENT,
    };
    make(comm, "ncclAllReduce", op, data_type, (send, recv), (count, count, count), stream)
}

#[unsafe(no_mangle)]
extern "C" fn ncclBroadcast(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: c_int,
    root: c_int,
    comm: *mut Communicator,
    stream: *mut c_void,
) -> Status {
    let op = Op::Broadcast { root: root as usize };
    make(comm, "ncclBroadcast", op, data_type, (send, recv), (count, count, count), stream)
}

#[unsafe(no_mangle)]
extern "C" fn ncclMemAlloc(start: *mut *mut c_void, size: usize) -> Status {
    let layout = std::alloc::Layout::from_size_align(size.max(1), 4096).expect("a size that can be");
    log(&format!(r#"{{"call":"ncclMemAlloc","bytes":{size}}}"#));
    // SAFETY: the size is not 0; NCCL's contract: a place for one pointer. Garbage, so that nobody relies on zeros.
    unsafe {
        let memory = std::alloc::alloc(layout);
        memory.write_bytes(0xa5, size);
        *start = memory.cast();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommRegister(
    comm: *mut Communicator,
    start: *mut c_void,
    size: usize,
    handle: *mut *mut c_void,
) -> Status {
    // SAFETY: NCCL's contract: the handle is alive, and there is a place for one pointer.
    let comm = unsafe {
        *handle = start;
        &*comm
    };
    log(&format!(r#"{{"call":"ncclCommRegister","comm":"{}","bytes":{size}}}"#, comm.key()));
    comm.register(start as usize, size);
    SUCCESS
}
