//! What happened in one start of the ranks, in the order in which the launcher of node 0 heard of it; [`crate::verdict`]
//! makes sense of it.

use fsdp_control::error_file::{Collective, ErrorKind, ErrorRecord};
use fsdp_control::progress::{Phase, Snapshot};
use serde::{Deserialize, Serialize};

use crate::link::Farewell;
use crate::oom::OomKill;
use crate::processes;
use crate::rank::End;

#[derive(Debug, Default)]
pub struct History {
    pub failures: Vec<RankFailure>,
    /// Ranks that ended by themselves as if the run were done or stopped, in order. Where others then miss them, that was
    /// too early.
    pub early: Vec<RankFailure>,
    /// What ended the ranks if it was no rank's failure: a node is lost, a launcher gave up, an mpirun failed.
    pub fault: Option<Farewell>,
    /// A launcher, or its machine, is gone.
    pub lost_node: bool,
    /// Ranks that ended because they were asked to.
    pub num_stopped: usize,
    /// A launcher got a signal before anything had failed.
    pub stop_requested: bool,
    /// A launcher got a signal, at whatever time: nothing is started again.
    pub was_signalled: bool,
    /// Ranks were killed because they did not stop in time, or because a person insisted.
    pub forced: bool,
    /// A step of this start was under way at its end, or done: what is lost is more than the time of loading.
    pub has_begun: bool,
    /// Ranks that even SIGKILL did not end.
    pub unkillable: Vec<usize>,
}

impl History {
    /// Notes a fault, unless something else ended the run before.
    pub fn add_fault(&mut self, fault: Farewell) {
        if self.fault.is_none() && !self.failures.iter().any(RankFailure::is_primary) {
            self.fault = Some(fault);
        }
    }

    /// The rank that ended as if nothing were wrong, and was then missed by the one that failed first.
    pub fn missed(&self) -> Option<&RankFailure> {
        let victim = self.failures.first().filter(|failure| failure.kind() == Some(ErrorKind::PeerLost))?;
        self.early.iter().find(|early| early.rank != victim.rank)
    }

    /// Ranks have waited in vain for one that lives, and nothing else is wrong: none of them can go on.
    pub fn is_hang(&self) -> bool {
        !self.failures.iter().any(RankFailure::is_primary)
            && self.failures.iter().any(|failure| failure.kind() == Some(ErrorKind::CollectiveTimeout))
    }
}

/// A rank's failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankFailure {
    pub rank: usize,
    /// The same among those of its launcher, as far as that is known.
    pub local_rank: usize,
    pub host: String,
    /// Unknown where an MPI does not tell it.
    pub pid: Option<i32>,
    pub end: End,
    /// Training step, from 1; 0 before the first; `None` where nobody knows.
    pub step: Option<u64>,
    /// Where its progress counters were; `None` for a rank that an MPI started.
    pub at: Option<At>,
    /// What the rank itself says.
    pub record: Option<ErrorRecord>,
    pub last_lines: Vec<String>,
    /// The most memory that it had.
    pub peak_rss_bytes: Option<u64>,
    /// The system killed it for memory.
    pub oom: Option<OomKill>,
    /// Where it had, that would be known.
    #[serde(default)]
    pub counts_oom: bool,
    /// For the first that waited in vain, or met a different collective: where the other ranks were.
    pub others: Vec<RankPlace>,
}

impl RankFailure {
    /// The failure can be the cause of others.
    pub fn is_primary(&self) -> bool {
        self.record.as_ref().is_none_or(|record| record.primary)
    }

    /// What the rank itself calls it.
    pub fn kind(&self) -> Option<ErrorKind> {
        self.record.as_ref().map(|record| record.kind)
    }

    /// Where the other ranks were says more about it.
    pub fn involves_others(&self) -> bool {
        matches!(self.kind(), Some(ErrorKind::CollectiveTimeout | ErrorKind::CollectiveMismatch))
    }

    /// Number of the collective that it entered last.
    pub fn seq(&self) -> u64 {
        self.at.as_ref().map_or(0, |at| at.seq)
    }

    /// Of the ranks for which this one waited in vain, the one to blame.
    pub fn absent(&self) -> Option<&RankPlace> {
        if self.kind() != Some(ErrorKind::CollectiveTimeout) {
            return None;
        }
        let waits = self.at.as_ref().is_some_and(|at| at.waits);
        let is_absent = |place: &&RankPlace| match self.missing() {
            // It waited at the store, of which the counters say nothing.
            missing if !waits && !missing.is_empty() => place.state.is_some() && missing.contains(&place.rank),
            _ => place.is_absent_from(self.seq()),
        };
        self.others.iter().filter(is_absent).min_by_key(|place| place.order_of_suspicion())
    }

    /// Ranks that did not come, by the rank's own record.
    fn missing(&self) -> &[usize] {
        let collective = self.record.as_ref().and_then(|record| record.collective.as_ref());
        collective.map_or(&[], |collective| &collective.missing)
    }

    /// It waited in vain, and it is known for whom.
    pub fn knows_who(&self) -> bool {
        self.kind() == Some(ErrorKind::CollectiveTimeout) && (self.absent().is_some() || !self.missing().is_empty())
    }

    /// Ranks that wait in the collective that this one entered last, in order; this one is one of them.
    pub fn waiting(&self) -> Vec<usize> {
        let others = self.others.iter().filter(|place| place.at.waits && place.at.seq == self.seq());
        let mut ranks: Vec<usize> = others.map(|place| place.rank).chain([self.rank]).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }
}

/// Where a rank is, by its progress counters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct At {
    pub step: u64,
    pub phase: Phase,
    /// The collective that it entered last: its number (0 = none yet), what it was, the unit that it was for, and the bytes
    /// of the whole data.
    pub seq: u64,
    pub op: String,
    pub unit: String,
    pub num_bytes: u64,
    /// It waits in that collective for others.
    pub waits: bool,
}

impl From<Snapshot> for At {
    fn from(snapshot: Snapshot) -> Self {
        let Snapshot { step, phase, seq, op, inside, unit, num_bytes } = snapshot;
        Self { step, phase, seq, op: op.to_string(), unit, num_bytes, waits: inside }
    }
}

impl At {
    /// The collective, as records have it.
    pub fn to_record(&self, entered: Vec<usize>, missing: Vec<usize>) -> Collective {
        let (op, unit) = (self.op.clone(), self.unit.clone());
        Collective { seq: self.seq, op, num_bytes: self.num_bytes, unit, entered, missing }
    }
}

/// Where another rank was when one failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankPlace {
    pub rank: usize,
    pub host: String,
    pub pid: i32,
    pub at: At,
    /// State letter of the process; `None` once it has ended.
    pub state: Option<char>,
}

impl RankPlace {
    /// It lives, but had not come to collective `seq`, or is suspended.
    pub fn is_absent_from(&self, seq: u64) -> bool {
        self.state.is_some() && (self.at.seq < seq || self.is_suspended())
    }

    /// By a signal, or a debugger.
    pub fn is_suspended(&self) -> bool {
        self.state.is_some_and(processes::is_suspended)
    }

    /// Least for the one to blame: who is suspended, then who does not wait for others itself, then who is furthest behind.
    fn order_of_suspicion(&self) -> impl Ord + use<> {
        (!self.is_suspended(), self.at.waits, self.at.seq)
    }
}
