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
    #[error("cannot {op} {path}: {error}{detail}")]
    Io {
        op: &'static str,
        path: PathBuf,
        error: io::Error,
        /// Of a write: bytes needed and free. Else empty.
        detail: String,
    },

    #[error(
        "no space for {path}: {needed_bytes} bytes needed, {} free ({error}); \
         free some space or choose another output.dir",
        known(.free_bytes)
    )]
    NoSpace {
        path: PathBuf,
        needed_bytes: u64,
        /// `None` where the file system cannot tell.
        free_bytes: Option<u64>,
        error: io::Error,
    },

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

    #[error(
        "{path} is of format version {got}, but this program reads version {supported}; \
         use the program that wrote it, or a newer one"
    )]
    Version { path: PathBuf, got: u64, supported: u32 },

    #[error("{path} is missing, or no regular file; this checkpoint is damaged, take another")]
    Missing { path: PathBuf },

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
    /// Whether a checkpoint was found to be damaged, so that an older one is the better choice: a file is missing, of
    /// another size or content, or contradicts another. Never so for what may pass (an I/O error) or what is whole (a
    /// checkpoint of another model or of a newer program).
    pub fn is_damage(&self) -> bool {
        use CheckpointError::{Digest, FileSize, Manifest, Missing};
        matches!(self, Digest { .. } | FileSize { .. } | Manifest { .. } | Missing { .. })
    }

    /// Whether a file or folder was not there. On a network file system what another node has just written appears
    /// within seconds.
    pub fn is_missing(&self) -> bool {
        match self {
            CheckpointError::Io { error, .. } => error.kind() == io::ErrorKind::NotFound,
            CheckpointError::Missing { .. } => true,
            _ => false,
        }
    }

    /// For `map_err`: an I/O error with what was tried and on which path.
    pub(crate) fn io(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| CheckpointError::Io { op, path: path.to_path_buf(), error, detail: String::new() }
    }

    /// A failed write: how much was needed and how much is free.
    pub(crate) fn write(
        op: &'static str,
        path: &Path,
        needed_bytes: u64,
        free_bytes: Option<u64>,
        error: io::Error,
    ) -> Self {
        let path = path.to_path_buf();
        match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => CheckpointError::NoSpace { path, needed_bytes, free_bytes, error },
            _ => {
                let detail = format!(" ({needed_bytes} bytes needed, {} free)", known(&free_bytes));
                CheckpointError::Io { op, path, error, detail }
            }
        }
    }
}

fn known(bytes: &Option<u64>) -> String {
    bytes.map_or_else(|| "an unknown number".to_string(), |bytes| bytes.to_string())
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
