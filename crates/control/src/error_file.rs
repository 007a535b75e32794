//! A failed rank's record of why it failed: `error-rank-N.json` in the log folder. The launcher reads the records of all
//! ranks to name the root cause instead of the loudest victim, adds what it knows better, and writes those of ranks that
//! could not.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::progress::Phase;
use crate::{ControlError, ExitStatus};

/// Version of the record's fields. Schema 1 had fewer; its records are read as if the others were unknown.
pub const SCHEMA: u32 = 2;

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
    /// The rank ended with a status and no word (by the launcher).
    Exit,
    /// The system killed the rank because memory ran out (by the launcher).
    OutOfMemory,
    /// The rank did not come to a collective for which others waited (by the launcher).
    Hang,
    Other,
}

impl ErrorKind {
    /// Whether the failure can be a root cause. The others tell that *somebody else* failed.
    pub fn is_primary(self) -> bool {
        !matches!(self, ErrorKind::PeerLost | ErrorKind::CollectiveTimeout)
    }

    /// Whether a new start may do better.
    pub fn is_retryable(self) -> bool {
        !matches!(self, ErrorKind::BadInput | ErrorKind::NonFinite)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::PeerLost => "peer_lost",
            ErrorKind::CollectiveTimeout => "collective_timeout",
            ErrorKind::CollectiveMismatch => "collective_mismatch",
            ErrorKind::BadInput => "bad_input",
            ErrorKind::NonFinite => "non_finite",
            ErrorKind::Panic => "panic",
            ErrorKind::Io => "io",
            ErrorKind::Signal => "signal",
            ErrorKind::Exit => "exit",
            ErrorKind::OutOfMemory => "out_of_memory",
            ErrorKind::Hang => "hang",
            ErrorKind::Other => "other",
        })
    }
}

/// A collective that a rank was in, or that failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collective {
    /// Number of the collective among all of the rank's.
    pub seq: u64,
    /// As [`crate::progress::Op`] shows it.
    pub op: String,
    /// Bytes of the whole (unsharded) data.
    pub num_bytes: u64,
    /// Unit that it is for; empty for plain tensors.
    pub unit: String,
    /// Ranks that are known to have entered it, and to have not.
    pub entered: Vec<usize>,
    pub missing: Vec<usize>,
}

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    pub step: u64,
    pub path: PathBuf,
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
    /// Which run it was, and how often its ranks had been started before.
    #[serde(default)]
    pub run_id: Option<String>,
    #[serde(default)]
    pub attempt: u32,
    /// Wall-clock time of the failure, nanoseconds since 1970.
    pub t_wall_ns: u64,
    /// The same on the host's monotonic clock: orders the records of one host.
    #[serde(default)]
    pub t_mono_ns: u64,
    /// Training step, from 1; 0 before the first.
    pub step: u64,
    /// What the rank was busy with, where that is known.
    #[serde(default)]
    pub phase: Option<Phase>,
    pub kind: ErrorKind,
    /// Can be the root cause; see [`ErrorKind::is_primary`].
    pub primary: bool,
    /// One line.
    pub message: String,
    /// What caused it, outermost first.
    pub causes: Vec<String>,
    /// Unit at work, if one was.
    pub unit: Option<String>,
    /// Collective that the rank was in, if it was in one.
    #[serde(default)]
    pub collective: Option<Collective>,
    /// Status that the rank exits with.
    pub exit_status: i32,
    /// Number of the signal that ended it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// The most memory that the process had, where the launcher knows.
    #[serde(default)]
    pub peak_rss_bytes: Option<u64>,
    /// Newest committed checkpoint at the time of the failure.
    #[serde(default)]
    pub checkpoint: Option<Committed>,
    /// A new start may do better.
    #[serde(default)]
    pub retryable: bool,
    /// What to do about it.
    #[serde(default)]
    pub hint: Option<String>,
}

impl ErrorRecord {
    /// A record of this process and this moment; the optional fields are empty.
    pub fn new(rank: usize, local_rank: usize, kind: ErrorKind, message: String, exit_status: ExitStatus) -> Self {
        ErrorRecord {
            schema: SCHEMA,
            rank,
            local_rank,
            host: crate::host_name(),
            pid: std::process::id(),
            run_id: None,
            attempt: 0,
            t_wall_ns: wall_ns(),
            t_mono_ns: monotonic_ns(),
            step: 0,
            phase: None,
            kind,
            primary: kind.is_primary(),
            message,
            causes: Vec::new(),
            unit: None,
            collective: None,
            exit_status: exit_status.code(),
            signal: None,
            peak_rss_bytes: None,
            checkpoint: None,
            retryable: kind.is_retryable(),
            hint: None,
        }
    }
}

/// The wall-clock time as records have it, nanoseconds since 1970.
pub fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// Who, where, when and why, in one line: "rank 1 (host a, pid 7) failed at step 3: disk full".
impl fmt::Display for ErrorRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.at(Some(self.step)))
    }
}

impl ErrorRecord {
    /// The same where the step may be unknown.
    pub fn at(&self, step: Option<u64>) -> String {
        let (who, when) = (who(self.rank, &self.host, Some(self.pid)), step.map_or(String::new(), when));
        match self.kind {
            // Said on its behalf.
            ErrorKind::Signal | ErrorKind::Exit | ErrorKind::OutOfMemory | ErrorKind::Hang => {
                format!("{who} {}{when}", self.message)
            }
            ErrorKind::Panic => format!("{who} panicked{when}: {}", self.message),
            _ => format!("{who} failed{when}: {}", self.message),
        }
    }
}

/// A rank as messages name it: "rank 3 (host a, pid 1234)"; without a pid where nobody knows it.
pub fn who(rank: usize, host: &str, pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid > 0 => format!("rank {rank} (host {host}, pid {pid})"),
        _ => format!("rank {rank} (host {host})"),
    }
}

/// " at step 3", or " before the first step" for step 0.
pub fn when(step: u64) -> String {
    if step == 0 { " before the first step".to_owned() } else { format!(" at step {step}") }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
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
    std::fs::write(&temporary, json).and_then(|()| std::fs::rename(&temporary, &path)).map_err(|e| {
        // On a full disk there may be half of it.
        let _ = std::fs::remove_file(&temporary);
        ControlError::ErrorFile { path, reason: e.to_string() }
    })
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
    if !(1..=SCHEMA).contains(&record.schema) || record.rank != rank {
        return Err(failed(format!(
            "expected schema 1 to {SCHEMA} of rank {rank}, got schema {} of rank {}",
            record.schema, record.rank
        )));
    }
    Ok(Some(record))
}

/// Removes the record of `rank`, if there is one.
///
/// # Errors
/// It cannot be removed.
pub fn remove(dir: &Path, rank: usize) -> Result<(), ControlError> {
    match std::fs::remove_file(path(dir, rank)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            let reason = format!("cannot remove the record of an earlier start: {e}");
            Err(ControlError::ErrorFile { path: path(dir, rank), reason })
        }
        _ => Ok(()),
    }
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
        remove(dir.path(), 3).unwrap();
    }

    /// What a version wrote that had schema 1.
    #[test]
    fn records_of_schema_1_are_still_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"schema": 1, "rank": 2, "local_rank": 0, "host": "h", "pid": 7, "t_wall_ns": 5, "step": 4,
            "kind": "io", "primary": true, "message": "disk full", "causes": ["no space"], "unit": null,
            "exit_status": 1}"#;
        std::fs::write(path(dir.path(), 2), text).unwrap();
        let record = read(dir.path(), 2).unwrap().unwrap();
        assert_eq!((record.kind, record.phase, record.attempt), (ErrorKind::Io, None, 0));
        assert_eq!(record.to_string(), "rank 2 (host h, pid 7) failed at step 4: disk full");
    }

    #[test]
    fn a_record_in_one_line_says_who_what_and_when() {
        let line = |kind, message: &str, step| {
            let mut record = ErrorRecord::new(1, 1, kind, message.to_owned(), ExitStatus::Failed);
            (record.host, record.pid, record.step) = ("h".to_owned(), 7, step);
            record.to_string()
        };
        assert_eq!(
            line(ErrorKind::Signal, "was killed by SIGKILL", 3),
            "rank 1 (host h, pid 7) was killed by SIGKILL at step 3"
        );
        assert_eq!(
            line(ErrorKind::Io, "disk full", 0),
            "rank 1 (host h, pid 7) failed before the first step: disk full"
        );
        assert_eq!(line(ErrorKind::Panic, "at a:1: b", 2), "rank 1 (host h, pid 7) panicked at step 2: at a:1: b");
        assert_eq!(who(3, "a", None), "rank 3 (host a)");
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
