//! Model and checkpoint files as byte ranges: no tensor library, no pickle, no panic on any input.
//!
//! Every rank reads and writes only its own elements, through positioned reads and writes, so nothing is
//! gathered anywhere and any world size can load what any other saved.
//!
//! | module | what it is |
//! |---|---|
//! | [`hf_folder`] | reads a Hugging Face model folder: headers once, then exactly the elements asked for |
//! | [`export`] | writes one: all ranks write their ranges of the same files, rank 0 renames the folder |
//! | [`sharded`] | resumable checkpoints: one file per rank, a manifest with digests, commit by rename |
//! | [`error`] | what can go wrong, and what to do about it |
//! | [`fs`] | the file system calls behind everything that is written, which tests replace |
//! | [`header`] | the safetensors header: hostile input refused, written in a fixed order |
//! | `elements` | f32 values to and from little-endian F32, F16, BF16 bytes, through a bounded buffer |
//! | `faults` | with the feature of that name: a file system that loses power, one that fails, damaged checkpoints |
//! | `shape` | shapes whose elements can be counted |
//! | `durable` | space reserved first, fsync, rename |
//! | `unique_map` | JSON objects with repeated keys refused |
#![forbid(unsafe_code)]

mod durable;
mod elements;
pub mod error;
pub mod export;
#[cfg(feature = "faults")]
pub mod faults;
pub mod fs;
pub mod header;
pub mod hf_folder;
mod shape;
pub mod sharded;
mod unique_map;

pub use elements::Dtype;
pub use error::CheckpointError;
