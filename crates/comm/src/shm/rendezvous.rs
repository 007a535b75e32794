//! How ranks find each other: through the store, each tells its host and process; rank 0 makes the group's common memory
//! and tells its descriptor, which the others open through `/proc`.

use std::os::fd::AsRawFd;
use std::time::Duration;

use fsdp_control::ControlError;
use fsdp_control::memory::SharedMemory;
use fsdp_control::progress::{Op, ProgressHandle};
use fsdp_control::store::Store;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags};
use tch::{Device, Kind, Tensor};

use super::channel::Cell;
use super::staging::{self, Staging};
use super::wait::{self, Waiting};
use super::{ALIGN_BYTES, ShmGroup, keep};
use crate::CommError;
use crate::flight::FlightRecord;

/// What the first collective of a group is for, in messages.
const RENDEZVOUS: &str = "rendezvous";

/// A rank's process.
#[derive(Debug)]
pub(super) struct Peer {
    pub pid: u32,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
}

impl Peer {
    pub fn has_ended(&self) -> bool {
        wait::has_ended(&self.pidfd)
    }
}

impl ShmGroup {
    pub(crate) fn connect(
        store: &mut Store,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        let run_ranks = (0..world_size).collect();
        Self::meet(store, "world", rank, run_ranks, timeout, FlightRecord::new("world", progress))
    }

    pub(crate) fn split(&mut self, store: &mut Store, color: usize, name: &str) -> Result<Self, CommError> {
        let world_size = self.world_size();
        let colors = Tensor::zeros([world_size as i64], (Kind::Int64, Device::Cpu));
        self.all_gather_into_tensor(&colors, &Tensor::from_slice(&[color as i64]))?;
        let members: Vec<usize> =
            (0..world_size).filter(|&rank| colors.int64_value(&[rank as i64]) == color as i64).collect();
        let rank = members.iter().position(|&rank| rank == self.rank).expect("this rank gave its color");
        let run_ranks: Vec<usize> = members.iter().map(|&rank| self.run_ranks[rank]).collect();
        // Groups are counted by their members, who have made the same ones together.
        let with: Vec<String> = run_ranks.iter().map(usize::to_string).collect();
        Self::meet(store, &format!("{name}/{}", with.join(",")), rank, run_ranks, self.timeout, self.calls.split(name))
    }

    /// Ranks meet under `name`, which the groups that are made at the same time do not share.
    fn meet(
        store: &mut Store,
        name: &str,
        rank: usize,
        run_ranks: Vec<usize>,
        timeout: Duration,
        calls: FlightRecord,
    ) -> Result<Self, CommError> {
        let world_size = run_ranks.len();
        assert!(rank < world_size, "rank {rank} of {world_size}");
        // The common memory: what each rank waits for | counters of the staging area | the staging area.
        let cells_offset_bytes = world_size * size_of::<Waiting>();
        let data_offset_bytes = (cells_offset_bytes + world_size * size_of::<Cell>()).next_multiple_of(ALIGN_BYTES);
        let len_bytes = data_offset_bytes + staging::len_bytes(world_size);
        let own = if rank == 0 { Some(SharedMemory::create("fsdp-group", len_bytes)?) } else { None };

        // Groups on one store are told apart by their number, which each rank counts for itself.
        let number = store.add(&format!("shm/{name}/rank-{rank}/groups"), 1)?;
        let key = |rank: usize| format!("shm/{name}/{number}/rank-{rank}");
        let fd = own.as_ref().map_or(-1, |(_, fd)| fd.as_raw_fd());
        store.set(&key(rank), Card { host: host(), pid: std::process::id(), fd }.to_text().as_bytes())?;
        // Before the first wait, so that the counters tell who has come and who has not.
        if let Some(progress) = calls.progress() {
            let upcoming = calls.upcoming(Op::Barrier, 0, RENDEZVOUS);
            progress.enter(upcoming.op, upcoming.seq, &upcoming.unit, upcoming.num_bytes);
        }
        store.barrier(&format!("shm/{name}/{number}/set"), rank, world_size, timeout)?;
        let mut cards = Vec::new();
        for other_rank in 0..world_size {
            let text = String::from_utf8_lossy(&store.get(&key(other_rank), timeout)?).into_owned();
            cards.push(Card::from_text(&text).ok_or(CommError::Rendezvous { other_rank, got: text })?);
        }
        let host = cards[rank].host.clone();
        if let Some(other_rank) = (0..world_size).find(|&other| cards[other].host != host) {
            let other_host = cards[other_rank].host.clone();
            return Err(CommError::NotOneHost { rank, host, other_rank, other_host });
        }

        let peers = cards.iter().map(|card| open_process(card.pid)).collect::<Result<Vec<_>, _>>()?;
        let (memory, own_fd) = match own {
            Some((memory, fd)) => (memory, Some(fd)),
            None => (SharedMemory::open_of_process(cards[0].pid, cards[0].fd, len_bytes)?, None),
        };
        let memory = keep(memory);
        let mut group = ShmGroup {
            rank,
            run_ranks,
            timeout,
            calls,
            peers,
            waiting: Waiting::all_of(memory, 0, world_size),
            channels: Vec::new(),
            staging: Staging::new(memory, data_offset_bytes, cells_offset_bytes, rank, world_size),
        };
        group.channels.push(group.staging.channel());
        let call = group.calls.start(Op::Barrier, None, 0, 0, RENDEZVOUS);
        group.staged_barrier(call)?;
        drop(own_fd); // all have opened it
        Ok(group)
    }
}

fn open_process(pid: u32) -> Result<Peer, ControlError> {
    let failed = |source: rustix::io::Errno| ControlError::System {
        what: format!("cannot watch the process {pid} of another rank"),
        source: source.into(),
    };
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH).map_err(failed)?;
    let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).map_err(failed)?;
    Ok(Peer { pid, pidfd })
}

/// What a rank tells the others about itself.
struct Card {
    host: String,
    pid: u32,
    /// Rank 0: descriptor of the common memory; else -1.
    fd: i32,
}

impl Card {
    fn to_text(&self) -> String {
        format!("fsdp-shm-1\n{}\n{}\n{}", self.host, self.pid, self.fd)
    }

    fn from_text(text: &str) -> Option<Card> {
        let fields: Vec<&str> = text.split('\n').collect();
        let &["fsdp-shm-1", host, pid, fd] = fields.as_slice() else { return None };
        Some(Card { host: host.to_owned(), pid: pid.parse().ok()?, fd: fd.parse().ok()? })
    }
}

/// Equal for processes that can share memory; the name is for messages.
fn host() -> String {
    format!("{} ({})", fsdp_control::host_name(), fsdp_control::machine_identity())
}
