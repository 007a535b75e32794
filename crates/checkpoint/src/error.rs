//! What can go wrong with model and checkpoint files.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::Dtype;

pub(crate) type Result<T> = std::result::Result<T, CheckpointError>;

/// Each variant names the file; its message says what was expected, what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot {op} {path}: {error}")]
    Io { op: &'static str, path: PathBuf, error: io::Error },

    #[error(
        "no space for {path}: {needed_bytes} bytes needed, {free_bytes} free ({error}); \
         free some space or choose another output.dir"
    )]
    NoSpace { path: PathBuf, needed_bytes: u64, free_bytes: u64, error: io::Error },

    #[error("{path} is not a model folder: {reason}")]
    NotAModel { path: PathBuf, reason: String },

    /// A safetensors file whose header cannot be trusted.
    #[error("{path} is not a valid safetensors file: {field}: {reason}")]
    Safetensors { path: PathBuf, field: String, reason: String },

    /// `model.safetensors.index.json` or `config.json`.
    #[error("{path}: {field}: {reason}")]
    Json { path: PathBuf, field: String, reason: String },

    #[error("{path}: tensor {tensor} is {got}; only F32, F16 and BF16 can be read, convert the model first")]
    UnsupportedDtype { path: PathBuf, tensor: String, got: String },

    /// The files do not hold the tensors of the model that is to be loaded.
    #[error("{path} does not fit the model: {problems}")]
    Mismatch { path: PathBuf, problems: String },

    #[error("{path}: tensor {tensor} has {numel} elements, elements {start}..{end} were asked for")]
    Range { path: PathBuf, tensor: String, start: usize, end: usize, numel: usize },

    #[error(
        "{path}: element {element} of tensor {tensor} is {value}, too large for {dtype}; \
         choose output.dtype = \"bf16\" or \"fp32\""
    )]
    Overflow { path: PathBuf, tensor: String, element: usize, value: f32, dtype: Dtype },

    #[error("{path} already exists and a checkpoint is never overwritten; move it away or resume from it")]
    Exists { path: PathBuf },

    /// The shards that ranks reported do not form one checkpoint.
    #[error("the shards of step {step} do not form a checkpoint: {reason}")]
    Reports { step: u64, reason: String },

    #[error("{path}: {field}: {reason}; this checkpoint cannot be used, take another")]
    Manifest { path: PathBuf, field: String, reason: String },

    #[error(
        "{path} has {got_bytes} bytes, the manifest says {expected_bytes}; \
         this checkpoint is damaged, take another"
    )]
    FileSize { path: PathBuf, expected_bytes: u64, got_bytes: u64 },

    #[error(
        "{path} is damaged in bytes {}..{} ({what}): digest {got}, expected {expected}; \
         take another checkpoint",
        bytes.start, bytes.end
    )]
    Digest { path: PathBuf, what: String, bytes: Range<u64>, expected: String, got: String },
}

impl CheckpointError {
    /// The files are not what was committed, and never will be again. Otherwise another try may succeed.
    pub fn is_damage(&self) -> bool {
        match self {
            CheckpointError::Manifest { .. } | CheckpointError::FileSize { .. } | CheckpointError::Digest { .. } => true,
            CheckpointError::Io { error, .. } => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// For `map_err`: an I/O error with what was tried and on which path.
    pub(crate) fn io(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| CheckpointError::Io { op, path: path.to_path_buf(), error }
    }

    /// For `map_err` on a write: a full disk or quota says how much was needed and how much is free.
    pub(crate) fn write(path: &Path, needed_bytes: u64) -> impl FnOnce(io::Error) -> Self {
        move |error| match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => CheckpointError::NoSpace {
                path: path.to_path_buf(),
                needed_bytes,
                free_bytes: crate::durable::free_bytes(path),
                error,
            },
            _ => CheckpointError::io("write", path)(error),
        }
    }
}

/// At most ten of the problems, one a line, and how many more there are.
pub(crate) fn summarize(problems: &[String]) -> String {
    const MAX_SHOWN: usize = 10;
    let mut text = problems[..problems.len().min(MAX_SHOWN)].join("\n  ");
    if problems.len() > 1 {
        text.insert_str(0, "\n  ");
    }
    if problems.len() > MAX_SHOWN {
        text.push_str(&format!("\n  and {} more", problems.len() - MAX_SHOWN));
    }
    text
}
