//! Ranks on the CPU whose NCCL is the test double (`nccl_double/`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_comm::nccl::NcclGroup;
use fsdp_comm::{CommError, ProcessGroup};
use fsdp_control::store::Store;
use serde_json::Value;
use tch::Device;
use tempfile::TempDir;

use super::{Ended, LONG, Ranks};

/// Ranks, and the folder where the double keeps its files.
pub struct DoubleRanks {
    pub ranks: Ranks,
    folder: TempDir,
}

impl DoubleRanks {
    /// How often a rank has called a function so far.
    pub fn count(&self, rank: usize, call: &str) -> usize {
        read_lines(&self.log(rank)).iter().filter(|line| line["call"] == call).count()
    }

    fn log(&self, rank: usize) -> PathBuf {
        self.folder.path().join(format!("log-{rank}.jsonl"))
    }
}

/// The library, which is built with the tests.
pub fn library() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples/libnccl_double.so");
    assert!(path.exists(), "{} is not there; `cargo test` without `--test` builds it", path.display());
    path
}

/// Starts the first `num_started` of `world_size` ranks; `fault` and `version` are the double's.
pub fn start_some(case: &str, num_started: usize, world_size: usize, timeout: Duration, fault: &str) -> DoubleRanks {
    start_of_version(case, num_started, world_size, timeout, fault, "22809")
}

fn start_of_version(
    case: &str,
    num_started: usize,
    world_size: usize,
    timeout: Duration,
    fault: &str,
    version: &str,
) -> DoubleRanks {
    let folder = tempfile::tempdir().unwrap();
    let vars = [
        ("NCCL_DOUBLE_DIR", folder.path().to_str().unwrap()),
        ("NCCL_DOUBLE_FAULT", fault),
        ("NCCL_DOUBLE_VERSION", version),
    ];
    let ranks = super::start_with(case, num_started, world_size, timeout, &vars);
    DoubleRanks { ranks, folder }
}

/// Runs a case on so many ranks, which must all succeed; what they report, and the double's log of each.
pub fn run(case: &str, world_size: usize, version: &str) -> Vec<(Vec<String>, Vec<Value>)> {
    let mut started = start_of_version(case, world_size, world_size, LONG, "", version);
    let of_rank = |rank: usize| {
        let Ended { results, success, .. } = started.ranks.wait_for(rank);
        assert!(success, "rank {rank} of {world_size} failed in {case} (its message is above)");
        (results, read_lines(&started.log(rank)))
    };
    (0..world_size).map(of_rank).collect()
}

/// Lines of JSON.
pub fn read_lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// In a rank: joins the group.
pub fn connect() -> Result<ProcessGroup, CommError> {
    connect_through(&mut super::store())
}

/// As [`connect`], through another store than the test's.
pub fn connect_through(store: &mut Store) -> Result<ProcessGroup, CommError> {
    super::connect_by(store, |store, env, timeout, progress| {
        let (rank, world_size) = (env.rank, env.world_size);
        let group = NcclGroup::with_library(&library(), store, rank, world_size, Device::Cpu, timeout, progress)?;
        Ok(ProcessGroup::Nccl(group))
    })
}
