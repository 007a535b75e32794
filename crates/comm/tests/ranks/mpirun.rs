//! Ranks that `mpirun` starts. They run the test binary's `rank` as those of `shm` do, and report through files.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use fsdp_comm::{CommError, ProcessGroup};
use fsdp_control::store::{Store, StoreServer};
use rustix::process::{Pid, Signal};

use super::LONG;

/// A job of some ranks; ended when dropped.
pub struct Job {
    mpirun: Child,
    reports: tempfile::TempDir,
    _server: StoreServer,
}

/// Whether there is an `mpirun`. Says so where there is none, for tests that then do nothing.
pub fn is_there() -> bool {
    let is_there = Command::new("mpirun").arg("--version").output().is_ok();
    if !is_there {
        println!("skipped: no mpirun on PATH");
    }
    is_there
}

/// Starts `num_started` ranks of a case for which the run has `world_size`.
pub fn start_some(case: &str, num_started: usize, world_size: usize, timeout: Duration) -> Job {
    let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
    let reports = tempfile::tempdir().unwrap();
    let mut command = Command::new("mpirun");
    let version = Command::new("mpirun").arg("--version").output().unwrap().stdout;
    if String::from_utf8_lossy(&version).contains("Open MPI") {
        // More ranks than cores, as whoever runs the tests.
        command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    }
    command
        .args(["-n", &num_started.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("FSDP_TEST_CASE", case)
        .env("FSDP_TEST_TIMEOUT_MS", timeout.as_millis().to_string())
        .env("FSDP_TEST_WORLD_SIZE", world_size.to_string())
        .env("FSDP_TEST_STORE_PORT", server.local_addr().port().to_string())
        .env("FSDP_TEST_REPORTS", reports.path())
        .env("OMP_NUM_THREADS", "1")
        .stdout(std::process::Stdio::null());
    Job { mpirun: command.spawn().unwrap(), reports, _server: server }
}

pub fn start(case: &str, world_size: usize) -> Job {
    start_some(case, world_size, world_size, LONG)
}

/// Runs a case on so many ranks, which must all succeed; their results.
pub fn run(case: &str, world_size: usize) -> Vec<Vec<String>> {
    let mut job = start(case, world_size);
    assert_eq!(job.wait(), Some(0), "{case} on {world_size} ranks (the message is above)");
    (0..world_size).map(|rank| job.results(rank)).collect()
}

impl Job {
    /// Waits until it ends, and gives the exit status.
    pub fn wait(&mut self) -> Option<i32> {
        self.mpirun.wait().unwrap().code()
    }

    /// The lines that a rank has reported so far.
    pub fn results(&self, rank: usize) -> Vec<String> {
        let text = std::fs::read_to_string(report_file(self.reports.path(), rank)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a rank has reported that many lines.
    pub fn wait_for_results(&self, rank: usize, count: usize) -> Vec<String> {
        let start = std::time::Instant::now();
        loop {
            let results = self.results(rank);
            if results.len() >= count {
                return results;
            }
            assert!(start.elapsed() < LONG, "rank {rank} has reported {results:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Job {
    /// Not by force: `mpirun` ends the ranks.
    fn drop(&mut self) {
        if matches!(self.mpirun.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process(Pid::from_child(&self.mpirun), Signal::TERM);
        }
        let _ = self.mpirun.wait();
    }
}

/// In a rank: its number, by the MPI that started it.
pub fn rank() -> usize {
    let rank = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"].iter().find_map(|name| std::env::var(name).ok());
    rank.expect("ranks are started by mpirun").parse().unwrap()
}

/// In a rank: joins the group.
pub fn connect() -> Result<ProcessGroup, CommError> {
    tch::set_num_threads(1);
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let timeout = Duration::from_millis(number("FSDP_TEST_TIMEOUT_MS"));
    let mut store = Store::connect(("127.0.0.1", number("FSDP_TEST_STORE_PORT") as u16), LONG).unwrap();
    ProcessGroup::connect_mpi(&mut store, rank(), number("FSDP_TEST_WORLD_SIZE") as usize, timeout, None)
}

/// In a rank: a store of its own for [`ProcessGroup::split`].
pub fn store() -> Store {
    let port = std::env::var("FSDP_TEST_STORE_PORT").unwrap().parse().unwrap();
    Store::connect(("127.0.0.1", port), LONG).unwrap()
}

/// In a rank: reports a line to the test.
pub fn report(line: impl std::fmt::Display) {
    use std::io::Write;
    let path = report_file(Path::new(&std::env::var_os("FSDP_TEST_REPORTS").unwrap()), rank());
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn report_file(folder: &Path, rank: usize) -> std::path::PathBuf {
    folder.join(format!("rank-{rank}"))
}
