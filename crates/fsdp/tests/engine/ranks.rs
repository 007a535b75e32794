//! Real ranks for tests: the test binary starts itself once for each rank, with `FSDP_TEST_CASE` naming what to do.

use std::io::read_to_string;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use fsdp::Groups;
use fsdp_comm::ProcessGroup;
use fsdp_comm::nccl::NcclGroup;
use fsdp_control::store::{Store, StoreServer};
use rustix::process::{Pid, Signal};
use tch::Device;
use tempfile::TempDir;

/// Longer than any healthy wait.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The ranks of a case; killed when dropped.
pub struct Ranks {
    children: Vec<Child>,
    _server: StoreServer,
    /// Where the double of NCCL keeps its files.
    _folder: TempDir,
}

/// Starts `world_size` ranks of a case.
pub fn start(case: &str, world_size: usize) -> Ranks {
    let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let children = (0..world_size)
        .map(|rank| {
            Command::new(std::env::current_exe().unwrap())
                .args(["rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
                .env("FSDP_TEST_CASE", case)
                .env("FSDP_TEST_RANK", rank.to_string())
                .env("FSDP_TEST_WORLD_SIZE", world_size.to_string())
                .env("FSDP_TEST_PORT", server.local_addr().port().to_string())
                .env("OMP_NUM_THREADS", "1")
                .env("NCCL_DOUBLE_DIR", folder.path())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    Ranks { children, _server: server, _folder: folder }
}

/// Runs a case on so many ranks, which must all succeed; the lines that each reported.
pub fn run(case: &str, world_size: usize) -> Vec<Vec<String>> {
    start(case, world_size).wait(case)
}

impl Ranks {
    pub fn signal(&self, rank: usize, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.children[rank]), signal).unwrap();
    }

    /// Whether all ranks still run.
    pub fn are_running(&mut self) -> bool {
        self.children.iter_mut().all(|child| child.try_wait().unwrap().is_none())
    }

    /// Waits for all ranks, which must succeed.
    pub fn wait(mut self, case: &str) -> Vec<Vec<String>> {
        let world_size = self.children.len();
        // All at once: a rank whose pipe is full waits, and the others for it.
        let outputs: Vec<ChildStdout> = self.children.iter_mut().map(|child| child.stdout.take().unwrap()).collect();
        let texts: Vec<String> = std::thread::scope(|scope| {
            let readers: Vec<_> = outputs.into_iter().map(|out| scope.spawn(|| read_to_string(out).unwrap())).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        for (rank, child) in self.children.iter_mut().enumerate() {
            let status = child.wait().unwrap();
            assert!(status.success(), "rank {rank} of {world_size} failed in {case} (its message is above)");
        }
        let reported = |line: &str| line.split_once("reported: ").map(|(_, rest)| rest.to_owned());
        texts.iter().map(|text| text.lines().filter_map(reported).collect()).collect()
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

/// In a rank: its place.
pub struct World {
    pub rank: usize,
    pub size: usize,
    /// What carries the collectives of the next engines.
    pub carrier: Carrier,
    store: Store,
}

/// What carries collectives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Carrier {
    Shm,
    /// Over shared memory by way of copies, as for ranks that share a GPU.
    Staged,
    /// The back end `nccl` on a test double of its library, which works on the CPU.
    NcclDouble,
}

/// The double's library, which the tests of crate comm build: with all tests of the workspace.
pub fn nccl_double() -> Option<PathBuf> {
    let exe = std::env::current_exe().unwrap();
    Some(exe.ancestors().nth(2).unwrap().join("examples/libnccl_double.so")).filter(|path| path.exists())
}

impl World {
    pub fn join() -> Self {
        tch::set_num_threads(1);
        let number = |name: &str| std::env::var(name).expect("ranks are started by the other tests").parse().unwrap();
        let store = Store::connect(("127.0.0.1", number("FSDP_TEST_PORT") as u16), TIMEOUT).unwrap();
        World { rank: number("FSDP_TEST_RANK"), size: number("FSDP_TEST_WORLD_SIZE"), carrier: Carrier::Shm, store }
    }

    /// Process groups of its own for each engine.
    pub fn groups(&mut self, num_shards: usize) -> Groups {
        let (rank, size, store) = (self.rank, self.size, &mut self.store);
        let world = match self.carrier {
            Carrier::Shm => ProcessGroup::connect_shm(store, rank, size, TIMEOUT, None).unwrap(),
            Carrier::Staged => ProcessGroup::connect_shm(store, rank, size, TIMEOUT, None).unwrap().staged(Device::Cpu),
            Carrier::NcclDouble => {
                let double = nccl_double().expect("the test has looked for it");
                let group = NcclGroup::with_library(&double, store, rank, size, Device::Cpu, TIMEOUT, None).unwrap();
                ProcessGroup::Nccl(group)
            }
        };
        Groups::new(world, store, num_shards).unwrap()
    }
}

/// In a rank: reports a line to the test.
pub fn report(line: impl std::fmt::Display) {
    println!("reported: {line}");
}
