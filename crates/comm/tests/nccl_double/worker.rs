//! A communicator, and the thread in which its calls end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::numbers::{DataType, combine};
use crate::shared::{Cell, Shared, all_reached};
use crate::{IN_PROGRESS, SUCCESS, Status, fault, log, run_rank};

pub struct Communicator {
    inner: Arc<Inner>,
    thread: JoinHandle<()>,
    /// Address and length.
    registered: Mutex<Vec<(usize, usize)>>,
}

struct Inner {
    key: String,
    rank: usize,
    world_size: usize,
    shared: Shared,
    status: AtomicI32,
    is_ending: AtomicBool,
    tasks: Mutex<VecDeque<Task>>,
    /// Signalled when there is a task, or an end.
    changed: Condvar,
}

pub enum Task {
    /// Waits for all ranks to come.
    Join,
    Collective(Collective),
    Split {
        color: u64,
        key: u64,
        place: Place,
    },
    Finalize,
}

/// Where a new handle goes.
pub struct Place(pub *mut *mut Communicator);

// SAFETY: the caller of `ncclCommSplit` keeps it until the communicator is done.
unsafe impl Send for Place {}

#[derive(Clone, Copy, Debug)]
pub struct Collective {
    pub op: Op,
    pub data_type: DataType,
    pub count: usize,
    /// Addresses.
    pub send: usize,
    pub recv: usize,
    pub send_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    AllGather,
    ReduceScatter,
    Sum,
    Max,
    Broadcast { root: usize },
}

/// The communicator is aborted.
struct Ended;

impl Communicator {
    pub fn new(key: &str, rank: usize, world_size: usize) -> Self {
        let inner = Arc::new(Inner {
            key: key.to_owned(),
            rank,
            world_size,
            shared: Shared::open(key, world_size),
            status: AtomicI32::new(SUCCESS),
            is_ending: AtomicBool::new(false),
            tasks: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = {
            let inner = Arc::clone(&inner);
            std::thread::spawn(move || drop(inner.work()))
        };
        Communicator { inner, thread, registered: Mutex::default() }
    }

    pub fn push(&self, task: Task) {
        let mut tasks = self.inner.tasks.lock().unwrap();
        tasks.push_back(task);
        let _ = self.inner.status.compare_exchange(SUCCESS, IN_PROGRESS, Ordering::AcqRel, Ordering::Acquire);
        self.inner.changed.notify_all();
    }

    pub fn status(&self) -> Status {
        self.inner.status.load(Ordering::Acquire)
    }

    /// Ends the thread, whatever it does.
    pub fn end(self) {
        self.inner.is_ending.store(true, Ordering::Release);
        self.inner.changed.notify_all();
        let _ = self.thread.join();
    }

    pub fn register(&self, start: usize, len_bytes: usize) {
        self.registered.lock().unwrap().push((start, len_bytes));
    }

    pub fn is_registered(&self, at: usize, len_bytes: usize) -> bool {
        let registered = self.registered.lock().unwrap();
        registered.iter().any(|&(start, len)| start <= at && at + len_bytes <= start + len)
    }

    pub fn key(&self) -> &str {
        &self.inner.key
    }

    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    pub fn world_size(&self) -> usize {
        self.inner.world_size
    }
}

impl Inner {
    fn work(&self) -> Result<(), Ended> {
        let mut num_collectives = 0;
        let mut num_splits = 0;
        loop {
            match self.next()? {
                Task::Join => self.join()?,
                Task::Collective(collective) => {
                    num_collectives += 1;
                    self.collective(&collective, num_collectives)?;
                }
                Task::Split { color, key, place } => {
                    num_collectives += 1;
                    num_splits += 1;
                    let part = self.split(color, key, num_collectives, num_splits)?;
                    // SAFETY: the caller keeps it until this communicator is done.
                    unsafe { *place.0 = Box::into_raw(Box::new(part)) };
                }
                Task::Finalize => {
                    if let Some(millis) = fault("slow_finalize") {
                        std::thread::sleep(Duration::from_millis(millis[0]));
                    }
                }
            }
            let tasks = self.tasks.lock().unwrap();
            if tasks.is_empty() {
                let _ = self.status.compare_exchange(IN_PROGRESS, SUCCESS, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }

    fn next(&self) -> Result<Task, Ended> {
        let mut tasks = self.tasks.lock().unwrap();
        loop {
            if self.is_ending.load(Ordering::Acquire) {
                return Err(Ended);
            }
            match tasks.pop_front() {
                Some(task) => return Ok(task),
                // With a limit: the end is signalled without the lock.
                None => tasks = self.changed.wait_timeout(tasks, Duration::from_millis(20)).unwrap().0,
            }
        }
    }

    fn join(&self) -> Result<(), Ended> {
        if let Some(millis) = fault("slow_init") {
            std::thread::sleep(Duration::from_millis(millis[0]));
        }
        self.cells()[self.rank].has_joined.store(1, Ordering::Release);
        self.wait_for_all(|cell| &cell.has_joined, 1)
    }

    /// Collective number `n`: everybody puts what it sends into its area, then takes what it needs from all areas.
    fn collective(&self, c: &Collective, n: u64) -> Result<(), Ended> {
        let is_here = |numbers: &[u64]| numbers[0].to_string() == run_rank() && numbers[1] == n;
        if fault("never_join").is_some_and(|numbers| is_here(&numbers)) {
            return self.hang();
        }
        if let Some(numbers) = fault("async_error").filter(|numbers| is_here(numbers)) {
            self.status.store(numbers[2] as Status, Ordering::Release);
            return self.hang();
        }
        let own = self.shared.area(self.rank, c.send_bytes);
        self.wait_for_all(|cell| &cell.read, n - 1)?;
        // SAFETY: the caller's buffer stays until the communicator is done; all have read the area's last contents.
        unsafe { std::ptr::copy_nonoverlapping(std::ptr::with_exposed_provenance(c.send), own, c.send_bytes) };
        self.publish([code(c.op), c.data_type as u64, c.count as u64], n)?;
        let to: *mut u8 = std::ptr::with_exposed_provenance_mut(c.recv);
        let piece_bytes = c.count * c.data_type.bytes();
        // SAFETY: all have written their areas and leave them until this rank has read; the caller's buffers stay, and
        // are as large as the operation needs.
        unsafe {
            let areas = |at: usize| -> Vec<*const u8> {
                (0..self.world_size).map(|rank| self.shared.area(rank, c.send_bytes).add(at).cast_const()).collect()
            };
            match c.op {
                Op::AllGather => {
                    for (rank, area) in areas(0).into_iter().enumerate() {
                        std::ptr::copy_nonoverlapping(area, to.add(rank * piece_bytes), piece_bytes);
                    }
                }
                Op::ReduceScatter => combine(c.data_type, false, &areas(self.rank * piece_bytes), to, c.count),
                Op::Sum | Op::Max => combine(c.data_type, c.op == Op::Max, &areas(0), to, c.count),
                Op::Broadcast { root } => std::ptr::copy_nonoverlapping(areas(0)[root], to, piece_bytes),
            }
        }
        self.cells()[self.rank].read.store(n, Ordering::Release);
        Ok(())
    }

    fn split(&self, color: u64, key: u64, n: u64, num_splits: u64) -> Result<Communicator, Ended> {
        self.wait_for_all(|cell| &cell.read, n - 1)?;
        let own = self.shared.area(self.rank, 16).cast::<[u64; 2]>();
        // SAFETY: all have read the area's last contents; it is aligned to a page.
        unsafe { own.write([color, key]) };
        self.publish([code(Op::AllGather) + 100, 0, 0], n)?;
        let mut members: Vec<(u64, usize)> = Vec::new();
        for rank in 0..self.world_size {
            // SAFETY: all have written their areas.
            let [their_color, their_key] = unsafe { self.shared.area(rank, 16).cast::<[u64; 2]>().read() };
            if their_color == color {
                members.push((their_key, rank));
            }
        }
        members.sort_unstable();
        let rank = members.iter().position(|&(_, rank)| rank == self.rank).expect("it is of its color");
        self.cells()[self.rank].read.store(n, Ordering::Release);
        let part = Communicator::new(&format!("{}-split{num_splits}-color{color}", self.key), rank, members.len());
        part.push(Task::Join);
        log(&format!(r#"{{"call":"part","comm":"{}","rank":{rank},"ranks":{}}}"#, part.key(), members.len()));
        Ok(part)
    }

    /// Tells that the area holds collective `n`, and waits until all say so of the same call. Ranks that call different
    /// things hang.
    fn publish(&self, call: [u64; 3], n: u64) -> Result<(), Ended> {
        let own = &self.cells()[self.rank];
        own.call.iter().zip(call).for_each(|(to, number)| to.store(number, Ordering::Relaxed));
        own.written.store(n, Ordering::Release);
        self.wait_for_all(|cell| &cell.written, n)?;
        let is_same =
            |cell: &Cell| cell.call.iter().zip(call).all(|(theirs, own)| theirs.load(Ordering::Relaxed) == own);
        if self.cells().iter().all(is_same) { Ok(()) } else { self.hang() }
    }

    fn wait_for_all(&self, counter: fn(&Cell) -> &AtomicU64, n: u64) -> Result<(), Ended> {
        for num_polls in 0u64.. {
            if all_reached(self.cells(), counter, n) {
                break;
            }
            if self.is_ending.load(Ordering::Acquire) {
                return Err(Ended);
            }
            if num_polls < 200 { std::thread::yield_now() } else { std::thread::sleep(Duration::from_micros(50)) }
        }
        Ok(())
    }

    /// Until it is aborted.
    fn hang<T>(&self) -> Result<T, Ended> {
        while !self.is_ending.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Ended)
    }

    fn cells(&self) -> &[Cell] {
        self.shared.cells()
    }
}

fn code(op: Op) -> u64 {
    match op {
        Op::AllGather => 1,
        Op::ReduceScatter => 2,
        Op::Sum => 3,
        Op::Max => 4,
        Op::Broadcast { root } => 10 + root as u64,
    }
}
