//! Real ranks for tests: the test binary starts itself once for each rank, with `FSDP_TEST_CASE` naming what to do. Each
//! test file has one ignored test, `rank`, which runs the case.
#![allow(dead_code)] // not every test file uses all of it

pub mod double;
pub mod mpirun;
pub mod table;
pub mod walk;

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fsdp_comm::{CommError, ProcessGroup};
use fsdp_control::env::{StartedBy, WorkerEnv};
use fsdp_control::lifeline;
use fsdp_control::progress::{Progress, ProgressHandle};
use fsdp_control::store::{Store, StoreServer};
use rustix::process::{Pid, Signal};

/// Longer than any healthy wait.
pub const LONG: Duration = Duration::from_secs(30);

/// The ranks of a case; killed when dropped.
pub struct Ranks {
    children: Vec<Child>,
    pub progress: Progress,
    _server: StoreServer,
}

/// What a rank left.
#[derive(Debug)]
pub struct Ended {
    /// Its lines that start with `reported: `, without that.
    pub results: Vec<String>,
    pub signal: Option<i32>,
    pub success: bool,
}

/// Starts the first `num_started` of `world_size` ranks of a case.
pub fn start_some(case: &str, num_started: usize, world_size: usize, timeout: Duration) -> Ranks {
    start_with(case, num_started, world_size, timeout, &[])
}

/// As [`start_some`], with more environment variables.
fn start_with(case: &str, num_started: usize, world_size: usize, timeout: Duration, vars: &[(&str, &str)]) -> Ranks {
    let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
    let progress = Progress::create(world_size).unwrap();
    let children = (0..num_started)
        .map(|rank| {
            let env = WorkerEnv {
                started_by: StartedBy::Launcher,
                run_id: None,
                rank,
                local_rank: rank,
                world_size,
                local_world_size: world_size,
                group_rank: 0,
                master_addr: "127.0.0.1".into(),
                master_port: server.local_addr().port(),
                lifeline_fd: None,
                progress_fd: Some(progress.inherit_fd()),
                terminal_width: None,
            };
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
                .envs(env.vars())
                .env("FSDP_TEST_CASE", case)
                .env("FSDP_TEST_TIMEOUT_MS", timeout.as_millis().to_string())
                .env("OMP_NUM_THREADS", "1")
                .envs(vars.iter().copied())
                .stdout(Stdio::piped());
            lifeline::prepare_child(&mut command, &[progress.inherit_fd()]);
            command.spawn().unwrap()
        })
        .collect();
    Ranks { children, progress, _server: server }
}

pub fn start(case: &str, world_size: usize) -> Ranks {
    start_some(case, world_size, world_size, LONG)
}

/// Runs a case on so many ranks, which must all succeed; their results.
pub fn run(case: &str, world_size: usize) -> Vec<Vec<String>> {
    let ended = start(case, world_size).wait();
    ended
        .into_iter()
        .enumerate()
        .map(|(rank, ended)| {
            assert!(ended.success, "rank {rank} of {world_size} failed in {case} (its message is above)");
            ended.results
        })
        .collect()
}

impl Ranks {
    pub fn signal(&self, rank: usize, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.children[rank]), signal).unwrap();
    }

    /// Waits until all ranks have ended.
    pub fn wait(mut self) -> Vec<Ended> {
        (0..self.children.len()).map(|rank| self.wait_for(rank)).collect()
    }

    /// Waits until one rank has ended.
    pub fn wait_for(&mut self, rank: usize) -> Ended {
        let child = &mut self.children[rank];
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = child.wait().unwrap();
        let results = text.lines().filter_map(|line| line.split_once("reported: ").map(|(_, rest)| rest.to_owned()));
        Ended { results: results.collect(), signal: status.signal(), success: status.success() }
    }

    /// Waits until the rank waits in collective `seq`, by its progress counters.
    pub fn wait_until_inside(&self, rank: usize, seq: u64) {
        let start = std::time::Instant::now();
        loop {
            let snapshot = self.progress.snapshot(rank);
            if snapshot.inside && snapshot.seq >= seq {
                return;
            }
            assert!(start.elapsed() < LONG, "rank {rank} is at {snapshot:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// In a rank: the case to run.
pub fn case() -> String {
    std::env::var("FSDP_TEST_CASE").expect("ranks are started by the other tests")
}

/// In a rank: joins the group.
pub fn connect() -> Result<ProcessGroup, CommError> {
    connect_by(&mut store(), |store, env, timeout, progress| {
        ProcessGroup::connect_shm(store, env.rank, env.world_size, timeout, progress)
    })
}

fn connect_by(
    store: &mut Store,
    connect: impl FnOnce(&mut Store, &WorkerEnv, Duration, Option<ProgressHandle>) -> Result<ProcessGroup, CommError>,
) -> Result<ProcessGroup, CommError> {
    tch::set_num_threads(1);
    let env = WorkerEnv::from_env().unwrap();
    let timeout = Duration::from_millis(std::env::var("FSDP_TEST_TIMEOUT_MS").unwrap().parse().unwrap());
    let progress = Progress::attach(env.progress_fd.unwrap(), env.local_rank).unwrap();
    connect(store, &env, timeout, Some(progress))
}

/// In a rank: a connection to the store.
pub fn store() -> Store {
    let env = WorkerEnv::from_env().unwrap();
    Store::connect((&env.master_addr, env.master_port), LONG).unwrap()
}

/// In a rank: reports a line to the test.
pub fn report(line: impl std::fmt::Display) {
    println!("reported: {line}");
}
