//! Process groups: the collectives between the ranks of a run, on tensors.
//!
//! - [`ProcessGroup`] (`process_group.rs`): what a rank calls, the same for every back end.
//! - `shm/`: processes of one host over shared memory.
//! - `sum.rs`: the loops that add up what ranks contribute.
//! - [`CommError`], [`Call`] (`error.rs`): what fails, naming ranks and calls.
//!
//! Two kinds of collectives. Those on **buffers** ([`GatherBuffer`], [`ReduceBuffer`]) carry parameters and gradients: the
//! group allocates the buffers once, so that a back end can share or register them, and nothing is copied that need not
//! be. Those on **plain tensors** ([`ProcessGroup::all_reduce`] and others) carry the rest.
//!
//! All ranks make the same calls in the same order. The one liberty: starts on *different* buffers may change places, so
//! that a rank may begin a gather early or late by [`ProcessGroup::try_begin_write`]. After an error the group is of no
//! more use, because ranks no longer agree on where they are.
//!
//! Sums have a fixed order: rank 0 first, then rank 1, and so on. The same inputs give the same bits, on every rank.

mod error;
mod process_group;
pub mod shm;
mod sum;

pub use error::{Call, CommError, Phase};
pub use process_group::{ProcessGroup, ReduceOp, Segment, Work};
pub use shm::{GatherBuffer, ReduceBuffer};
