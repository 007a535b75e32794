//! Progress counters in shared memory: where each rank of a launcher is, readable even when the rank is stuck.
//!
//! The launcher makes the counters and lets ranks inherit the descriptor; each rank writes its own record, a few
//! nanoseconds a time, and the launcher reads snapshots.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ControlError;
use crate::lifeline::take_inherited;
use crate::memory::SharedMemory;

/// Longest unit name kept, in bytes; longer ones are cut.
pub const MAX_UNIT_BYTES: usize = 48;

const MAGIC: u64 = u64::from_le_bytes(*b"fsdpprg2");
const RECORD_BYTES: usize = size_of::<Record>();

/// A collective operation, as progress counters and error messages name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    #[default]
    None = 0,
    AllGather = 1,
    ReduceScatter = 2,
    AllReduce = 3,
    Broadcast = 4,
    Barrier = 5,
    /// Making a buffer that all ranks share.
    NewBuffer = 6,
}

impl Op {
    pub const fn from_code(code: u32) -> Option<Op> {
        Some(match code {
            0 => Op::None,
            1 => Op::AllGather,
            2 => Op::ReduceScatter,
            3 => Op::AllReduce,
            4 => Op::Broadcast,
            5 => Op::Barrier,
            6 => Op::NewBuffer,
            _ => return None,
        })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::None => "none",
            Op::AllGather => "all_gather",
            Op::ReduceScatter => "reduce_scatter",
            Op::AllReduce => "all_reduce",
            Op::Broadcast => "broadcast",
            Op::Barrier => "barrier",
            Op::NewBuffer => "new_buffer",
        })
    }
}

/// What a rank is busy with, as progress counters and error records name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Phase {
    /// Meeting the other ranks, making buffers and groups.
    #[default]
    Init = 0,
    /// Reading weights or a checkpoint.
    Load = 1,
    /// Fetching the step's batch.
    Data = 2,
    /// With clipping and the update.
    ForwardBackward = 3,
    Checkpoint = 4,
    Validation = 5,
    /// Writing the finished model.
    Export = 6,
}

impl Phase {
    pub const fn from_code(code: u32) -> Option<Phase> {
        Some(match code {
            0 => Phase::Init,
            1 => Phase::Load,
            2 => Phase::Data,
            3 => Phase::ForwardBackward,
            4 => Phase::Checkpoint,
            5 => Phase::Validation,
            6 => Phase::Export,
            _ => return None,
        })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Init => "init",
            Phase::Load => "load",
            Phase::Data => "data",
            Phase::ForwardBackward => "forward_backward",
            Phase::Checkpoint => "checkpoint",
            Phase::Validation => "validation",
            Phase::Export => "export",
        })
    }
}

/// Where a rank is. All zero and empty before the rank has written anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Training step that it works on, from 1.
    pub step: u64,
    pub phase: Phase,
    /// Sequence number of the collective it entered last.
    pub seq: u64,
    /// That collective.
    pub op: Op,
    /// It waits inside of that collective.
    pub inside: bool,
    /// Unit that the collective is for.
    pub unit: String,
    /// Bytes of the collective's whole (unsharded) data.
    pub num_bytes: u64,
}

/// One rank's counters, alone on its cache lines. `version` is odd while the others change.
#[repr(C, align(128))]
struct Record {
    version: AtomicU32,
    op: AtomicU32,
    inside: AtomicU32,
    phase: AtomicU32,
    step: AtomicU64,
    seq: AtomicU64,
    num_bytes: AtomicU64,
    unit: [AtomicU64; MAX_UNIT_BYTES / 8],
}

/// The launcher's side: makes the counters and reads them.
#[derive(Debug)]
pub struct Progress {
    memory: SharedMemory,
    fd: OwnedFd,
    num_ranks: usize,
}

impl Progress {
    /// Counters of `num_ranks` (above 0) ranks of this launcher.
    ///
    /// # Errors
    /// The system has no descriptor or memory left.
    pub fn create(num_ranks: usize) -> Result<Self, ControlError> {
        let (memory, fd) = SharedMemory::create("fsdp-progress", (num_ranks + 1) * RECORD_BYTES)?;
        // The first record's place holds the header: magic, number of ranks.
        // SAFETY: mapped, aligned, and no other process has the descriptor yet.
        unsafe { memory.start().cast::<[u64; 2]>().write([MAGIC, num_ranks as u64]) };
        Ok(Progress { memory, fd, num_ranks })
    }

    /// The descriptor that ranks inherit (through [`crate::lifeline::prepare_child`]) and give to [`Progress::attach`].
    pub fn inherit_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// A rank's side: takes over the inherited descriptor `fd`. `local_rank` is the rank among those of its launcher.
    ///
    /// # Errors
    /// `fd` is not open, is no such memory, or has no record `local_rank`.
    pub fn attach(fd: RawFd, local_rank: usize) -> Result<ProgressHandle, ControlError> {
        let fd = take_inherited(fd, "progress")?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| ControlError::system("cannot read the progress size", e))?;
        let foreign = |reason: String| ControlError::Foreign { what: "progress memory".into(), reason };
        let len_bytes = usize::try_from(stat.st_size).unwrap_or(0);
        if len_bytes < 2 * RECORD_BYTES {
            return Err(foreign(format!("it has {len_bytes} bytes")));
        }
        let memory = SharedMemory::open(fd, len_bytes)?;
        // SAFETY: mapped and aligned; the launcher wrote the header before it gave the descriptor away.
        let [magic, num_ranks] = unsafe { memory.start().cast::<[u64; 2]>().read() };
        if magic != MAGIC || (num_ranks as usize).checked_add(1) != Some(len_bytes / RECORD_BYTES) {
            return Err(foreign("its header differs".into()));
        }
        if local_rank >= num_ranks as usize {
            return Err(foreign(format!("it is for {num_ranks} ranks, this is local rank {local_rank}")));
        }
        Ok(ProgressHandle { memory: Arc::new(memory), local_rank })
    }

    /// Where a rank is now. A rank that is stopped in the middle of a change gives a mixed snapshot, after 0.1 s.
    ///
    /// # Panics
    /// There is no such rank.
    pub fn snapshot(&self, local_rank: usize) -> Snapshot {
        assert!(local_rank < self.num_ranks, "no local rank {local_rank} of {}", self.num_ranks);
        let record = record(&self.memory, local_rank);
        let mut snapshot = Snapshot::default();
        for attempt in 0..200 {
            let before = record.version.load(Ordering::Acquire);
            snapshot = record.read();
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == record.version.load(Ordering::Relaxed) {
                break;
            }
            if attempt >= 100 {
                std::thread::sleep(Duration::from_millis(1)); // the rank lost its core
            }
        }
        snapshot
    }
}

/// A rank's own counters. Clones share them; only one thread at a time may write.
#[derive(Clone, Debug)]
pub struct ProgressHandle {
    memory: Arc<SharedMemory>,
    local_rank: usize,
}

impl ProgressHandle {
    /// The rank works on training step `step` (from 1).
    pub fn set_step(&self, step: u64) {
        self.change(|record| record.step.store(step, Ordering::Relaxed));
    }

    /// The rank is busy with `phase` from now on.
    pub fn set_phase(&self, phase: Phase) {
        self.change(|record| record.phase.store(phase as u32, Ordering::Relaxed));
    }

    /// The rank enters collective number `seq`, for `unit`, of `num_bytes` bytes of whole (unsharded) data.
    pub fn enter(&self, op: Op, seq: u64, unit: &str, num_bytes: u64) {
        let mut bytes = [0; MAX_UNIT_BYTES];
        let len = unit.len().min(MAX_UNIT_BYTES);
        bytes[..len].copy_from_slice(&unit.as_bytes()[..len]);
        self.change(|record| {
            record.op.store(op as u32, Ordering::Relaxed);
            record.seq.store(seq, Ordering::Relaxed);
            record.num_bytes.store(num_bytes, Ordering::Relaxed);
            for (word, chunk) in record.unit.iter().zip(bytes.as_chunks::<8>().0) {
                word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
            }
            record.inside.store(1, Ordering::Relaxed);
        });
    }

    /// The rank leaves the collective that it entered last.
    pub fn leave(&self) {
        self.change(|record| record.inside.store(0, Ordering::Relaxed));
    }

    fn change(&self, change: impl FnOnce(&Record)) {
        let record = record(&self.memory, self.local_rank);
        let version = record.version.load(Ordering::Relaxed);
        record.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change(record);
        record.version.store(version.wrapping_add(2), Ordering::Release);
    }
}

/// Record of `local_rank`, which the caller has checked.
fn record(memory: &SharedMemory, local_rank: usize) -> &Record {
    let offset_bytes = (local_rank + 1) * RECORD_BYTES;
    assert!(offset_bytes + RECORD_BYTES <= memory.len_bytes());
    // SAFETY: inside of the page-aligned mapping at a multiple of the record's alignment; a record is all atomics, for
    // which any bits are valid and other processes' writes are no data race.
    unsafe { &*memory.start().add(offset_bytes).cast::<Record>() }
}

impl Record {
    fn read(&self) -> Snapshot {
        let mut bytes = [0; MAX_UNIT_BYTES];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&self.unit) {
            *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        let len = bytes.iter().position(|&b| b == 0).unwrap_or(MAX_UNIT_BYTES);
        Snapshot {
            step: self.step.load(Ordering::Relaxed),
            seq: self.seq.load(Ordering::Relaxed),
            op: Op::from_code(self.op.load(Ordering::Relaxed)).unwrap_or_default(),
            inside: self.inside.load(Ordering::Relaxed) == 1,
            unit: String::from_utf8_lossy(&bytes[..len]).into_owned(),
            phase: Phase::from_code(self.phase.load(Ordering::Relaxed)).unwrap_or_default(),
            num_bytes: self.num_bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn attach(progress: &Progress, rank: usize) -> Result<ProgressHandle, ControlError> {
        // A duplicate stands for the inherited descriptor.
        Progress::attach(progress.fd.try_clone().unwrap().into_raw_fd(), rank)
    }

    #[test]
    fn each_rank_has_its_own_record() {
        let progress = Progress::create(3).unwrap();
        let handle = attach(&progress, 1).unwrap();
        handle.set_step(7);
        handle.set_phase(Phase::ForwardBackward);
        handle.enter(Op::ReduceScatter, 41, "layers.3", 1 << 20);
        let inside = Snapshot {
            step: 7,
            phase: Phase::ForwardBackward,
            seq: 41,
            op: Op::ReduceScatter,
            inside: true,
            unit: "layers.3".into(),
            num_bytes: 1 << 20,
        };
        assert_eq!(progress.snapshot(1), inside);
        handle.leave();
        assert_eq!(progress.snapshot(1), Snapshot { inside: false, ..inside });
        assert_eq!(progress.snapshot(0), Snapshot::default());
        assert_eq!(progress.snapshot(2), Snapshot::default());
    }

    #[test]
    fn codes_and_names_go_together() {
        for code in 0..=6 {
            let phase = Phase::from_code(code).unwrap();
            assert_eq!(phase as u32, code);
            assert_eq!(serde_json::to_string(&phase).unwrap(), format!("\"{phase}\""));
        }
        for code in 0..=6 {
            assert_eq!(Op::from_code(code).unwrap() as u32, code);
        }
        assert_eq!((Phase::from_code(7), Op::from_code(7)), (None, None));
    }

    #[test]
    fn long_unit_names_are_cut() {
        let progress = Progress::create(1).unwrap();
        attach(&progress, 0).unwrap().enter(Op::AllGather, 1, &"u".repeat(60), 0);
        assert_eq!(progress.snapshot(0).unit, "u".repeat(48));
    }

    #[test]
    fn snapshots_are_whole_while_the_rank_writes() {
        let progress = Progress::create(1).unwrap();
        let handle = attach(&progress, 0).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut seq = 0;
                while !stop.load(Ordering::Relaxed) {
                    seq += 1;
                    (0..100).for_each(|_| std::hint::spin_loop()); // a rank works between two collectives
                    handle.enter(Op::AllGather, seq, &seq.to_string().repeat(3), 3 * seq);
                }
            })
        };
        for _ in 0..20_000 {
            let snapshot = progress.snapshot(0);
            if snapshot.seq > 0 {
                assert_eq!(snapshot.unit, snapshot.seq.to_string().repeat(3));
                assert_eq!(snapshot.num_bytes, 3 * snapshot.seq);
            }
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    }

    #[test]
    fn foreign_descriptors_are_refused() {
        let progress = Progress::create(2).unwrap();
        assert!(attach(&progress, 2).unwrap_err().to_string().contains("for 2 ranks"));
        let (_, fd) = SharedMemory::create("other", 4096).unwrap();
        assert!(matches!(Progress::attach(fd.into_raw_fd(), 0), Err(ControlError::Foreign { .. })));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(matches!(Progress::attach(file.into_raw_fd(), 0), Err(ControlError::Foreign { .. })));
        assert!(matches!(Progress::attach(999_999, 0), Err(ControlError::System { .. })));
    }
}
