//! Process groups: the collectives between the ranks of a run, on tensors.
//!
//! - [`ProcessGroup`] (`process_group.rs`): what a rank calls, the same for every back end.
//! - [`shm`]: processes of one host over shared memory. [`nccl`]: a GPU each. [`mpi`]: hosts under an MPI, on the CPU.
//!   [`staged`]: tensors on a device, over `shm` or `mpi`.
//! - `check.rs`, `memory.rs`, `flight.rs`: what back ends share: checks of arguments, buffers' memory, the record of calls.
//! - `sum.rs`: the loops that add up what ranks contribute, on hosts.
//! - [`CommError`], [`Call`] (`error.rs`): what fails, naming ranks and calls.
//!
//! Two kinds of collectives. Those on **buffers** ([`GatherBuffer`], [`ReduceBuffer`]) carry parameters and gradients: the
//! group allocates the buffers once, so that a back end can share or register them, and nothing is copied that need not
//! be. Those on **plain tensors** ([`ProcessGroup::all_reduce`] and others) carry the rest.
//!
//! All ranks make the same calls in the same order. The one liberty, of host back ends: starts on *different* buffers may
//! change places, so that a rank may begin a gather early or late by [`ProcessGroup::try_begin_write`]. After an error the
//! group is of no more use, because ranks no longer agree on where they are.
//!
//! **Order on GPUs.** The host issues work and does not wait for it; collectives run in streams of their own. Every edge
//! between streams is an event, and a slot or gradient buffer changes hands only through one. The calls below place the
//! events, so a caller that keeps to their order needs none of its own; [`nccl`] lists them, and a test proves from their
//! order that no buffer is written before its last reader is done.
//!
//! Sums have a fixed order on hosts: rank 0 first, then rank 1, and so on. The same inputs give the same bits, on every
//! rank. On GPUs the order is NCCL's, which depends on the ranks' places and the sizes.

mod check;
mod error;
mod flight;
mod memory;
pub mod mpi;
pub mod nccl;
mod process_group;
pub mod shm;
pub mod staged;
mod sum;

pub use error::{Call, CommError, Phase};
pub use nccl::LaneGuard;
pub use process_group::{GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp, Segment, Work};
