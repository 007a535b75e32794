//! Waiting for other ranks' counters: a short spin, then sleep in the kernel, woken by the rank that counts. Ten times a
//! second the sleeper looks whether the ranks that it waits for are alive and on their way to the same collective.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use fsdp_control::memory::SharedMemory;
use rustix::event::{PollFd, PollFlags};
use rustix::thread::futex;

use super::ShmGroup;
use super::channel::{CallCell, Channel};
use crate::{Call, CommError, Phase};

/// How long a sleep lasts before the ranks are looked at.
const SLICE: Duration = Duration::from_millis(100);
/// Some microseconds: longer than a peer needs that is in the same place, shorter than anybody would notice.
const NUM_SPINS: u32 = 100;

/// What a rank waits for, in shared memory for the others to see. Only that rank writes it.
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Waiting {
    /// Odd while the rest changes.
    version: AtomicU32,
    /// Id of the channel plus 1; 0 = it does not wait.
    channel: AtomicU32,
    /// Use of the channel, and phase.
    n: AtomicU32,
    phase: AtomicU32,
    call: CallCell,
}

/// A rank's [`Waiting`], read.
#[derive(Clone, Debug)]
struct WaitsFor {
    channel: usize,
    n: u32,
    phase: Phase,
    call: Call,
}

impl ShmGroup {
    /// Waits until all ranks have come to `phase` of use `n`, within `call`. For [`Phase::Written`] this rank must have
    /// come there itself.
    pub(super) fn wait(&mut self, channel: &Channel, phase: Phase, n: u32, call: &Call) -> Result<(), CommError> {
        if let Some(progress) = self.calls.progress() {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        let arrived = spin(channel, phase, n);
        if !arrived {
            self.waiting[self.rank].set(channel.id, n, phase, call);
            let result = self.sleep(channel, phase, n, call);
            self.waiting[self.rank].clear();
            result?;
        }
        // Left only on success: the counters then show where a failed rank was.
        if let Some(progress) = self.calls.progress() {
            progress.leave();
        }
        if phase == Phase::Written { self.check_calls(channel, n, call) } else { Ok(()) }
    }

    fn sleep(&mut self, channel: &Channel, phase: Phase, n: u32, call: &Call) -> Result<(), CommError> {
        let mut waited = Duration::ZERO;
        let mut last_check = Instant::now();
        for rank in 0..self.world_size() {
            let word = channel.word(rank, phase);
            loop {
                let seen = word.load(Ordering::Acquire);
                if channel.reached(rank, phase, n) {
                    break;
                }
                // Interrupted, woken and out of time are all the same here: look again.
                let slice = SLICE.min(self.timeout).try_into().expect("a short time");
                let _ = futex::wait(word, futex::Flags::empty(), seen, Some(&slice));
                let since = last_check.elapsed();
                if since >= SLICE.min(self.timeout) && !channel.reached(rank, phase, n) {
                    last_check = Instant::now();
                    // Time in which this process was itself stopped does not count.
                    waited += since.min(2 * SLICE);
                    self.check_peers(channel, phase, n, call, waited)?;
                }
            }
        }
        Ok(())
    }

    /// Whether it still makes sense to wait.
    fn check_peers(
        &mut self,
        channel: &Channel,
        phase: Phase,
        n: u32,
        call: &Call,
        waited: Duration,
    ) -> Result<(), CommError> {
        // A peer may wait for what this rank has started and could not publish then.
        self.staging.publish_ready();
        if phase == Phase::Written {
            self.check_calls(channel, n, call)?;
        }
        // Liveness before counters: a rank that has counted and then ended is not missed.
        let dead: Vec<usize> = (0..self.world_size()).filter(|&rank| self.peers[rank].has_ended()).collect();
        let missing: Vec<usize> = (0..self.world_size()).filter(|&rank| !channel.reached(rank, phase, n)).collect();
        let lost: Vec<usize> = dead.into_iter().filter(|rank| missing.contains(rank)).collect();
        if !lost.is_empty() {
            let (rank, lost) = (self.run_ranks[self.rank], self.run_ranks_of(&lost));
            return Err(CommError::PeerLost { rank, lost, call: call.clone() });
        }
        for &other_rank in &missing {
            if let Some(theirs) = self.waiting[other_rank].get()
                && self.holds_up(&theirs)
                && !channel.reached(other_rank, phase, n)
            {
                return Err(self.mismatch(call, other_rank, theirs.call));
            }
        }
        if waited >= self.timeout && !missing.is_empty() {
            let (rank, missing) = (self.run_ranks[self.rank], self.run_ranks_of(&missing));
            return Err(CommError::Timeout { rank, missing, phase, waited, call: call.clone() });
        }
        Ok(())
    }

    /// Whether another rank waits for this one. If this one waits for that one, neither will ever go on.
    fn holds_up(&self, theirs: &WaitsFor) -> bool {
        // What is started but not published yet will be, by `check_peers`.
        if theirs.channel == self.staging.channel().id && theirs.phase == Phase::Written {
            return !self.staging.has_started(theirs.n);
        }
        // No such channel here: this rank has not even made that buffer.
        self.channels.get(theirs.channel).is_none_or(|c| !c.reached(self.rank, theirs.phase, theirs.n))
    }

    /// All ranks that have written use `n` did so for the same call.
    fn check_calls(&self, channel: &Channel, n: u32, call: &Call) -> Result<(), CommError> {
        match channel.find_mismatch(n) {
            None => Ok(()),
            Some((other_rank, other_call)) => Err(self.mismatch(call, other_rank, other_call)),
        }
    }

    fn mismatch(&self, call: &Call, other_rank: usize, other_call: Call) -> CommError {
        let (rank, other_rank) = (self.run_ranks[self.rank], self.run_ranks[other_rank]);
        CommError::Mismatch { rank, call: call.clone(), other_rank, other_call }
    }

    fn run_ranks_of(&self, ranks: &[usize]) -> Vec<usize> {
        ranks.iter().map(|&rank| self.run_ranks[rank]).collect()
    }
}

fn spin(channel: &Channel, phase: Phase, n: u32) -> bool {
    for _ in 0..NUM_SPINS {
        if channel.all_reached(phase, n) {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

/// Whether a process has ended, by its pidfd.
pub(super) fn has_ended(pidfd: &rustix::fd::OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1..))
}

impl Waiting {
    pub fn all_of(memory: &'static SharedMemory, offset_bytes: usize, count: usize) -> Vec<&'static Waiting> {
        assert!(offset_bytes.is_multiple_of(align_of::<Waiting>()));
        assert!(offset_bytes + count * size_of::<Waiting>() <= memory.len_bytes());
        // SAFETY: inside of the page-aligned mapping, aligned; it lives as long as the process, and all fields are
        // atomics, for which any bits are valid and other processes' writes are no data race.
        (0..count).map(|i| unsafe { &*memory.start().add(offset_bytes).cast::<Waiting>().add(i) }).collect()
    }

    fn set(&self, channel: usize, n: u32, phase: Phase, call: &Call) {
        self.change(|| {
            self.channel.store(channel as u32 + 1, Ordering::Relaxed);
            self.n.store(n, Ordering::Relaxed);
            self.phase.store(phase as u32, Ordering::Relaxed);
            self.call.store(call);
        });
    }

    fn clear(&self) {
        self.change(|| self.channel.store(0, Ordering::Relaxed));
    }

    fn change(&self, change: impl FnOnce()) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change();
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// `None` if the rank does not wait, or is just changing its mind.
    fn get(&self) -> Option<WaitsFor> {
        let version = self.version.load(Ordering::Acquire);
        let channel = self.channel.load(Ordering::Relaxed);
        let n = self.n.load(Ordering::Relaxed);
        let phase = if self.phase.load(Ordering::Relaxed) == 0 { Phase::Written } else { Phase::Released };
        let call = self.call.load();
        fence(Ordering::Acquire);
        let whole = version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed);
        (whole && channel > 0).then(|| WaitsFor { channel: channel as usize - 1, n, phase, call })
    }
}
