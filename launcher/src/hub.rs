//! `[model] path` as the name of a model on the Hugging Face Hub: `org/name`, or `org/name@revision`.
//!
//! Its files come into the cache that other programs use too, and the config gets the folder of the snapshot there, so
//! that nothing after this knows of the Hub. A run that continues a checkpoint stays with the checkpoint's snapshot.

use std::fs;
use std::path::{Path, PathBuf};

use fsdp_checkpoint::sharded::{self, Manifest};
use fsdp_config::{Init, JobConfig, Resume};
use hf_hub::Repo;

use crate::download::{Hub, first_missing};
use crate::failure::Failure;

/// What of a model the caller is going to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// `config.json` alone.
    Config,
    /// What a run needs.
    Everything,
}

/// Where `[model] path` is no folder but may be a model's name, downloads what is `wanted` of it and is not in the cache,
/// and makes the path that of the snapshot's folder. Leaves all other paths as they are.
///
/// # Errors
/// The Hub does not have the model or does not give it, or it cannot be reached and the cache lacks a file.
pub fn resolve(config: &mut JobConfig, wanted: Wanted) -> Result<(), Failure> {
    if Path::new(&config.model.path).symlink_metadata().is_ok() {
        return Ok(());
    }
    let Some(name) = Name::parse(&config.model.path) else { return Ok(()) };
    let saved = if name.revision.is_none() { saved_snapshot(config, &name) } else { None };
    let with_weights = wanted == Wanted::Everything && config.model.init == Init::Pretrained;
    let folder = match saved {
        Some(folder) if first_missing(&folder, with_weights).is_none() => folder,
        saved => {
            let commit = saved.and_then(|folder| Some(folder.file_name()?.to_str()?.to_owned()));
            let revision = commit.or(name.revision).unwrap_or_else(|| "main".to_owned());
            Hub::from_env(name.id, revision)?.snapshot(wanted, with_weights)?
        }
    };
    config.model.path = folder.into_os_string().into_string().map_err(|folder| {
        Failure::bad_input(format!("HF_HOME: expected a path in UTF-8, got a cache with {folder:?}; set another one"))
    })?;
    Ok(())
}

/// A model's name on the Hub.
#[derive(Debug, PartialEq, Eq)]
struct Name {
    /// `org/name`, or `name` for a few old ones.
    id: String,
    /// Branch, tag or commit.
    revision: Option<String>,
}

impl Name {
    /// `None` for what the Hub does not allow as a name.
    fn parse(path: &str) -> Option<Self> {
        let (id, revision) = match path.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (path, None),
        };
        let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        let is_part = |part: &str| {
            !part.is_empty()
                && is_plain(part)
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
        };
        let is_id = id.split('/').count() <= 2 && id.split('/').all(is_part);
        let is_revision = revision.is_none_or(|revision| {
            revision.split('/').all(|part| !part.is_empty() && is_plain(part) && !part.starts_with('.'))
        });
        (is_id && is_revision).then(|| Self { id: id.to_owned(), revision: revision.map(str::to_owned) })
    }
}

/// The snapshot of the model that the checkpoint to continue was made with, which may not be here any more.
fn saved_snapshot(config: &JobConfig, name: &Name) -> Option<PathBuf> {
    let checkpoint = match &config.checkpoint.resume {
        Resume::Path(path) => path.clone(),
        Resume::Auto => sharded::list(&config.output.dir.join("checkpoints")).ok()?.pop()?.1,
        Resume::Never => return None,
    };
    let path = checkpoint.join("manifest.json");
    // What is wrong with it, is said where the checkpoint is checked.
    let manifest = Manifest::parse(&fs::read_to_string(&path).ok()?, &path).ok()?;
    let saved = JobConfig::parse("saved config", &manifest.meta.config).ok()?;
    let folder = PathBuf::from(saved.model.path);
    let snapshots = Path::new(&Repo::model(name.id.clone()).folder_name()).join("snapshots");
    folder.parent()?.ends_with(snapshots).then_some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_the_hub_allows() {
        for (path, expected) in [
            ("meta-llama/Llama-3.2-1B", Some(("meta-llama/Llama-3.2-1B", None))),
            ("gpt2", Some(("gpt2", None))),
            ("org/name@refs/pr/1", Some(("org/name", Some("refs/pr/1")))),
            ("org/name@v1.0", Some(("org/name", Some("v1.0")))),
            ("org/name@", None),
            ("org/name@../x", None),
            ("./models/tiny", None),
            ("../tiny", None),
            ("~/tiny", None),
            ("/models", None),
            ("models/", None),
            ("a/b/c", None),
            ("a b/c", None),
            ("a/..", None),
            ("", None),
        ] {
            let name = Name::parse(path);
            let got = name.as_ref().map(|name| (name.id.as_str(), name.revision.as_deref()));
            assert_eq!(got, expected, "{path:?}");
        }
    }
}
