//! Fully sharded data parallel: the engine that executes a step program on tensors.
//!
//! Layout:
//! - [`engine`]: one rank's engine; walks the program.
//! - `collectives`: gathers and reductions of a program.
//! - `pass`: the computations of a program, and what travels through it.
//! - `exchange`: small values between ranks, for the host.
//! - [`groups`]: all ranks, those that share a unit's shards, and those with the same shard.
//! - [`mod@unit`]: a unit's shards and its views into slot and gradient buffer: unshard, reduce.
//! - `update`: the end of a step: loss, gradient norm, and the update of the shards.
//! - [`optimizer`]: AdamW over the shards; [`offload`]: with its state in the host's memory.
//! - [`state`]: the training state by pieces of parameters, and the account of memory.
//! - [`snapshot`]: the state of one moment, for a checkpoint.
//! - [`scaler`]: the dynamic loss scale for fp16.
//! - [`init`]: random weights that depend on seed and name only.
//! - [`timeline`]: what happened when in the steps that are traced.
//! - [`non_finite`]: where a NaN or infinity first appears.
#![forbid(unsafe_code)]

mod collectives;
pub mod engine;
mod exchange;
pub mod groups;
pub mod init;
pub mod non_finite;
pub mod offload;
pub mod optimizer;
mod pass;
pub mod scaler;
pub mod snapshot;
pub mod state;
pub mod timeline;
pub mod unit;
mod update;

pub use engine::{Engine, EngineConfig, Pace, StartedStep, StepReport};
pub use groups::Groups;
pub use non_finite::{NonFinite, Sequences};
pub use optimizer::AdamWConfig;
pub use pass::MicroBatch;
pub use scaler::LossScaler;
pub use snapshot::Snapshot;
pub use state::{Piece, Place, StateKind};
pub use timeline::{Lane, Span};

use fsdp_comm::CommError;
use fsdp_model::ModelError;
use tch::TchError;

/// What can end a step: collectives, libtorch, or the numbers themselves.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("libtorch: {}", fsdp_model::first_line(.0))]
    Tch(#[from] TchError),
    #[error(transparent)]
    Torch(#[from] fsdp_torch_ext::TorchError),
    #[error(
        "no token of the whole batch has a label (all are -100): there is no loss; check the data's labels and [training] seq_len"
    )]
    NoValidToken,
    #[error("{0}; the weights are unchanged")]
    NonFinite(NonFinite),
}
