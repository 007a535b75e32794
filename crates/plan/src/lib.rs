//! The plan of a training job, made without tensors: what a model consists of, where every parameter lies in
//! memory, and which steps a training step runs.
//!
//! A pure chain of functions, each in a file of its own:
//!
//! - [`arch`]: `config.json` -> [`Architecture`]: the sizes and options of a decoder family.
//! - [`units`]: [`Architecture`] -> [`Unit`]s: embedding, blocks, head; their named, shaped parameters.
//! - [`layout`]: a unit's parameters -> flat [`Group`]s padded to the world size, and each rank's shard of them.
//! - [`slots`]: units -> few buffers that hold unsharded parameters and gradients, by a static map.
//! - [`program`]: units and slots -> the flat list of [`Step`]s that the engine executes.
//! - [`replay`]: the same list over byte counts -> peak memory by category, bytes moved, operations.
//! - [`costs`]: the formulas for that: what the computations of a unit hold and execute.
//! - [`plan`]: all of the above for one job, and its text form; `job` makes it from the job's config.
//!
//! **Architecture invariant:** nothing here knows tensors or processes.
#![forbid(unsafe_code)]

pub mod arch;
pub mod costs;
mod dtype;
mod job;
pub mod layout;
pub mod plan;
pub mod program;
pub mod replay;
pub mod slots;
pub mod units;

pub use arch::{Architecture, Family, PlanError, RopeScaling};
pub use dtype::Dtype;
pub use fsdp_config::Offload;
pub use layout::{Group, PlacedParam, UnitLayout};
pub use plan::{DeviceKind, Plan, PlanInput};
pub use program::{Keep, Step, UnitId};
pub use replay::{Memory, Replay};
pub use slots::{SlotMap, Strategy};
pub use units::{Init, Param, Unit, UnitKind};
