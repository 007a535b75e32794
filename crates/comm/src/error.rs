use std::fmt;
use std::time::Duration;

use fsdp_control::ControlError;
use fsdp_control::error_file::ErrorKind;
use fsdp_control::progress::Op;
use tch::Kind;

/// What can go wrong in a collective.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    #[error("rank {rank} lost {} in {call}", ranks(.lost))]
    PeerLost { rank: usize, lost: Vec<usize>, call: Call },

    #[error("rank {rank} waited {} s in {call} for {} {phase}", .waited.as_secs(), ranks(.missing))]
    Timeout { rank: usize, missing: Vec<usize>, phase: Phase, waited: Duration, call: Call },

    #[error("ranks call different collectives: rank {rank} is in {call}, rank {other_rank} in {other_call}")]
    Mismatch { rank: usize, call: Call, other_rank: usize, other_call: Call },

    #[error("{op}: expected {expected}, got {got}")]
    BadTensor { op: Op, expected: String, got: String },

    #[error(
        "rank {rank} is on {host} and rank {other_rank} on {other_host}: the shm back end is for processes of one host \
         that share a PID namespace; choose another fsdp.backend"
    )]
    NotOneHost { rank: usize, host: String, other_rank: usize, other_host: String },

    #[error("rank {other_rank} answered the rendezvous with {got:?}; all ranks must run the same version")]
    Rendezvous { other_rank: usize, got: String },

    #[error(transparent)]
    Control(#[from] ControlError),
}

impl CommError {
    /// The kind under which a rank's error file records this.
    pub fn error_kind(&self) -> ErrorKind {
        match self {
            CommError::PeerLost { .. } => ErrorKind::PeerLost,
            CommError::Timeout { .. } | CommError::Control(ControlError::BarrierTimeout { .. }) => {
                ErrorKind::CollectiveTimeout
            }
            CommError::Mismatch { .. } => ErrorKind::CollectiveMismatch,
            _ => ErrorKind::Other,
        }
    }

    /// The collective that failed, where one did.
    pub fn call(&self) -> Option<&Call> {
        match self {
            CommError::PeerLost { call, .. } | CommError::Timeout { call, .. } | CommError::Mismatch { call, .. } => {
                Some(call)
            }
            _ => None,
        }
    }
}

/// What a rank waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// All have entered the collective and contributed.
    Written = 0,
    /// All have finished reading what the buffer held before.
    Released = 1,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Written => "to enter it",
            Phase::Released => "to release the buffer",
        })
    }
}

/// One call of a collective by one rank, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub op: Op,
    /// How many collectives the rank had called, this one included.
    pub seq: u64,
    /// Data type; `None` for no data, or for several types.
    pub kind: Option<Kind>,
    /// Bytes of the whole (unsharded) data.
    pub num_bytes: u64,
    /// Root of a broadcast, or 0 for a sum and 1 for a maximum.
    pub detail: u8,
    /// Unit that it is for; empty for plain tensors. A new buffer's name.
    pub unit: String,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} number {}", self.op, self.seq)?;
        match self.op {
            Op::AllReduce => write!(f, " ({})", if self.detail == 0 { "sum" } else { "max" })?,
            Op::Broadcast => write!(f, " (from rank {})", self.detail)?,
            _ => {}
        }
        if self.num_bytes > 0 {
            write!(f, " of {} bytes", self.num_bytes)?;
        }
        if let Some(kind) = self.kind {
            write!(f, " of {kind:?}")?;
        }
        if !self.unit.is_empty() {
            write!(f, " for {}", self.unit)?;
        }
        Ok(())
    }
}

/// "rank 1" or "ranks 1, 3".
fn ranks(ranks: &[usize]) -> String {
    let list = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("rank{} {list}", if ranks.len() == 1 { "" } else { "s" })
}
