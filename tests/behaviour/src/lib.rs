//! How the built binaries behave, seen from outside: what they refuse, what they survive, what they leave behind.
//!
//! The tests start the real `fsdp-launch` that lies in the same target folder.
//!
//! - [`model`]: tiny model folders.
//! - [`job`]: a folder with all that a job needs, one run of it, and what it left behind.
//! - [`processes`]: the ranks of a run, and who is left of them.
//! - [`slurm`]: a real SLURM of two nodes, and jobs on it.

#![forbid(unsafe_code)]

pub mod job;
pub mod model;
pub mod processes;
pub mod slurm;
