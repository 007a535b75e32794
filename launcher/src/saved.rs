//! Which checkpoint a path on the command line means, and whether it is whole.

use std::path::{Path, PathBuf};

use fsdp_checkpoint::CheckpointError;
use fsdp_checkpoint::sharded::{self, Checkpoint, Manifest};

use crate::failure::Failure;
use crate::live_line::LiveLine;

/// What is at the path.
#[derive(Debug)]
pub enum Saved {
    /// A checkpoint's own folder.
    One(PathBuf),
    /// A folder with checkpoints in it: at least one.
    Root(PathBuf),
}

/// # Errors
/// Nothing of a checkpoint is there.
pub fn locate(path: &Path) -> Result<Saved, Failure> {
    let refused = |reason: String| {
        Failure::bad_input(format!(
            "{}: expected a checkpoint such as out/checkpoints/step-00000010, an output folder or its checkpoints folder, \
             got {reason}",
            path.display()
        ))
    };
    if !path.is_dir() {
        return Err(refused(if path.exists() { "a file" } else { "no such folder" }.to_owned()));
    }
    if path.join("manifest.json").exists() {
        return Ok(Saved::One(path.to_owned()));
    }
    for root in [path.join("checkpoints"), path.to_owned()] {
        if !sharded::list(&root).map_err(Failure::bad_input)?.is_empty() {
            return Ok(Saved::Root(root));
        }
    }
    let is_inside = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
    Err(refused(if is_inside {
        "a folder without manifest.json, so it was never committed or is damaged; take another".to_owned()
    } else {
        "a folder without any".to_owned()
    }))
}

/// The checkpoint that the path means, verified in full: of several the newest that is whole, and a line says which.
///
/// # Errors
/// None is there, or it is damaged: the message names file, tensor and bytes.
pub fn open_verified(path: &Path) -> Result<Checkpoint, Failure> {
    let open = |dir: &Path| -> Result<Checkpoint, CheckpointError> {
        let checkpoint = Checkpoint::open_unread(dir)?;
        verify(&checkpoint)?;
        Ok(checkpoint)
    };
    let root = match locate(path)? {
        Saved::One(dir) => return open(&dir).map_err(Failure::bad_input),
        Saved::Root(root) => root,
    };
    for (_, dir) in sharded::list(&root).map_err(Failure::bad_input)?.into_iter().rev() {
        match open(&dir) {
            Ok(checkpoint) => {
                crate::say(&format!("{} is the newest whole checkpoint", dir.display()));
                return Ok(checkpoint);
            }
            Err(error) if error.is_damage() => {
                crate::say(&format!("{} is damaged and not used: {error}", dir.display()));
            }
            Err(error) => return Err(Failure::bad_input(error)),
        }
    }
    Err(Failure::bad_input(format!("no checkpoint under {} is whole", root.display())))
}

/// Compares every digest of the checkpoint.
///
/// # Errors
/// The first file, tensor and byte range that is damaged.
pub fn verify(checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    let manifest = checkpoint.manifest();
    let mut line = LiveLine::new(format!("verifying step {}", manifest.step), len_bytes(manifest));
    for (i, file) in manifest.files.iter().enumerate() {
        checkpoint.verify_file(i)?;
        line.add(file.len_bytes);
    }
    Ok(())
}

/// Of all the checkpoint's files but the manifest.
pub fn len_bytes(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|file| file.len_bytes).sum()
}
