//! The output folder before the run.

use std::path::Path;

use fsdp_config::JobConfig;

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
