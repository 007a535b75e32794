//! Resumable checkpoints: `checkpoints/step-00000010/` with one safetensors file per rank and a manifest.
//!
//! ```text
//! step-00000010/
//!   rank-00000-of-00002.safetensors   flat f32 pieces of logical (unpadded) tensors
//!   rank-00001-of-00002.safetensors
//!   manifest.json                     step, trainer state, files and pieces with their digests
//! ```
//!
//! A save goes to `step-00000010.tmp-<save_id>`. Each rank streams its pieces through a [`ShardWriter`] and sends its
//! [`ShardReport`] to rank 0, whose [`commit`] writes the manifest and renames the folder: the rename is the commit.
//! A folder under its final name is complete, or was damaged later, which the digests show.
//!
//! Loading reads any interval of any tensor, whatever the world size that saved it.

mod manifest;
mod reader;
mod retention;
mod writer;

pub use manifest::{ChunkEntry, FileEntry, Manifest, ManifestMeta, State};
pub use reader::{Checkpoint, Newest, Skipped, newest_valid};
pub use retention::{abort, check_space, list, retain, set_aside, sweep};
pub use writer::{Chunk, ShardReport, ShardWriter, commit};
