//! The one error type of this crate.

use std::io;
use std::path::PathBuf;

/// Why a config was refused.
///
/// `at` is a place the user can go to: `file:line:col`, the file alone, or the `--set` flag as typed. `key` is
/// `[table] key`. The text of every variant is complete: nothing needs to be added when it is printed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: expected a readable TOML config, got an error: {source}; check the path", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("{at}: expected valid TOML, got a syntax error: {message}")]
    Syntax { at: String, message: String },

    #[error("{flag}: expected --set table.key=value, got {got}")]
    Flag { flag: String, got: String },

    #[error("{at}: {key}: expected {expected}, got {got}{}", Hint(hint))]
    Value { at: String, key: String, expected: String, got: String, hint: String },

    #[error("{at}: {key}: expected {expected}, got an unknown name{}", Hint(hint))]
    Unknown { at: String, key: String, expected: String, hint: String },

    #[error("{at}: {key}: expected {available}, got {value}, which is not built yet; use {available}")]
    NotBuilt { at: String, key: String, value: String, available: String },

    #[error(
        "[training] global_batch_size: expected a multiple of micro_batch_size x ranks = {micro_batch_size} x \
         {world_size} = {}, got {global_batch_size}; change one of the three",
        micro_batch_size * world_size
    )]
    GlobalBatch { global_batch_size: u64, micro_batch_size: u64, world_size: u64 },

    #[error(
        "the checkpoint was trained with {global_batch_size} sequences a step, which do not divide evenly into microbatches \
         of {micro_batch_size} on {world_size} ranks; start a number of ranks that divides {}",
        global_batch_size / micro_batch_size
    )]
    KeepGlobalBatch { global_batch_size: u64, micro_batch_size: u64, world_size: u64 },

    #[error(
        "[fsdp] shard_size: expected a divisor of the {world_size} ranks, got {shard_size}{}; set it, or start another \
         number of ranks",
        if *.is_default { " (the ranks of a node, which is the default)" } else { "" }
    )]
    ShardSize { shard_size: u64, world_size: u64, is_default: bool },
}

/// The part of a message that says what to do; nothing where there is nothing to say.
struct Hint<'a>(&'a str);

impl std::fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            "" => Ok(()),
            hint => write!(f, "; {hint}"),
        }
    }
}
