//! Nodes that are lost, do not come, or differ; ranks without a launcher that do.

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Ended, Job, Running, built};

use crate::kills::{LONG, sleep_randomly};
use crate::namespaces::Namespaces;
use crate::report::assert_recoverable;
use crate::tally::{Tally, Times};

/// A lost node is named by then.
const LOSS: Duration = Duration::from_secs(10);

/// A node of two with two ranks, as its launcher is started.
fn node(job: &Job, node_rank: usize, addr: &str, port: u16, args: &[&str]) -> Command {
    let (node_rank, port) = (node_rank.to_string(), port.to_string());
    let nodes = ["--nnodes", "2", "--node-rank", &node_rank, "--master-addr", addr, "--master-port", &port];
    job.command(2, &[&nodes[..], &["--backend", "shm"], args].concat())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// Row 16: the link between two nodes goes down: no packet says so.
pub fn lost(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for i in 0..n {
        let namespaces = match Namespaces::new() {
            Ok(namespaces) => namespaces,
            Err(reason) => return tally.skip(format!("no network namespaces here: {reason}")),
        };
        tally.check(format_args!("repetition {i}"), || {
            let job = Job::new();
            let every = format!("checkpoint.every_steps={}", if i % 2 == 0 { 20 } else { 0 });
            let args = [LONG, &["--set", &every]].concat();
            let nodes = [0, 1].map(|node_rank| {
                let command = node(&job, node_rank, Namespaces::ADDR, 29500, &args);
                job.spawn(namespaces.command_on(node_rank, &command))
            });
            let [mut head, other] = nodes;
            head.wait_for_step(30);
            head.wait_until("a checkpoint", |job| i % 2 == 1 || !job.checkpoints().is_empty());
            sleep_randomly(300);
            namespaces.cut();
            let start = Instant::now();
            let ended = [head.wait(), other.wait()];
            let took = start.elapsed();
            times.add(took);
            for (ended, who) in ended.iter().zip(["node 1 (host ", "node 0 (host "]) {
                let line = ended.stderr.lines().find(|line| line.starts_with("fsdp-launch: node ")).unwrap_or_default();
                assert!(line.contains(who) && line.contains("is lost"), "{ended:?}");
                assert_recoverable(&job, ended);
            }
            assert!(ended[0].stderr.contains("ranks 2-3"), "{:?}", ended[0]);
            assert!(took <= LOSS, "{took:?}: {ended:?}");
        });
    }
    tally.note(format!("both ended after {times}"));
}

/// Row 18: what keeps nodes and ranks from coming together.
pub fn missing(tally: &mut Tally, n: usize) {
    let cases: [(&str, fn()); 7] = [
        ("the port is in use", port_in_use),
        ("the usual port is in use by others, and not needed", usual_port_in_use),
        ("nobody listens at the master's address", no_master),
        ("the master's name is unknown", unknown_master),
        ("nothing answers at the master's address", silent_master),
        ("a node does not come", no_second_node),
        ("a rank without a launcher does not come", no_second_rank),
    ];
    for (name, case) in cases.into_iter().cycle().take(n) {
        tally.check(name, case);
    }
}

const WAIT: &[&str] = &["--set", "fsdp.timeout_secs=3"];

/// The timeout and 2 s.
const WAITED: Duration = Duration::from_secs(3 + 2);

#[track_caller]
fn assert_refused(job: &Job, ended: &Ended, statuses: &[i32], within: Duration, says: &[&str]) {
    assert!(statuses.contains(&ended.status), "{ended:?}");
    assert!(ended.took <= within, "{ended:?}");
    for part in says {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
    assert!(job.steps().is_empty());
}

fn port_in_use() {
    let job = Job::new();
    let holder = TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = holder.local_addr().expect("an address").port();
    let ended = job.spawn(node(&job, 0, "127.0.0.1", port, &[])).wait();
    // This program holds it.
    let (port, pid) = (format!("port {port}"), std::process::id().to_string());
    assert_refused(&job, &ended, &[2], Duration::from_secs(2), &[&port, "--master-port", &pid]);
}

fn usual_port_in_use() {
    let job = Job::new();
    // Where another program has it already, all the better.
    let _holder = TcpListener::bind("0.0.0.0:29500");
    job.finish(2, &[]);
}

fn no_master() {
    let job = Job::new();
    let port = free_port();
    let ended = job.spawn(node(&job, 1, "127.0.0.1", port, WAIT)).wait();
    assert_refused(&job, &ended, &[1, 2], WAITED, &[&format!("127.0.0.1:{port}"), "node 0"]);
}

fn unknown_master() {
    let job = Job::new();
    let ended = job.spawn(node(&job, 1, "no-such-host.invalid", 29500, WAIT)).wait();
    assert_refused(&job, &ended, &[1, 2], WAITED, &["no-such-host.invalid"]);
}

fn silent_master() {
    // Where there are none, the case before stands for this one.
    let Ok(namespaces) = Namespaces::new() else { return };
    namespaces.cut();
    let job = Job::new();
    let command = node(&job, 1, Namespaces::ADDR, 29500, WAIT);
    let ended = job.spawn(namespaces.command_on(1, &command)).wait();
    assert_refused(&job, &ended, &[1, 2], WAITED, &[Namespaces::ADDR, "node 0"]);
}

fn no_second_node() {
    let job = Job::new();
    let ended = job.spawn(node(&job, 0, "127.0.0.1", free_port(), WAIT)).wait();
    assert_refused(&job, &ended, &[1], WAITED, &["node 1 did not come within 3 s"]);
}

/// The longest that a task waits for others that do not come, or have gone.
const TASK_END: Duration = Duration::from_secs(20);

/// A task of one node, as `srun` starts it. Killed when dropped.
struct Task {
    process: Child,
    stderr: String,
}

impl Task {
    fn start(job: &Job, job_id: u32, rank: usize, num_ranks: usize, args: &[&str]) -> Self {
        let stderr = format!("task-{rank}");
        let mut command = Command::new(built("fsdp-train"));
        command.current_dir(job.path("")).arg("job.toml").args(args).env("OMP_NUM_THREADS", "1");
        for (name, value) in [
            ("JOB_ID", job_id.to_string()),
            ("STEP_ID", "0".to_owned()),
            ("STEP_NODELIST", "localhost".to_owned()),
            ("STEP_NUM_NODES", "1".to_owned()),
            ("STEP_NUM_TASKS", num_ranks.to_string()),
            ("STEP_TASKS_PER_NODE", num_ranks.to_string()),
            ("NODEID", "0".to_owned()),
            ("PROCID", rank.to_string()),
            ("LOCALID", rank.to_string()),
        ] {
            command.env(format!("SLURM_{name}"), value);
        }
        let file = File::create(job.path(&stderr)).expect("a folder of the test");
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().expect("fsdp-train");
        Task { process, stderr }
    }

    /// Its status and what it said.
    fn wait(&mut self, job: &Job) -> (Option<i32>, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().expect("a child") {
                return (status.code(), job.read(&self.stderr));
            }
            assert!(start.elapsed() < TASK_END, "a task lives on: {:?}", job.read(&self.stderr));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The store's port follows from it.
fn random_job_id() -> u32 {
    fastrand::u32(1_000_000..100_000_000)
}

fn no_second_rank() {
    let job = Job::new();
    let id = random_job_id();
    let mut tasks = [0, 1, 3].map(|rank| Task::start(&job, id, rank, 4, WAIT));
    let start = Instant::now();
    for task in &mut tasks {
        let (status, stderr) = task.wait(&job);
        assert_eq!(status, Some(1), "{stderr}");
    }
    assert!(start.elapsed() <= WAITED + Duration::from_secs(2), "{:?}", start.elapsed());
    let stderr = job.read("task-0");
    assert!(stderr.contains("[2] did not arrive within 3s") && !stderr.contains("panicked"), "{stderr}");
}

/// Row 20: the second node, or rank, has another config, other data, or another version. All are told what differs, and
/// none trains.
pub fn different(tally: &mut Tally, n: usize) {
    let keys: [(&str, &str, &str); 5] = [
        ("training.seed=7", "[training] seed", "7"),
        ("optimizer.lr=0.5", "[optimizer] lr", "0.5"),
        ("precision.param=fp32", "[precision] param", "fp32"),
        ("training.steps=21", "[training] steps", "21"),
        ("training.micro_batch_size=3", "[training] micro_batch_size", "3"),
    ];
    for i in 0..n {
        let (set, key, value) = keys[i / 4 % keys.len()];
        match i % 4 {
            0 => tally.check(format_args!("nodes, {set}"), || different_nodes(set, key, value)),
            1 => tally.check(format_args!("ranks without a launcher, {set}"), || different_ranks(set)),
            2 => tally.check("the nodes' data", different_data),
            _ => tally.check("the nodes' versions", different_versions),
        }
    }
}

/// Each node has a copy of its own of the data; one is older.
fn different_data() {
    let (job, other) = (Job::new(), Job::new());
    other.replace("train.jsonl", "[0, ", "[1, ");
    let port = free_port();
    let dir = format!("output.dir={}", job.path("out").display());
    let start = |job, node_rank| Job::spawn(job, node(job, node_rank, "127.0.0.1", port, &["--set", &dir]));
    for ended in [start(&job, 0), start(&other, 1)].map(Running::wait) {
        assert_refused(&job, &ended, &[2], WAITED, &["train"]);
    }
}

/// A launcher of another version has the same greeting, which is as old as launchers of several nodes.
fn different_versions() {
    let job = Job::new();
    let port = free_port();
    let head = job.spawn(node(&job, 0, "127.0.0.1", port, WAIT));
    let start = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(start.elapsed() < WAITED, "the head does not listen");
    };
    let hello = r#"{"hello": {"version": "0.0.1", "num_nodes": 2, "node_rank": 1, "host": "h", "machine": "m", "num_ranks": 2, "job": {"Ok": ""}}}"#;
    writeln!(stream, "{hello}").expect("the head");
    let ended = head.wait();
    assert_refused(&job, &ended, &[2], WAITED, &["0.0.1", env!("CARGO_PKG_VERSION"), "node 1"]);
}

fn different_nodes(set: &str, key: &str, value: &str) {
    let job = Job::new();
    let port = free_port();
    let start = |node_rank, args: &[&str]| job.spawn(node(&job, node_rank, "127.0.0.1", port, args));
    for ended in [start(0, &[]), start(1, &["--set", set])].map(Running::wait) {
        assert_refused(&job, &ended, &[2], WAITED, &[key, value, "node 0", "node 1"]);
    }
}

fn different_ranks(set: &str) {
    let job = Job::new();
    let id = random_job_id();
    let args: [&[&str]; 3] = [&[], &["--set", set], &[]];
    let tasks = args.iter().enumerate().map(|(rank, args)| Task::start(&job, id, rank, 3, args));
    let mut tasks: Vec<Task> = tasks.collect();
    for task in &mut tasks {
        let (status, stderr) = task.wait(&job);
        assert_eq!(status, Some(2), "{stderr}");
    }
    let stderr = job.read("task-1");
    assert!(stderr.contains("expected the same config") && stderr.contains("on rank 0"), "{stderr}");
    assert!(job.read("task-0").contains("rank 1 (host "), "{}", job.read("task-0"));
    assert!(job.steps().is_empty());
}
