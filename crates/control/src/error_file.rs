//! A failed rank's record of why it failed: `error-rank-N.json` in the log folder. The launcher reads the records of all
//! ranks to name the root cause instead of the loudest victim.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::{ControlError, ExitStatus};

/// Version of the record's fields.
pub const SCHEMA: u32 = 1;

/// Longest record that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What kind of failure ended a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Another rank is gone.
    PeerLost,
    /// Another rank did not enter a collective in time.
    CollectiveTimeout,
    /// Ranks called different collectives.
    CollectiveMismatch,
    /// The config or an input is wrong.
    BadInput,
    /// Loss or gradients are not finite.
    NonFinite,
    /// A bug of this program.
    Panic,
    /// A file or device failed.
    Io,
    /// A signal ended the rank (written by the launcher on its behalf).
    Signal,
    Other,
}

impl ErrorKind {
    /// Whether the failure can be a root cause. The others tell that *somebody else* failed.
    pub fn is_primary(self) -> bool {
        !matches!(self, ErrorKind::PeerLost | ErrorKind::CollectiveTimeout)
    }
}

/// Why a rank failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorRecord {
    /// [`SCHEMA`].
    pub schema: u32,
    pub rank: usize,
    pub local_rank: usize,
    pub host: String,
    pub pid: u32,
    /// Wall-clock time of the failure, nanoseconds since 1970.
    pub t_wall_ns: u64,
    /// Training step, from 1; 0 before the first.
    pub step: u64,
    pub kind: ErrorKind,
    /// Can be the root cause; see [`ErrorKind::is_primary`].
    pub primary: bool,
    /// One line.
    pub message: String,
    /// What caused it, outermost first.
    pub causes: Vec<String>,
    /// Unit at work, if one was.
    pub unit: Option<String>,
    /// Status that the rank exits with.
    pub exit_status: i32,
}

impl ErrorRecord {
    /// A record of this process and this moment; the optional fields are empty.
    pub fn new(rank: usize, local_rank: usize, kind: ErrorKind, message: String, exit_status: ExitStatus) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        ErrorRecord {
            schema: SCHEMA,
            rank,
            local_rank,
            host: crate::host_name(),
            pid: std::process::id(),
            t_wall_ns: now.as_nanos() as u64,
            step: 0,
            kind,
            primary: kind.is_primary(),
            message,
            causes: Vec::new(),
            unit: None,
            exit_status: exit_status.code(),
        }
    }
}

/// Where the record of `rank` is.
pub fn path(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!("error-rank-{rank}.json"))
}

/// Writes the record, whole or not at all, over an older one of the same rank.
///
/// # Errors
/// The folder is missing or not writable, or the disk is full.
pub fn write(dir: &Path, record: &ErrorRecord) -> Result<(), ControlError> {
    let path = path(dir, record.rank);
    let json = serde_json::to_vec_pretty(record).expect("plain fields are always representable as JSON");
    let temporary = dir.join(format!(".error-rank-{}.json.tmp", record.rank));
    std::fs::write(&temporary, json)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(|e| ControlError::ErrorFile { path, reason: e.to_string() })
}

/// Reads the record of `rank`; `None` if there is none.
///
/// # Errors
/// The file cannot be read or is no record of that rank.
pub fn read(dir: &Path, rank: usize) -> Result<Option<ErrorRecord>, ControlError> {
    let path = path(dir, rank);
    let failed = |reason: String| ControlError::ErrorFile { path: path.clone(), reason };
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e.to_string())),
    };
    let mut json = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut json).map_err(|e| failed(e.to_string()))?;
    let record: ErrorRecord = serde_json::from_slice(&json).map_err(|e| failed(e.to_string()))?;
    if record.schema != SCHEMA || record.rank != rank {
        return Err(failed(format!(
            "expected schema {SCHEMA} of rank {rank}, got schema {} of rank {}",
            record.schema, record.rank
        )));
    }
    Ok(Some(record))
}

/// Removes the records of all ranks, which earlier runs left, and which would be taken for this run's.
///
/// # Errors
/// The folder cannot be read, or a record not removed.
pub fn remove_all(dir: &Path) -> Result<(), ControlError> {
    let remove = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("error-rank-") && name.ends_with(".json") {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    };
    remove().map_err(|e| {
        let reason = format!("cannot remove the records of an earlier run: {e}");
        ControlError::ErrorFile { path: dir.to_owned(), reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_leave_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path(), 3).unwrap(), None);
        let mut record = ErrorRecord::new(3, 1, ErrorKind::NonFinite, "loss is NaN".into(), ExitStatus::DoNotRerun);
        record.unit = Some("layers.2".into());
        record.causes = vec!["grad of w1".into()];
        write(dir.path(), &record).unwrap();
        assert_eq!(read(dir.path(), 3).unwrap(), Some(record));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        remove_all(dir.path()).unwrap();
        assert_eq!(read(dir.path(), 3).unwrap(), None);
    }

    #[test]
    fn victims_are_never_the_root_cause() {
        for (kind, primary) in
            [(ErrorKind::PeerLost, false), (ErrorKind::CollectiveTimeout, false), (ErrorKind::Panic, true)]
        {
            assert_eq!(ErrorRecord::new(0, 0, kind, String::new(), ExitStatus::Failed).primary, primary);
        }
    }

    #[test]
    fn damaged_records_are_errors_that_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = ErrorRecord::new(1, 1, ErrorKind::Io, String::new(), ExitStatus::Failed);
        for text in ["", "{}", "[1", "null", &serde_json::to_string(&other).unwrap()] {
            std::fs::write(path(dir.path(), 0), text).unwrap();
            let message = read(dir.path(), 0).unwrap_err().to_string();
            assert!(message.contains("error-rank-0.json"), "{message}");
        }
    }
}
