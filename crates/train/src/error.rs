//! What can end a rank, as exit status and error record.

use std::path::PathBuf;

use fsdp::{EngineError, NonFinite};
use fsdp_checkpoint::CheckpointError;
use fsdp_comm::CommError;
use fsdp_config::ConfigError;
use fsdp_control::env::WorkerEnv;
use fsdp_control::error_file::{Collective, ErrorKind, ErrorRecord};
use fsdp_control::progress::Op;
use fsdp_control::{ControlError, ExitStatus};
use fsdp_data::DataError;
use fsdp_plan::PlanError;

use crate::whereabouts;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Torch(#[from] fsdp_torch_ext::TorchError),
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{place}{}; the weights are unchanged", of_samples(.samples))]
    NonFinite {
        place: NonFinite,
        /// Where the samples come from that it appeared with, if that is known.
        samples: Vec<String>,
    },
    #[error("{num} steps in a row were not finite and left out; the last: {last}")]
    LeftOut { num: u64, last: Box<TrainError> },
    /// The config, or the data, does not go with what the output folder holds.
    #[error("{0}")]
    BadInput(String),
    #[error("rank {rank} sent {what} that cannot be read: {source}")]
    Message { rank: usize, what: &'static str, source: serde_json::Error },
}

fn of_samples(samples: &[String]) -> String {
    match samples {
        [] => String::new(),
        [one] => format!(", for the sample {one}"),
        _ => format!(", for the samples {}", samples.join(", ")),
    }
}

impl TrainError {
    pub fn exit_status(&self) -> ExitStatus {
        match self.kind() {
            ErrorKind::BadInput => ExitStatus::BadInput,
            ErrorKind::NonFinite => ExitStatus::DoNotRerun,
            _ if matches!(self, TrainError::Control(ControlError::NoProgress { .. })) => ExitStatus::DoNotRerun,
            _ => ExitStatus::Failed,
        }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            // Before the first step, a file that cannot be read is a wrong path; later, it is not the data's fault.
            TrainError::Data(DataError::Io { .. }) if whereabouts::step() > 0 => ErrorKind::Io,
            // It ends with the launcher, or with rank 0.
            TrainError::Control(ControlError::StoreLost { .. }) => ErrorKind::PeerLost,
            // Another rank did not say in time what this one waits for.
            TrainError::Control(ControlError::KeyTimeout { .. } | ControlError::BarrierTimeout { .. }) => {
                ErrorKind::CollectiveTimeout
            }
            TrainError::Config(_) | TrainError::Plan(_) | TrainError::Data(_) | TrainError::BadInput(_) => {
                ErrorKind::BadInput
            }
            TrainError::Engine(EngineError::NoValidToken) => ErrorKind::BadInput,
            TrainError::NonFinite { .. }
            | TrainError::LeftOut { .. }
            | TrainError::Engine(EngineError::NonFinite(_)) => ErrorKind::NonFinite,
            TrainError::Comm(e) | TrainError::Engine(EngineError::Comm(e)) => e.error_kind(),
            TrainError::Checkpoint(
                CheckpointError::Io { .. } | CheckpointError::NoSpace { .. } | CheckpointError::Reports { .. },
            )
            | TrainError::Io { .. } => ErrorKind::Io,
            // The model's files, or a checkpoint's, are not what they should be.
            TrainError::Checkpoint(_) => ErrorKind::BadInput,
            TrainError::Control(_) | TrainError::Engine(_) | TrainError::Torch(_) | TrainError::Message { .. } => {
                ErrorKind::Other
            }
        }
    }

    fn non_finite(&self) -> Option<&NonFinite> {
        match self {
            TrainError::NonFinite { place, .. } => Some(place),
            TrainError::LeftOut { last, .. } => last.non_finite(),
            _ => None,
        }
    }

    /// The unit at work, where the message does not say it.
    fn unit(&self) -> Option<String> {
        match self {
            TrainError::Comm(e) | TrainError::Engine(EngineError::Comm(e)) => e
                .call()
                .map(|call| call.unit.clone())
                .filter(|unit| !unit.is_empty() && !self.to_string().contains(unit)),
            _ => None,
        }
    }

    /// What the launcher reads.
    pub fn record(&self, env: &WorkerEnv) -> ErrorRecord {
        let mut record = ErrorRecord::new(env.rank, env.local_rank, self.kind(), self.to_string(), self.exit_status());
        record.step = whereabouts::step();
        record.phase = Some(whereabouts::phase());
        record.unit = self.unit();
        // All ranks fail by it, and one has it.
        record.primary &= self.non_finite().and_then(NonFinite::rank).is_none_or(|rank| rank == env.rank);
        if let TrainError::Control(ControlError::BarrierTimeout { name, missing, .. }) = self {
            let (op, unit, missing) = (Op::Barrier.to_string(), name.clone(), missing.clone());
            record.collective =
                Some(Collective { op, unit, missing, entered: vec![env.rank], ..Collective::default() });
        }
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            // Most messages have their cause in them already, and libtorch's go on with a C++ stack.
            let text = cause.to_string().lines().next().unwrap_or_default().to_string();
            if !record.message.contains(&text) {
                record.causes.push(text);
            }
            source = cause.source();
        }
        record
    }
}
