//! The output folder.

use std::path::Path;

use fsdp_checkpoint::{CheckpointError, sharded};
use fsdp_config::JobConfig;
use fsdp_control::error_file::Committed;
use fsdp_control::restarts::{Reached, finished_step};

use crate::failure::Failure;

pub fn create_dir(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir).map_err(|error| {
        Failure::bad_input(format!(
            "[output] dir: expected a folder that can be written, got {}: {error}; choose another one",
            dir.display()
        ))
    })
}

/// Writes what the workers read, whole or not at all.
pub fn write_resolved(config: &JobConfig, path: &Path) -> Result<(), Failure> {
    let temporary = path.with_extension("toml.tmp");
    std::fs::write(&temporary, config.to_toml())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| Failure::bad_input(format!("{}: cannot write the resolved config: {error}", path.display())))
}

/// The newest committed checkpoint.
pub fn newest_checkpoint(dir: &Path) -> Result<Option<Committed>, CheckpointError> {
    let newest = sharded::list(&dir.join("checkpoints"))?.pop();
    Ok(newest.map(|(step, path)| Committed { step, path }))
}

/// How far the run has come. What cannot be read has not been reached.
pub fn reached(dir: &Path) -> Reached {
    let checkpoint_step = newest_checkpoint(dir).ok().flatten().map_or(0, |committed| committed.step);
    Reached { checkpoint_step, finished_step: finished_step(&dir.join("metrics.jsonl")) }
}
