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
//!
//! Functions that write exist twice: `sweep` works on the file system of the machine, `sweep_on` on any
//! [`FileSystem`](crate::fs::FileSystem).

use std::path::{Path, PathBuf};

mod manifest;
mod reader;
mod retention;
mod verify;
mod writer;

use crate::error::Result;
use crate::fs::Disk;

pub use manifest::{ChunkEntry, FileEntry, Manifest, ManifestMeta, State};
pub use reader::{Checkpoint, Newest, Skipped, newest_valid};
pub use retention::{abort_on, check_space_on, list_on, retain_on, set_aside_on, sweep_on};
pub use writer::{Chunk, ShardReport, ShardWriter, commit_on};

/// Refuses a save of `total_bytes`, of all ranks together, for which there is too little space under `root` with 5 % to
/// spare. Only before any rank creates its file, as what is reserved is no longer free.
///
/// # Errors
/// [`NoSpace`](crate::CheckpointError::NoSpace); or the free space cannot be asked for.
pub fn check_space(root: &Path, total_bytes: u64) -> Result<()> {
    check_space_on(&Disk, root, total_bytes)
}

/// Rank 0, with the report of every rank: writes the manifest and gives the folder its final name, which it returns.
///
/// # Errors
/// Reports of another save, a rank missing or twice, pieces that do not cover every tensor exactly once; a failed
/// write. Call [`abort`] then.
pub fn commit(root: &Path, step: u64, save_id: &str, reports: &[ShardReport], meta: ManifestMeta) -> Result<PathBuf> {
    commit_on(&Disk, root, step, save_id, reports, meta)
}

/// Removes what a failed save left of its own.
pub fn abort(root: &Path, step: u64, save_id: &str) -> Result<()> {
    abort_on(&Disk, root, step, save_id)
}

/// Committed checkpoints, oldest step first. A root that does not exist has none.
pub fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    list_on(&Disk, root)
}

/// Deletes checkpoints that are neither among the `keep` newest nor of a multiple of `keep_every` steps (0: of none);
/// returns the deleted ones. Call it after a commit. A checkpoint first gets a trash name, so that a kill at any moment
/// leaves nothing that looks whole and is not.
///
/// # Errors
/// Of the first deletion that failed; the others were done all the same. The next call tries again what is left.
///
/// # Panics
/// If `keep` is 0.
pub fn retain(root: &Path, keep: usize, keep_every: u64) -> Result<Vec<PathBuf>> {
    retain_on(&Disk, root, keep, keep_every)
}

/// Removes what earlier runs left unfinished: saves that were not committed, deletions that were interrupted.
/// Only while no save is in flight. Returns what was removed.
pub fn sweep(root: &Path) -> Result<Vec<PathBuf>> {
    sweep_on(&Disk, root)
}

/// Renames a damaged checkpoint to `step-XXXXXXXX.damaged-N`, so that the run can save that step again, and
/// so that it does not count as one of the newest. Returns the new path.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    set_aside_on(&Disk, path)
}
