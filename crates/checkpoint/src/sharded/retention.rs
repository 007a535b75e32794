//! Which checkpoints there are, and which go.
//!
//! Names under the root: `step-XXXXXXXX` committed, `step-XXXXXXXX.tmp-<save_id>` being written,
//! `.trash-step-XXXXXXXX` being deleted, `step-XXXXXXXX.damaged-N` set aside. Nothing else is touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{CheckpointError, Result};

const TRASH: &str = ".trash-";

pub(super) fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

pub(super) fn temp_name(step: u64, save_id: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    assert!(!save_id.is_empty() && save_id.bytes().all(plain), "save_id {save_id:?} cannot be a file name");
    format!("{}.tmp-{save_id}", dir_name(step))
}

/// The step of a committed checkpoint's folder name.
pub(super) fn parse_dir_name(name: &str) -> Option<u64> {
    let step: u64 = name.strip_prefix("step-")?.parse().ok()?;
    (dir_name(step) == name).then_some(step)
}

/// Committed checkpoints, oldest step first. A root that does not exist has none.
pub fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> =
        names(root)?.into_iter().filter_map(|name| Some((parse_dir_name(&name)?, root.join(name)))).collect();
    found.sort();
    Ok(found)
}

/// Removes what a failed save left of its own.
pub fn abort(root: &Path, step: u64, save_id: &str) -> Result<()> {
    durable::remove_dir_all(&root.join(temp_name(step, save_id)))
}

/// Removes what earlier runs left unfinished: saves that were not committed, deletions that were interrupted.
/// Only while no save is in flight. Returns what was removed.
pub fn sweep(root: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for name in names(root)? {
        let unfinished = name.split_once(".tmp-").map(|(step, _)| step).or_else(|| name.strip_prefix(TRASH));
        if unfinished.is_some_and(|step| parse_dir_name(step).is_some()) {
            durable::remove_dir_all(&root.join(&name))?;
            removed.push(root.join(name));
        }
    }
    Ok(removed)
}

/// Deletes all but the `keep` newest checkpoints; returns the deleted ones. Call it after a commit. A checkpoint
/// first gets a trash name, so a kill at any moment leaves nothing that looks whole and is not.
///
/// # Panics
/// If `keep` is 0.
pub fn retain(root: &Path, keep: usize, keep_every: u64) -> Result<Vec<PathBuf>> {
    assert!(keep > 0, "at least one checkpoint is kept");
    let all = list(root)?;
    let mut deleted = Vec::new();
    for (step, path) in all.iter().take(all.len().saturating_sub(keep)) {
        if keep_every > 0 && step.is_multiple_of(keep_every) {
            continue;
        }
        let trash = root.join(format!("{TRASH}{}", dir_name(*step)));
        durable::remove_dir_all(&trash)?;
        durable::rename(path, &trash)?;
        durable::sync_dir(root)?;
        durable::remove_dir_all(&trash)?;
        deleted.push(path.clone());
    }
    Ok(deleted)
}

/// Before a save: whether the file system has room for all ranks' files and a twentieth more.
pub fn check_space(root: &Path, total_bytes: u64) -> Result<()> {
    durable::create_dir_all(root)?;
    let (needed_bytes, free_bytes) = (total_bytes + total_bytes / 20, durable::free_bytes(&root.join("x")));
    if free_bytes >= needed_bytes {
        return Ok(());
    }
    let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
    Err(CheckpointError::NoSpace { path: root.to_path_buf(), needed_bytes, free_bytes, error })
}

/// Renames a damaged checkpoint to `step-XXXXXXXX.damaged-N`, so that the run can save that step again, and
/// so that it does not count as one of the newest. Returns the new path.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().expect("a checkpoint folder has a name").to_string_lossy();
    let free = (1..)
        .map(|n| path.with_file_name(format!("{name}.damaged-{n}")))
        .find(|target| target.symlink_metadata().is_err())
        .expect("some number is free");
    durable::rename(path, &free)?;
    durable::sync_dir(&durable::parent(path))?;
    Ok(free)
}

/// Names in the root that are text (ours all are).
fn names(root: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("list", root)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", root))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}
