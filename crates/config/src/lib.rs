//! The job config: TOML in, a validated [`JobConfig`] out.
//!
//! There is one door from what a user typed to what the program uses: [`JobConfig::load`]. Every key is known, has
//! the right type, lies in its range and belongs to a feature that is built, or loading fails with one message that
//! says where, which key, what was expected, what was found and what to do.
//!
//! Layout, in the order in which a config passes through:
//!
//! - `raw`: the file and the `--set` flags as one tree of values, each with the place it came from
//! - `names`: every table and key there is, and what other tools call them; finds unknown keys
//! - `section`: takes typed, checked values out of one table
//! - `read`: the tables, key by key, with their defaults
//! - `job`: the validated types
//! - `write`: a validated config as TOML again
//! - `resume`: which keys may differ from the config that a checkpoint was made with
//! - `lr_scheduler`: the learning rate of a step
//! - `glob`: the patterns of `[[precision.override]]`
//! - `error`: the one error type
//!
//! The crate knows nothing of tensors, ranks or files other than the config itself.

#![forbid(unsafe_code)]

mod error;
mod glob;
mod job;
mod lr_scheduler;
mod names;
mod raw;
mod read;
mod resume;
mod section;
mod write;

pub use error::ConfigError;
pub use glob::glob_match;
pub use job::*;
pub use lr_scheduler::{LrKind, LrScheduler, Portion};
pub use resume::{Difference, compatible_for_resume};
