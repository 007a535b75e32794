//! A job's config -> what data to read.

use std::path::PathBuf;

use fsdp_config::JobConfig;

use crate::{DataSpec, Format};

impl DataSpec {
    /// The training data of `config` for a model with `vocab_size` embedding rows.
    pub fn for_training(config: &JobConfig, vocab_size: usize) -> Self {
        Self::for_files(config, config.data.train.clone(), config.data.shuffle, vocab_size)
    }

    /// The validation data, in file order; `None` if there is none.
    pub fn for_validation(config: &JobConfig, vocab_size: usize) -> Option<Self> {
        let validation = config.validation.as_ref().filter(|v| !v.data.is_empty())?;
        Some(Self::for_files(config, validation.data.clone(), false, vocab_size))
    }

    fn for_files(config: &JobConfig, files: Vec<PathBuf>, shuffle: bool, vocab_size: usize) -> Self {
        DataSpec {
            files,
            format: config.data.format.into(),
            tokenizer_dir: Some(PathBuf::from(&config.model.path)),
            vocab_size,
            seq_len: config.training.seq_len as usize,
            shuffle,
            seed: config.training.seed,
        }
    }
}

impl From<fsdp_config::Format> for Format {
    fn from(format: fsdp_config::Format) -> Self {
        match format {
            fsdp_config::Format::Auto => Format::Auto,
            fsdp_config::Format::Tokens => Format::Tokens,
            fsdp_config::Format::Text => Format::Text,
            fsdp_config::Format::Completion => Format::Completion,
            fsdp_config::Format::Alpaca => Format::Alpaca,
        }
    }
}
