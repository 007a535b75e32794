//! The flight record: what each group of this rank has called last, and what of it is done. A rank writes it when a run
//! fails; laid side by side, the ranks' records show who fell behind and where.

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use fsdp_control::progress::{Op, ProgressHandle};
use serde_json::json;
use tch::Kind;

use crate::{Call, CommError};

/// Collectives that are kept.
pub(crate) const NUM_ENTRIES: usize = 256;

/// The calls of one group on this rank. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct FlightRecord {
    /// Name of the group.
    group: Arc<str>,
    progress: Option<ProgressHandle>,
    /// Collectives called so far, in all groups that were split from one.
    seq: Arc<AtomicU64>,
    entries: Arc<Mutex<VecDeque<Entry>>>,
}

#[derive(Clone, Debug)]
struct Entry {
    call: Call,
    /// Wall clock, as microseconds since 1970: comparable between ranks.
    issued_us: u64,
    /// When it was seen to be done.
    done_us: Option<u64>,
}

impl FlightRecord {
    pub fn new(group: &str, progress: Option<ProgressHandle>) -> Self {
        FlightRecord { group: group.into(), progress, seq: Arc::default(), entries: Arc::default() }
    }

    /// A record for a group that is split from this one: numbers go on, entries are its own.
    pub fn split(&self, group: &str) -> Self {
        FlightRecord {
            group: group.into(),
            progress: self.progress.clone(),
            seq: Arc::clone(&self.seq),
            entries: Arc::default(),
        }
    }

    pub fn progress(&self) -> Option<&ProgressHandle> {
        self.progress.as_ref()
    }

    /// Counts and records a collective that starts now.
    pub fn start(&self, op: Op, kind: Option<Kind>, num_bytes: usize, detail: u8, unit: &str) -> Call {
        let mut call = self.upcoming(op, num_bytes, unit);
        call.kind = kind;
        call.detail = detail;
        self.seq.store(call.seq, Ordering::Relaxed); // one thread calls the groups of a rank
        if let Some(progress) = &self.progress {
            progress.enter(op, call.seq, unit, call.num_bytes);
            progress.leave();
        }
        let mut entries = self.entries();
        if entries.len() == NUM_ENTRIES {
            entries.pop_front();
        }
        entries.push_back(Entry { call: call.clone(), issued_us: now_us(), done_us: None });
        call
    }

    /// The call that is about to start, for messages of what comes before it.
    pub fn upcoming(&self, op: Op, num_bytes: usize, unit: &str) -> Call {
        let seq = self.seq.load(Ordering::Relaxed) + 1;
        Call { op, seq, kind: None, num_bytes: num_bytes as u64, detail: 0, unit: unit.to_owned() }
    }

    /// The collective was seen to be done.
    pub fn done(&self, call: &Call) {
        let mut entries = self.entries();
        if let Some(entry) = entries.iter_mut().rev().find(|entry| entry.call.seq == call.seq) {
            entry.done_us = Some(now_us());
        }
    }

    /// All that are kept, oldest first.
    #[cfg(feature = "mpi")]
    pub fn calls(&self) -> Vec<Call> {
        self.entries().iter().map(|entry| entry.call.clone()).collect()
    }

    /// The last collective that was started.
    pub fn last(&self) -> Option<Call> {
        self.entries().back().map(|entry| entry.call.clone())
    }

    /// Writes a JSON line for each of the last [`NUM_ENTRIES`] collectives, oldest first.
    pub fn write(&self, path: &Path) -> Result<(), CommError> {
        let mut text = Vec::new();
        for Entry { call, issued_us, done_us } in self.entries().iter() {
            let line = json!({
                "group": &*self.group,
                "seq": call.seq,
                "op": call.op.to_string(),
                "unit": call.unit,
                "bytes": call.num_bytes,
                "dtype": call.kind.map(|kind| format!("{kind:?}")),
                "issued_us": issued_us,
                "done_us": done_us,
            });
            writeln!(text, "{line}").expect("memory can be written");
        }
        std::fs::write(path, text).map_err(|source| CommError::FlightRecord { path: path.to_owned(), source })
    }

    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().expect("no thread panics while it holds the entries")
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_256_calls_are_kept_and_numbers_run_through_all_groups() {
        let record = FlightRecord::new("world", None);
        let split = record.split("shard");
        let first = split.start(Op::AllGather, Some(Kind::BFloat16), 64, 0, "layers.0");
        assert_eq!((first.seq, record.last()), (1, None));
        for _ in 0..300 {
            let call = record.start(Op::Barrier, None, 0, 0, "");
            if call.seq.is_multiple_of(2) {
                record.done(&call);
            }
        }
        assert_eq!(record.upcoming(Op::Barrier, 0, "").seq, 302);
        record.done(&first); // of another group: no entry here
        let dir = tempfile::tempdir().unwrap();
        let lines = |record: &FlightRecord| {
            let path = dir.path().join("flight.jsonl");
            record.write(&path).unwrap();
            let text = std::fs::read_to_string(path).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<serde_json::Value>>()
        };
        let world = lines(&record);
        assert_eq!(world.len(), NUM_ENTRIES);
        for (line, seq) in world.iter().zip(46u64..) {
            assert_eq!(line["seq"], seq);
            assert_eq!(line["done_us"].is_u64(), seq % 2 == 0, "{line}");
            assert!(line["issued_us"].is_u64() && line["dtype"].is_null());
        }
        let shard = lines(&split);
        let line = &shard[0];
        assert_eq!((shard.len(), &line["group"], &line["op"]), (1, &json!("shard"), &json!("all_gather")));
        assert_eq!((&line["unit"], &line["bytes"]), (&json!("layers.0"), &json!(64)));
        assert!(line["done_us"].is_null());
    }
}
