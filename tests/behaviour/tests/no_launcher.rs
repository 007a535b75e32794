//! Ranks that no launcher of ours started: processes with the variables that `srun` sets, without SLURM. They agree on the
//! config, notice each other's ends, and come to one verdict.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::processes::send;
use rustix::process::Signal;

/// So many steps that whatever is to happen happens before the end.
const LONG: &[&str] = &["--set", "training.steps=1000000"];

/// Ranks end each other within 5 s; the rest is for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// `fsdp-train` beside the running test.
fn worker() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.parent().and_then(Path::parent).expect("a target folder").join("fsdp-train")
}

/// A step of one node. Killed when dropped.
struct Step<'a> {
    job: &'a Job,
    id: u32,
    ranks: Vec<Child>,
}

impl<'a> Step<'a> {
    /// No task yet.
    fn new(job: &'a Job) -> Self {
        // Also the store's port follows from it.
        static NUM_STEPS: AtomicU32 = AtomicU32::new(0);
        let id = std::process::id() * 100 + NUM_STEPS.fetch_add(1, Ordering::Relaxed);
        Step { job, id, ranks: Vec::new() }
    }

    /// `num_ranks` tasks with the same arguments.
    fn start(job: &'a Job, num_ranks: usize, args: &[&str]) -> Self {
        let mut step = Self::new(job);
        for _ in 0..num_ranks {
            step.add(num_ranks, &[&["job.toml"], args].concat(), &[]);
        }
        step
    }

    /// One more task, of `num_ranks`.
    fn add(&mut self, num_ranks: usize, args: &[&str], vars: &[(&str, &str)]) {
        self.add_in("", num_ranks, args, vars);
    }

    /// One more task of several nodes, which have `per_node` tasks, on `node`.
    fn add_on(&mut self, (node, local): (usize, usize), per_node: &str, dir: &str, args: &[&str]) {
        let per: Vec<usize> = per_node.split(',').map(|num| num.parse().expect("a number")).collect();
        let nodes = ["localhost", "other", "third"][..per.len()].join(",");
        let numbers = [per.len(), node, local].map(|number| number.to_string());
        let [num_nodes, node, local] = numbers.each_ref().map(String::as_str);
        let vars = [
            ("SLURM_STEP_NODELIST", nodes.as_str()),
            ("SLURM_STEP_NUM_NODES", num_nodes),
            ("SLURM_STEP_TASKS_PER_NODE", per_node),
            ("SLURM_NODEID", node),
            ("SLURM_LOCALID", local),
        ];
        // All are one machine, so shared memory reaches all.
        let args = [&["job.toml", "--set", "fsdp.backend=shm"], args].concat();
        self.add_in(dir, per.iter().sum(), &args, &vars);
    }

    /// One more task, started in the folder `dir` of the job.
    fn add_in(&mut self, dir: &str, num_ranks: usize, args: &[&str], vars: &[(&str, &str)]) {
        let rank = self.ranks.len();
        let output = File::create(self.job.path(&format!("task-{}-{rank}", self.id))).expect("a folder of the test");
        let mut command = Command::new(worker());
        command.current_dir(self.job.path(dir)).args(args).env("OMP_NUM_THREADS", "1");
        for (name, value) in [
            ("JOB_ID", self.id.to_string()),
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
        command.envs(vars.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(output);
        self.ranks.push(command.spawn().expect("fsdp-train: run `cargo build` first"));
    }

    fn send(&self, rank: usize, signal: Signal) {
        send(self.ranks[rank].id().cast_signed(), signal);
    }

    /// What the rank wrote to stderr.
    fn stderr(&self, rank: usize) -> String {
        self.job.read(&format!("task-{}-{rank}", self.id))
    }

    fn wait_until(&mut self, what: &str, holds: impl Fn(&Job) -> bool) {
        let start = Instant::now();
        while !holds(self.job) {
            assert!(start.elapsed() < TIMEOUT, "no {what}: {}", self.stderr(0));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_for_steps(&mut self, num: usize) {
        self.wait_until("steps", |job| job.steps().len() >= num);
    }

    /// The statuses of all ranks; `None` for one that a signal ended.
    fn wait(&mut self) -> Vec<Option<i32>> {
        let start = Instant::now();
        let mut statuses = Vec::new();
        for rank in 0..self.ranks.len() {
            loop {
                if let Some(status) = self.ranks[rank].try_wait().expect("a child") {
                    statuses.push(status.code());
                    break;
                }
                assert!(start.elapsed() < TIMEOUT, "rank {rank} lives on: {}", self.stderr(rank));
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        statuses
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // An error means that it has ended, which is what is wanted.
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

#[test]
fn ranks_train_to_the_bits_of_a_launched_run() {
    let (alone, launched) = (Job::new(), Job::new());
    launched.finish(2, &[]);
    let mut step = Step::start(&alone, 2, &["--set", "metrics.log_every=1"]);
    assert_eq!(step.wait(), [Some(0), Some(0)], "{}", step.stderr(0));
    assert_eq!(alone.curve(), launched.curve());
    assert!(alone.exported() == launched.exported(), "the exported models differ");
    assert!(alone.read("out/config.toml").contains("log_every = 1"), "the resolved config");
    // Rank 0 alone speaks.
    assert!(step.stderr(0).contains("step: ") && step.stderr(1).is_empty(), "{}", step.stderr(1));

    // A finished run is done at once.
    let mut again = Step::start(&alone, 2, &["--set", "metrics.log_every=1"]);
    assert_eq!(again.wait(), [Some(0), Some(0)], "{}", again.stderr(0));
}

#[test]
fn a_wrong_config_is_said_once_and_ends_all_with_status_2() {
    let job = Job::new();
    let mut step = Step::start(&job, 3, &["--set", "training.stepz=5"]);
    assert_eq!(step.wait(), [Some(2); 3]);
    assert!(step.stderr(0).contains("[training] stepz") && step.stderr(0).contains("did you mean steps?"));
    assert_eq!((step.stderr(1).as_str(), step.stderr(2).as_str()), ("", ""));
    assert!(!job.path("out").exists());
}

#[test]
fn a_model_of_the_hub_is_left_to_the_launcher() {
    let job = Job::new();
    let mut step = Step::start(&job, 2, &["--set", "model.path=org/name"]);
    assert_eq!(step.wait(), [Some(2); 2], "{}", step.stderr(0));
    let told = step.stderr(0);
    assert!(told.contains("[model] path: expected a folder") && told.contains("fsdp-launch check"), "{told}");
}

#[test]
fn a_config_that_differs_between_ranks_is_refused_with_both_digests() {
    let job = Job::new();
    job.write("other.toml", job.read("job.toml") + "# another text\n");
    for other in [&["other.toml"][..], &["job.toml", "--set", "training.seed=1"]] {
        let mut step = Step::new(&job);
        step.add(3, &["job.toml"], &[]);
        step.add(3, other, &[]);
        step.add(3, &["job.toml"], &[]);
        assert_eq!(step.wait(), [Some(2); 3], "{other:?}: {}", step.stderr(1));
        assert!(step.stderr(1).contains("expected the same config") && step.stderr(1).contains("on rank 0"));
        assert!(step.stderr(0).contains("the first failure: rank 1 (host "), "{}", step.stderr(0));
    }
    assert!(job.steps().is_empty());
}

#[test]
fn a_config_that_one_rank_does_not_find_is_bad_input() {
    let job = Job::new();
    let mut step = Step::new(&job);
    step.add(2, &["job.toml"], &[]);
    step.add(2, &["missing.toml"], &[]);
    assert_eq!(step.wait(), [Some(2); 2], "{}", step.stderr(1));
    assert!(step.stderr(1).contains("missing.toml: expected a readable TOML config"), "{}", step.stderr(1));
}

#[test]
fn a_task_of_an_interactive_job_trains() {
    let job = Job::new();
    let mut step = Step::new(&job);
    step.add(1, &["job.toml"], &[("SLURM_JOB_NAME", "interactive")]);
    assert_eq!(step.wait(), [Some(0)], "{}", step.stderr(0));
}

#[test]
fn nodes_that_do_not_share_the_output_folder_are_refused_before_the_first_step() {
    let job = Job::new();
    let absolute = format!("{:?}", job.path("out"));
    job.replace("job.toml", &absolute, "\"out\"");
    std::fs::create_dir(job.path("other")).expect("a folder of the test");
    for name in ["job.toml", "model", "train.jsonl"] {
        std::os::unix::fs::symlink(job.path(name), job.path("other").join(name)).expect("a folder of the test");
    }
    for (dir, expected) in [("other", 2), ("", 0)] {
        let mut step = Step::new(&job);
        step.add_on((0, 0), "1,1", "", &["--set", "fsdp.timeout_secs=5"]);
        step.add_on((1, 0), "1,1", dir, &["--set", "fsdp.timeout_secs=5"]);
        assert_eq!(step.wait(), [Some(expected); 2], "{}", step.stderr(1));
        if expected == 2 {
            let (stderr, path) = (step.stderr(1), job.path("other/out/logs/shared-"));
            assert!(stderr.contains(&format!("does not see {}", path.display())), "{stderr}");
            assert!(stderr.contains("on a file system that all nodes share"), "{stderr}");
            assert!(job.steps().is_empty());
        }
    }
    let logs: Vec<_> = std::fs::read_dir(job.path("out/logs")).expect("logs").flatten().collect();
    assert!(logs.iter().all(|entry| !entry.file_name().to_string_lossy().contains("shared-")), "{logs:?}");
}

#[test]
fn sharding_that_does_not_go_with_the_nodes_is_told() {
    const HYBRID: &[&str] = &["--set", "fsdp.strategy=hybrid_shard"];
    let job = Job::new();
    let mut uneven = Step::new(&job);
    for place in [(0, 0), (0, 1), (1, 0)] {
        uneven.add_on(place, "2,1", "", HYBRID);
    }
    assert_eq!(uneven.wait(), [Some(2); 3], "{}", uneven.stderr(0));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("Linux");
    let host = host.trim();
    let expected = format!("got 2 on {host}, 1 on {host}; set it to a divisor of the 3 ranks");
    assert!(uneven.stderr(0).contains(&expected), "{}", uneven.stderr(0));

    // As srun --distribution=cyclic numbers tasks.
    let mut cyclic = Step::new(&job);
    for place in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        cyclic.add_on(place, "2,2", "", HYBRID);
    }
    assert_eq!(cyclic.wait(), [Some(0); 4], "{}", cyclic.stderr(0));
    let stderr = cyclic.stderr(0);
    assert!(stderr.contains("share the shards of each unit, but not a node") && stderr.contains("=block"), "{stderr}");
}

#[test]
fn a_rank_with_a_broken_driver_does_not_fall_to_the_cpu() {
    if Path::new("/dev/nvidia0").exists() {
        return println!("skipped: the driver here is whole");
    }
    let job = Job::new();
    let mut step = Step::new(&job);
    step.add(2, &["job.toml"], &[]);
    step.add(2, &["job.toml"], &[("CUDA_VISIBLE_DEVICES", "0")]);
    assert_eq!(step.wait(), [Some(2); 2], "{}", step.stderr(1));
    assert!(step.stderr(1).contains("CUDA_VISIBLE_DEVICES is \"0\", but "), "{}", step.stderr(1));
    assert!(step.stderr(0).contains("the first failure: rank 1 (host "), "{}", step.stderr(0));
}

#[test]
fn a_port_of_a_program_that_does_not_answer_as_a_store_is_refused() {
    let job = Job::new();
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let speaks = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let ports = [&silent, &speaks].map(|listener| listener.local_addr().expect("bound").port().to_string());
    let mut steps = ports.each_ref().map(|port| {
        let mut step = Step::new(&job);
        for _ in 0..2 {
            step.add(2, &["job.toml"], &[("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)]);
        }
        step
    });
    let (mut stream, _) = speaks.accept().expect("rank 1");
    std::io::Write::write_all(&mut stream, b"SSH-2.0-OpenSSH_9.2\r\n").expect("a reader");
    for (step, why) in steps.iter_mut().zip(["no reply within 20s", "another program's port"]) {
        assert_eq!(step.wait(), [Some(2), Some(2)], "{}", step.stderr(1));
        let stderr = step.stderr(1);
        assert!(stderr.contains(why) && stderr.contains("choose another MASTER_PORT"), "{stderr}");
    }
}

#[test]
fn a_rank_of_a_launcher_that_is_gone_does_not_wait_for_it() {
    let job = Job::new();
    let gone = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port").local_addr().expect("bound");
    let start = Instant::now();
    let output = Command::new(worker())
        .current_dir(job.path(""))
        .arg("job.toml")
        // As fsdp-launch --backend mpi has them from mpirun.
        .envs(
            ["RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"]
                .map(|name| (format!("OMPI_COMM_WORLD_{name}"), if name.ends_with("SIZE") { "1" } else { "0" })),
        )
        .envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &gone.port().to_string()), ("FSDP_PREPARED", "1")])
        .output()
        .expect("fsdp-train");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no connection to the store") && start.elapsed() < TIMEOUT / 2, "{stderr}");
}

#[test]
fn readers_that_are_gone_do_not_change_the_status() {
    for (args, expected) in [(&["--features"][..], 0), (&[], 2), (&["job.toml"], 2)] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let second = writer.try_clone().expect("a pipe");
        let status = Command::new(worker()).args(args).stdout(writer).stderr(second).status().expect("fsdp-train");
        assert_eq!(status.code(), Some(expected), "{args:?}");
    }
}

#[test]
fn a_killed_rank_ends_the_others_and_is_named() {
    for (every_steps, resume, expected, advice) in [
        (0, "auto", 1, "no checkpoint is committed"),
        (20, "auto", 75, "the same command goes on"),
        (20, "never", 75, "with --set checkpoint.resume=auto it goes on"),
    ] {
        let job = Job::new();
        let every = format!("checkpoint.every_steps={every_steps}");
        let resume = format!("checkpoint.resume={resume}");
        let mut step = Step::start(&job, 3, &[LONG, &["--set", &every, "--set", &resume]].concat());
        step.wait_for_steps(30);
        step.wait_until("checkpoint", |job| every_steps == 0 || !job.checkpoints().is_empty());
        let pid = step.ranks[1].id();
        step.send(1, Signal::KILL);
        assert_eq!(step.wait(), [Some(expected), None, Some(expected)], "{}", step.stderr(0));
        let stderr = step.stderr(0);
        let named = stderr.lines().find(|line| line.contains("the first failure: rank 1 (host ")).unwrap_or_default();
        assert!(named.contains(&format!("pid {pid}")) && named.contains("killed"), "{stderr}");
        assert!(stderr.contains(advice), "{stderr}");
        assert!(step.stderr(2).contains("rank 2 (host "), "{}", step.stderr(2));
    }
}

#[test]
fn no_rank_outlives_rank_0() {
    let job = Job::new();
    let mut step = Step::start(&job, 3, &[LONG, &["--set", "checkpoint.every_steps=20"]].concat());
    step.wait_until("checkpoint", |job| !job.checkpoints().is_empty());
    let start = Instant::now();
    step.send(0, Signal::KILL);
    assert_eq!(step.wait(), [None, Some(75), Some(75)]);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    for rank in [1, 2] {
        assert!(step.stderr(rank).contains("rank 0"), "{}", step.stderr(rank));
    }
    // The lock went with its holder.
    let mut again = Step::start(&job, 3, LONG);
    let stderr = format!("task-{}-0", again.id);
    again.wait_until("resumed run", |job| job.read(&stderr).contains("resuming after step"));
}

#[test]
fn a_suspended_rank_does_not_keep_the_others() {
    let job = Job::new();
    let mut step = Step::start(&job, 2, &[LONG, &["--set", "fsdp.timeout_secs=2"]].concat());
    step.wait_for_steps(10);
    step.send(1, Signal::STOP);
    let start = Instant::now();
    let status = loop {
        if let Some(status) = step.ranks[0].try_wait().expect("a child") {
            break status;
        }
        assert!(start.elapsed() < TIMEOUT);
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(1));
    assert!(step.stderr(0).contains("rank 1 did not "), "{}", step.stderr(0));
    // The last collectives of who waited.
    let text = job.read("out/logs/flight-rank-0.jsonl");
    let calls: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert!((20..=256).contains(&calls.len()), "{} calls", calls.len());
    let numbers: Vec<u64> = calls.iter().map(|call| call["seq"].as_u64().expect("a number")).collect();
    assert!(numbers.is_sorted() && calls.iter().all(|call| call["op"].is_string() && call["issued_us"].is_u64()));
    assert!(calls[0]["done_us"].is_u64(), "{text}");
    // Awake again, it finds that the run is over.
    step.send(1, Signal::CONT);
    assert_eq!(step.wait(), [Some(1), Some(1)]);
}

#[test]
fn a_signal_to_one_rank_has_all_finish_the_step_and_save() {
    let job = Job::new();
    let mut step = Step::start(&job, 3, LONG);
    step.wait_for_steps(10);
    // Schedulers send it twice.
    step.send(2, Signal::TERM);
    step.send(2, Signal::TERM);
    assert_eq!(step.wait(), [Some(75); 3], "{}", step.stderr(0));
    assert_eq!(job.checkpoints(), [format!("step-{:08}", job.steps().len())]);
}

#[test]
fn one_run_at_a_time_has_a_folder_and_a_port() {
    let job = Job::new();
    let mut step = Step::start(&job, 2, LONG);
    step.wait_for_steps(1);
    let mut second = Step::start(&job, 2, LONG);
    assert_eq!(second.wait(), [Some(2), Some(2)]);
    let holder = format!("in use by fsdp-train (pid {} on host ", step.ranks[0].id());
    assert!(second.stderr(0).contains(&holder), "{}", second.stderr(0));
    assert_eq!(second.stderr(1), "");

    let port = (20000 + u64::from(step.id) * 31 % 10000).to_string();
    let mut third = Step::new(&job);
    for _ in 0..2 {
        third.add(2, &["job.toml", "--set", "output.dir=other"], &[("MASTER_PORT", &port)]);
    }
    assert_eq!(third.wait(), [Some(2), Some(2)]);
    assert!(third.stderr(0).contains(&format!("port {port} of")), "{}", third.stderr(0));
    assert!(third.stderr(1).contains("is of another run"), "{}", third.stderr(1));

    let num_steps = job.steps().len();
    step.wait_for_steps(num_steps + 1);
}
