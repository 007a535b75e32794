//! `logs/summary.json`: what became of a run, with the records of all its starts. It is there while the run goes on, then
//! without a status, and is complete however the run ends, unless the launcher itself is killed.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fsdp_control::error_file::{Committed, ErrorRecord};
use fsdp_control::{ExitStatus, host_name};
use serde::Serialize;

use crate::attempts::Ranks;
use crate::nodes::Nodes;

/// Version of the fields.
const SCHEMA: u32 = 1;

#[derive(Debug, Serialize)]
pub struct Summary {
    schema: u32,
    run_id: String,
    world_size: usize,
    nodes: Vec<Node>,
    max_restarts: u32,
    /// Wall-clock times as RFC 3339 has them.
    started: String,
    /// `None` while the run goes on, as the next two.
    ended: Option<String>,
    status: Option<i32>,
    status_meaning: Option<&'static str>,
    /// The ranks' starts, in order.
    attempts: Vec<Attempt>,
    /// The newest one.
    checkpoint: Option<Committed>,
    /// What to do now.
    hint: Option<String>,
    /// What the launcher said at the end.
    report: Vec<String>,
    #[serde(skip)]
    path: PathBuf,
}

#[derive(Debug, Serialize)]
struct Node {
    node_rank: usize,
    host: String,
    first_rank: usize,
    num_ranks: usize,
}

/// One start of the ranks.
#[derive(Debug, Serialize)]
pub struct Attempt {
    pub attempt: u32,
    pub started: String,
    pub ended: String,
    /// Why it failed, in one line: who, what, when. `None` where it did not.
    pub what: Option<String>,
    /// The record of the rank that caused it; `None` where it was no rank.
    pub cause: Option<ErrorRecord>,
    /// The records of all failed ranks, in the order in which the launcher heard of them.
    pub failures: Vec<ErrorRecord>,
    pub decision: Decision,
}

/// What followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    End,
    /// All ranks were started again, from this checkpoint or from the beginning.
    Restart {
        from: Option<PathBuf>,
    },
}

impl Summary {
    /// The summary of a run that begins now.
    pub fn new(log_dir: &Path, ranks: &Ranks, nodes: &Nodes) -> Self {
        let own = Node { node_rank: 0, host: host_name(), first_rank: 0, num_ranks: ranks.num_local };
        let others = nodes.peers.iter().map(|peer| {
            let ranks = peer.ranks.clone().unwrap_or_default();
            Node { node_rank: peer.node_rank, host: peer.host.clone(), first_rank: ranks.start, num_ranks: ranks.len() }
        });
        Self {
            schema: SCHEMA,
            run_id: ranks.run_id.clone(),
            world_size: ranks.world_size,
            nodes: [own].into_iter().chain(others).collect(),
            max_restarts: ranks.max_restarts,
            started: now(),
            ended: None,
            status: None,
            status_meaning: None,
            attempts: Vec::new(),
            checkpoint: None,
            hint: None,
            report: Vec::new(),
            path: log_dir.join("summary.json"),
        }
    }

    pub fn add(&mut self, attempt: Attempt, checkpoint: Option<Committed>) {
        self.attempts.push(attempt);
        self.checkpoint = checkpoint;
    }

    /// The newest checkpoint where the launcher itself fails.
    pub fn set_checkpoint(&mut self, checkpoint: Option<Committed>) {
        self.checkpoint = checkpoint;
    }

    pub fn end(&mut self, status: ExitStatus, report: Vec<String>, hint: Option<String>) {
        self.ended = Some(now());
        self.status = Some(status.code());
        self.status_meaning = Some(status.meaning());
        self.report = report;
        self.hint = hint;
    }

    /// Writes it, whole or not at all, over an older one.
    ///
    /// # Errors
    /// A line that says why not. That is no reason to end the run otherwise.
    pub fn write(&self) -> Result<(), String> {
        let json = serde_json::to_vec_pretty(self).expect("plain fields are always representable as JSON");
        let temporary = self.path.with_file_name(".summary.json.tmp");
        std::fs::write(&temporary, json).and_then(|()| std::fs::rename(&temporary, &self.path)).map_err(|error| {
            let _ = std::fs::remove_file(&temporary);
            format!("fsdp-launch: warning: cannot write {}: {error}", self.path.display())
        })
    }
}

/// The wall-clock time.
pub fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
