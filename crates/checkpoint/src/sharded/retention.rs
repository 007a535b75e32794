//! Which checkpoints there are, and which go.
//!
//! Names under the root: `step-XXXXXXXX` committed, `step-XXXXXXXX.tmp-<save_id>` being written,
//! `.trash-step-XXXXXXXX` being deleted, `step-XXXXXXXX.damaged-N` set aside. Nothing else is touched.

use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{CheckpointError, Result};
use crate::fs::FileSystem;

const TEMP: &str = ".tmp-";
const TRASH: &str = ".trash-";

pub(super) fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

pub(super) fn temp_name(step: u64, save_id: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    assert!(!save_id.is_empty() && save_id.bytes().all(plain), "save_id {save_id:?} cannot be a file name");
    format!("{}{TEMP}{save_id}", dir_name(step))
}

/// The step of a committed checkpoint's folder name.
pub(super) fn parse_dir_name(name: &str) -> Option<u64> {
    let step: u64 = name.strip_prefix("step-")?.parse().ok()?;
    (dir_name(step) == name).then_some(step)
}

/// See [`list`](super::list).
pub fn list_on<F: FileSystem>(fs: &F, root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let names = names(fs, root)?;
    let mut found: Vec<(u64, PathBuf)> =
        names.into_iter().filter_map(|name| Some((parse_dir_name(&name)?, root.join(name)))).collect();
    found.sort();
    Ok(found)
}

/// See [`abort`](super::abort).
pub fn abort_on<F: FileSystem>(fs: &F, root: &Path, step: u64, save_id: &str) -> Result<()> {
    durable::remove_dir_all(fs, &root.join(temp_name(step, save_id)))
}

/// See [`sweep`](super::sweep).
pub fn sweep_on<F: FileSystem>(fs: &F, root: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for name in names(fs, root)? {
        let is_unfinished = name.split_once(TEMP).is_some_and(|(step, _)| parse_dir_name(step).is_some());
        if is_unfinished || is_trash(&name) {
            durable::remove_dir_all(fs, &root.join(&name))?;
            removed.push(root.join(name));
        }
    }
    Ok(removed)
}

/// See [`retain`](super::retain).
pub fn retain_on<F: FileSystem>(fs: &F, root: &Path, keep: usize, keep_every: u64) -> Result<Vec<PathBuf>> {
    assert!(keep > 0, "at least one checkpoint is kept");
    let mut failed = Ok(());
    // Deletions that failed or were interrupted.
    for name in names(fs, root)?.iter().filter(|name| is_trash(name)) {
        failed = failed.and(durable::remove_dir_all(fs, &root.join(name)));
    }
    let all = list_on(fs, root)?;
    let num_old = all.len().saturating_sub(keep);
    let is_milestone = |step: u64| keep_every > 0 && step.is_multiple_of(keep_every);
    let mut deleted = Vec::new();
    for (step, path) in all.into_iter().take(num_old).filter(|(step, _)| !is_milestone(*step)) {
        match delete(fs, root, step, &path) {
            Ok(()) => deleted.push(path),
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed.map(|()| deleted)
}

fn delete<F: FileSystem>(fs: &F, root: &Path, step: u64, path: &Path) -> Result<()> {
    let trash = root.join(format!("{TRASH}{}", dir_name(step)));
    durable::rename(fs, path, &trash)?;
    // Else a power loss could keep the name and lose files.
    durable::sync_dir(fs, root)?;
    durable::remove_dir_all(fs, &trash)
}

/// See [`set_aside`](super::set_aside).
pub fn set_aside_on<F: FileSystem>(fs: &F, path: &Path) -> Result<PathBuf> {
    let name = path.file_name().expect("a checkpoint folder has a name").to_string_lossy();
    let mut number = 1;
    let free = loop {
        let target = path.with_file_name(format!("{name}.damaged-{number}"));
        if !durable::exists(fs, &target)? {
            break target;
        }
        number += 1;
    };
    // Not fsynced: if the old name comes back after a power loss, the damage is found again.
    durable::rename(fs, path, &free)?;
    Ok(free)
}

/// See [`check_space`](super::check_space).
pub fn check_space_on<F: FileSystem>(fs: &F, root: &Path, total_bytes: u64) -> Result<()> {
    const MARGIN_PERCENT: u64 = 5;
    let mut dir = root.to_path_buf();
    while !durable::exists(fs, &dir)? && durable::parent(&dir) != dir {
        dir = durable::parent(&dir);
    }
    let free_bytes = fs.free_bytes(&dir).map_err(CheckpointError::io("ask for the free space of", &dir))?;
    let needed_bytes = total_bytes.saturating_add(total_bytes / 100 * MARGIN_PERCENT);
    match free_bytes {
        Some(free) if free < needed_bytes => {
            let error = rustix::io::Errno::NOSPC.into();
            Err(CheckpointError::NoSpace { path: root.to_path_buf(), needed_bytes, free_bytes, error })
        }
        _ => Ok(()),
    }
}

fn is_trash(name: &str) -> bool {
    name.strip_prefix(TRASH).is_some_and(|step| parse_dir_name(step).is_some())
}

/// Names in the root that are text (ours all are).
fn names<F: FileSystem>(fs: &F, root: &Path) -> Result<Vec<String>> {
    let entries = durable::unless_missing(fs.list(root)).map_err(CheckpointError::io("list", root))?;
    Ok(entries.into_iter().flatten().filter_map(|entry| entry.name.into_string().ok()).collect())
}
