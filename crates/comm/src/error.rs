use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, io};

use fsdp_control::ControlError;
use fsdp_control::error_file::ErrorKind;
use fsdp_control::progress::Op;
use fsdp_torch_ext::TorchError;
use tch::{Kind, TchError};

/// What can go wrong in a collective.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    #[error("rank {rank}: {} ended before {call} was complete", ranks(.lost))]
    PeerLost { rank: usize, lost: Vec<usize>, call: Call },

    #[error(
        "rank {rank}: {} did not {phase} {call} within {:.1} s; a process that hangs or is stopped does that, and one \
         that is only slow needs a longer fsdp.timeout_secs",
        ranks(.missing), .waited.as_secs_f64()
    )]
    Timeout { rank: usize, missing: Vec<usize>, phase: Phase, waited: Duration, call: Call },

    #[error("ranks call different collectives: rank {rank} is in {call}, rank {other_rank} in {other_call}")]
    Mismatch { rank: usize, call: Call, other_rank: usize, other_call: Call },

    #[error("rank {rank}: rank {other_rank} has given up; the last call here was {call}")]
    PeerGaveUp { rank: usize, other_rank: usize, call: Call },

    #[error("{op}: expected {expected}, got {got}")]
    BadTensor { op: Op, expected: String, got: String },

    #[error(
        "rank {rank} is on {host} and rank {other_rank} on {other_host}: the shm back end is for processes of one host \
         that share a PID namespace; choose another fsdp.backend"
    )]
    NotOneHost { rank: usize, host: String, other_rank: usize, other_host: String },

    #[error("rank {other_rank} answered the rendezvous with {got:?}; all ranks must run the same version")]
    Rendezvous { other_rank: usize, got: String },

    #[error("backend {backend} cannot be used: {missing}")]
    Unavailable { backend: &'static str, missing: String },

    #[error("rank {rank}: NCCL: {message}{}", in_call(.call.as_ref()))]
    Nccl {
        rank: usize,
        /// The function of NCCL and its own text.
        message: String,
        /// It tells that another rank, or the network, is gone.
        is_remote: bool,
        call: Option<Call>,
    },

    #[error("rank {rank}: MPI: {message}{}", in_call(.call.as_ref()))]
    Mpi { rank: usize, message: String, call: Option<Call> },

    #[error("cannot write the flight record {}: {source}", .path.display())]
    FlightRecord { path: PathBuf, source: io::Error },

    #[error(transparent)]
    Torch(#[from] TorchError),

    #[error(transparent)]
    Tch(#[from] TchError),

    #[error(transparent)]
    Control(#[from] ControlError),
}

impl CommError {
    /// The kind under which a rank's error file records this.
    pub fn error_kind(&self) -> ErrorKind {
        match self {
            // The store ends with its launcher, or with rank 0.
            CommError::PeerLost { .. }
            | CommError::PeerGaveUp { .. }
            | CommError::Nccl { is_remote: true, .. }
            | CommError::Control(ControlError::StoreLost { .. }) => ErrorKind::PeerLost,
            CommError::Timeout { .. } | CommError::Control(ControlError::BarrierTimeout { .. }) => {
                ErrorKind::CollectiveTimeout
            }
            CommError::Mismatch { .. } => ErrorKind::CollectiveMismatch,
            CommError::Unavailable { .. } => ErrorKind::BadInput,
            _ => ErrorKind::Other,
        }
    }

    /// The collective that failed, where one did.
    pub fn call(&self) -> Option<&Call> {
        match self {
            CommError::PeerLost { call, .. }
            | CommError::PeerGaveUp { call, .. }
            | CommError::Timeout { call, .. }
            | CommError::Mismatch { call, .. } => Some(call),
            CommError::Nccl { call, .. } | CommError::Mpi { call, .. } => call.as_ref(),
            _ => None,
        }
    }
}

/// What a rank waits for. Shown as what a missing rank did not do.
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
            Phase::Written => "enter",
            Phase::Released => "release the buffer for",
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
        let mut about = Vec::new();
        match self.op {
            Op::AllReduce => about.push(if self.detail == 0 { "sum".to_owned() } else { "max".to_owned() }),
            Op::Broadcast => about.push(format!("from rank {}", self.detail)),
            _ => {}
        }
        match self.kind {
            Some(kind) => about.push(format!("{} bytes of {kind:?}", self.num_bytes)),
            None if self.num_bytes > 0 => about.push(format!("{} bytes", self.num_bytes)),
            None => {}
        }
        if !self.unit.is_empty() {
            about.push(self.unit.clone());
        }
        if about.is_empty() { Ok(()) } else { write!(f, " ({})", about.join(", ")) }
    }
}

/// " in ..." where there is a call.
fn in_call(call: Option<&Call>) -> String {
    call.map(|call| format!(" in {call}")).unwrap_or_default()
}

/// "rank 1" or "ranks 1, 3".
fn ranks(ranks: &[usize]) -> String {
    if ranks.is_empty() {
        return "some rank".into(); // `nccl` cannot always say which
    }
    let list = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    format!("rank{} {list}", if ranks.len() == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_ranks_collective_number_and_unit() {
        let call = Call {
            op: Op::AllGather,
            seq: 41,
            kind: Some(Kind::BFloat16),
            num_bytes: 2048,
            detail: 0,
            unit: "layers.3".into(),
        };
        let barrier = Call { op: Op::Barrier, seq: 7, kind: None, num_bytes: 0, detail: 0, unit: String::new() };
        let sum = Call { op: Op::AllReduce, ..call.clone() };
        let waited = Duration::from_millis(5000);
        for (error, expected) in [
            (
                CommError::PeerLost { rank: 0, lost: vec![1, 3], call: call.clone() },
                "rank 0: ranks 1, 3 ended before all_gather number 41 (2048 bytes of BFloat16, layers.3) was complete",
            ),
            (
                CommError::Timeout { rank: 2, missing: vec![1], phase: Phase::Released, waited, call },
                "rank 2: rank 1 did not release the buffer for all_gather number 41 (2048 bytes of BFloat16, layers.3) \
                 within 5.0 s; ",
            ),
            (
                CommError::Mismatch { rank: 0, call: barrier, other_rank: 1, other_call: sum },
                "ranks call different collectives: rank 0 is in barrier number 7, rank 1 in all_reduce number 41 \
                 (sum, 2048 bytes of BFloat16, layers.3)",
            ),
        ] {
            let message = error.to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }
}
