//! What happened in a run, in the order in which the launcher of node 0 heard of it; [`crate::verdict`] makes sense of
//! it.

use fsdp_control::error_file::ErrorRecord;
use serde::{Deserialize, Serialize};

use crate::link::Farewell;
use crate::rank::End;

#[derive(Debug, Default)]
pub struct History {
    pub failures: Vec<RankFailure>,
    /// What ended the run if it was no rank's failure: a node is lost, a launcher gave up.
    pub fault: Option<Farewell>,
    /// Ranks that ended because they were asked to.
    pub num_stopped: usize,
    /// A launcher got a signal.
    pub stop_requested: bool,
    /// Ranks were killed because they did not stop in time, or because a person insisted.
    pub forced: bool,
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
}

/// A rank's failure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankFailure {
    pub rank: usize,
    pub host: String,
    /// Unknown where an MPI does not tell it.
    pub pid: Option<i32>,
    pub end: End,
    /// Training step, from 1; 0 before the first; `None` where nobody knows.
    pub step: Option<u64>,
    /// Sequence number of the collective that it entered last.
    pub seq: u64,
    /// What the rank itself says.
    pub record: Option<ErrorRecord>,
    pub last_lines: Vec<String>,
    /// For a timeout: who was not there.
    pub absent: Vec<AbsentRank>,
}

impl RankFailure {
    /// The failure can be the cause of others.
    pub fn is_primary(&self) -> bool {
        self.record.as_ref().is_none_or(|record| record.primary)
    }
}

/// A rank that lives, but had not come to a collective for which another one waited in vain, or is suspended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AbsentRank {
    pub rank: usize,
    pub host: String,
    pub pid: i32,
    pub step: u64,
    /// Sequence number of the collective that it entered last; then that collective and the unit it was for.
    pub seq: u64,
    pub op: String,
    pub unit: String,
    /// It waits in that collective for others itself.
    pub waits: bool,
    /// State letter of the process.
    pub state: Option<char>,
}

impl AbsentRank {
    /// Least for the one to blame: who is suspended, then who does not wait for others itself, then who is furthest behind.
    pub fn order_of_suspicion(&self) -> impl Ord {
        (self.state != Some('T'), self.waits, self.seq)
    }
}
