use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What can go wrong between a launcher and its ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    #[error(
        "nothing says which rank this process is (such as RANK or SLURM_PROCID in the environment); start ranks with \
         fsdp-launch, mpirun or srun"
    )]
    NoRank,

    #[error("environment variable {name} is not set; {hint}")]
    MissingVariable { name: &'static str, hint: &'static str },

    #[error("environment variable {name}={value:?} is wrong: expected {expected}")]
    BadVariable { name: &'static str, value: String, expected: String },

    #[error("node list {list:?}, position {position}: {reason}")]
    NodeList { list: String, position: usize, reason: String },

    #[error(
        "port {port} of {host} is in use by {}; choose another one (--master-port, or MASTER_PORT)",
        .holder.as_deref().unwrap_or("another process")
    )]
    PortInUse {
        host: String,
        port: u16,
        /// See [`crate::ports::holder`].
        holder: Option<String>,
    },

    #[error("the store cannot listen on {host}:{port}: {source}")]
    StoreBind { host: String, port: u16, source: io::Error },

    #[error("no connection to the store at {addr} within {timeout:?}: {source}")]
    StoreUnreachable { addr: String, timeout: Duration, source: io::Error },

    #[error("lost the connection to the store at {addr}: {source}")]
    StoreLost { addr: String, source: io::Error },

    #[error("the store at {addr} refused {request} of key {key:?}: {reason}")]
    StoreRefused { addr: String, request: &'static str, key: String, reason: String },

    #[error("nobody set key {key:?} in the store at {addr} within {timeout:?}")]
    KeyTimeout { addr: String, key: String, timeout: Duration },

    #[error("barrier {name:?}: of {world_size} ranks, {missing:?} did not arrive within {timeout:?}")]
    BarrierTimeout { name: String, world_size: usize, missing: Vec<usize>, timeout: Duration },

    #[error("{what}: {source}")]
    System { what: String, source: io::Error },

    #[error("{what} is not what this program made: {reason}")]
    Foreign { what: String, reason: String },

    #[error(
        "{}: expected an output folder that no other run uses, got one in use by {holder}; wait for it, or choose \
         another folder with --set output.dir=...", .dir.display()
    )]
    Locked { dir: PathBuf, holder: String },

    #[error("{}: expected a lock file that can be written, got: {source}", .path.display())]
    LockFile { path: PathBuf, source: io::Error },

    #[error(
        "{}: {num_starts} starts in a row failed without a new step, the last one: {last_failure}; find the cause, then \
         delete this file to try again", .path.display()
    )]
    NoProgress { path: PathBuf, num_starts: u32, last_failure: String },

    #[error("error file {path}: {reason}")]
    ErrorFile { path: PathBuf, reason: String },
}

impl ControlError {
    /// Wraps a failed system call; `what` says what was attempted.
    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}
