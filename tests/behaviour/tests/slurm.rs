//! The files of `scripts/slurm/` on a real SLURM of two nodes, which `scripts/local_slurm.sh` makes of this machine. Where
//! it cannot, the tests say why and pass.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::Job;

const SETTINGS: &[&str] = &["--set", "training.steps=5", "--set", "precision.param=fp32"];
const LONG: &[&str] = &["--set", "training.steps=1000000"];
/// Both nodes are one machine, so shared memory reaches both.
const SHM: &[&str] = &["--set", "fsdp.backend=shm"];
/// Shards within a node of two ranks, replicas across.
const HYBRID: &[&str] = &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=2"];

const TIMEOUT: Duration = Duration::from_secs(120);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the repository").to_path_buf()
}

/// The folder of the binaries, beside that of the running test.
fn bin() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.parent().and_then(Path::parent).expect("a target folder").to_path_buf()
}

/// The local SLURM, for one test at a time.
struct Cluster {
    conf: String,
    was_running: bool,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl Cluster {
    /// `None`, with a reason, where there can be none.
    fn start() -> Option<Self> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if !rustix::process::geteuid().is_root() {
            println!("skipped: a SLURM of one's own needs root");
            return None;
        }
        for program in ["munged", "slurmctld", "slurmd", "srun"] {
            // A test installs nothing.
            if Command::new(program).arg("--version").output().is_err() {
                println!("skipped: no {program} on PATH (Debian: slurm-wlm, munge)");
                return None;
            }
        }
        let status = Self::script("status");
        let was_running = status.status.success();
        let started = if was_running { status } else { Self::script("start") };
        if !started.status.success() {
            println!("skipped: local_slurm.sh: {}", String::from_utf8_lossy(&started.stderr));
            return None;
        }
        let stdout = String::from_utf8(started.stdout).expect("text");
        let conf = stdout.trim().strip_prefix("export SLURM_CONF=").expect("what it prints").to_owned();
        Some(Cluster { conf, was_running, _one_at_a_time: guard })
    }

    fn script(verb: &str) -> Output {
        Command::new(root().join("scripts/local_slurm.sh")).arg(verb).output().expect("the script")
    }

    /// One of SLURM's commands, which must succeed; its output.
    fn command(&self, program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).env("SLURM_CONF", &self.conf).output().expect(program);
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Submits one of the project's files with `num_tasks` tasks on each of two nodes, and the arguments for the program.
    fn submit<'a>(&'a self, job: &'a Job, file: &str, num_tasks: usize, args: &[&[&str]]) -> Submitted<'a> {
        let script = root().join("scripts/slurm").join(file);
        let mut sbatch: Vec<String> =
            ["--parsable", "--nodes=2", "--cpus-per-task=1", "--time=5", "--output=log"].map(str::to_owned).into();
        // There are no GPUs here, and no time for a requeue's delay.
        sbatch.extend(["--gpus-per-node=0", "--no-requeue"].map(str::to_owned));
        sbatch.push(format!("--ntasks-per-node={num_tasks}"));
        sbatch.push(format!("--chdir={}", job.path("").display()));
        sbatch.push(format!("--export=ALL,FSDP_BIN={}", bin().display()));
        sbatch.push(script.display().to_string());
        sbatch.extend(args.concat().into_iter().map(str::to_owned));
        let _ = std::fs::remove_file(job.path("log"));
        let id = self.command("sbatch", &sbatch.iter().map(String::as_str).collect::<Vec<_>>());
        Submitted { cluster: self, job, id }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.was_running {
            Self::script("stop");
        }
    }
}

/// A job of SLURM's.
struct Submitted<'a> {
    cluster: &'a Cluster,
    job: &'a Job,
    id: String,
}

impl Submitted<'_> {
    fn log(&self) -> String {
        self.job.read("log")
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < TIMEOUT, "no {what} after {TIMEOUT:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the end: state and `status:signal` of the batch script.
    fn end(&self) -> (String, String) {
        let show = || self.cluster.command("scontrol", &["--oneliner", "show", "job", &self.id]);
        let field = |text: &str, name: &str| {
            let value = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
        };
        self.wait_until("end", |_| {
            let state = field(&show(), "JobState");
            !["PENDING", "CONFIGURING", "RUNNING", "COMPLETING"].contains(&state.as_str())
        });
        let text = show();
        (field(&text, "JobState"), field(&text, "ExitCode"))
    }

    fn finish(&self) {
        assert_eq!(self.end(), ("COMPLETED".to_owned(), "0:0".to_owned()), "{}", self.log());
    }
}

impl Drop for Submitted<'_> {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = Command::new("scancel")
            .args(["--signal=KILL", "--full", &self.id])
            .env("SLURM_CONF", &self.cluster.conf)
            .output();
    }
}

#[test]
fn mpi_trains_over_two_nodes_to_the_losses_of_shared_memory() {
    let Some(cluster) = Cluster::start() else { return };
    let features = Command::new(bin().join("fsdp-train")).arg("--features").output().expect("fsdp-train");
    if !String::from_utf8_lossy(&features.stdout).lines().any(|line| line == "mpi") {
        return println!("skipped: fsdp-train is built without --features fsdp-train/mpi");
    }
    let plugins = cluster.command("srun", &["--mpi=list"]);
    if !plugins.contains("pmix") {
        return println!("skipped: this srun has no pmix: {plugins}");
    }
    for (num_tasks, more) in [(1, &[][..]), (2, HYBRID)] {
        let (slurm, shm) = (Job::new(), Job::new());
        shm.finish(2 * num_tasks, &[SETTINGS, more].concat());
        cluster.submit(&slurm, "mpi.sbatch", num_tasks, &[&["job.toml"], SETTINGS, more]).finish();
        slurm.assert_losses_of(&shm);
        assert!(slurm.exported() == shm.exported(), "{num_tasks} ranks a node: the exported models differ");
    }
    let (slurm, shm) = (Job::quickstart(), Job::quickstart());
    shm.finish(2, SETTINGS);
    cluster.submit(&slurm, "mpi.sbatch", 1, &[&["job.toml"], SETTINGS]).finish();
    slurm.assert_losses_of(&shm);
}

#[test]
fn a_launcher_a_node_trains_over_two_nodes() {
    let Some(cluster) = Cluster::start() else { return };
    for (nproc, more) in [("1", &[][..]), ("2", HYBRID)] {
        let (slurm, shm) = (Job::new(), Job::new());
        shm.finish(2 * nproc.parse::<usize>().expect("a number"), &[SETTINGS, more].concat());
        let args = [&["--nproc", nproc, "job.toml"], SETTINGS, SHM, more];
        cluster.submit(&slurm, "one_task_per_node.sbatch", 1, &args).finish();
        slurm.assert_losses_of(&shm);
        assert!(slurm.exported() == shm.exported(), "{nproc} ranks a node: the exported models differ");
    }
}

#[test]
fn a_task_a_rank_trains_over_two_nodes_without_a_launcher() {
    let Some(cluster) = Cluster::start() else { return };
    let (slurm, shm) = (Job::new(), Job::new());
    shm.finish(4, SETTINGS);
    cluster.submit(&slurm, "one_task_per_gpu.sbatch", 2, &[&["job.toml"], SETTINGS, SHM]).finish();
    slurm.assert_losses_of(&shm);

    // Over nodes, CPU ranks need MPI unless told otherwise.
    let job = Job::new();
    let refused = cluster.submit(&job, "one_task_per_gpu.sbatch", 1, &[&["job.toml"]]);
    assert_eq!(refused.end(), ("FAILED".to_owned(), "2:0".to_owned()), "{}", refused.log());
    assert!(refused.log().contains("srun --mpi=pmix"), "{}", refused.log());
}

#[test]
fn a_cancelled_or_signalled_job_stops_with_a_checkpoint_and_goes_on() {
    let Some(cluster) = Cluster::start() else { return };
    for (file, args) in [
        ("one_task_per_gpu.sbatch", [&["job.toml"], LONG, SHM]),
        ("one_task_per_node.sbatch", [&["--nproc=1", "job.toml"][..], LONG, SHM]),
    ] {
        let job = Job::new();
        for round in 1..=2 {
            let submitted = cluster.submit(&job, file, 1, &args);
            let num_steps = job.steps().len();
            submitted.wait_until("step", |_| job.steps().len() > num_steps + 10);
            if round == 1 {
                // To all processes of the step, twice; the batch shell is ended too.
                cluster.command("scancel", &[&submitted.id]);
                assert_eq!(submitted.end().0, "CANCELLED");
                submitted.wait_until("end of srun", |s| s.log().contains("xited with exit code 75"));
            } else {
                // srun brings output later than the file system does.
                submitted.wait_until("resumed run", |s| s.log().contains("resuming after step"));
                cluster.command("scancel", &["--signal=USR1", &submitted.id]);
                assert_eq!(submitted.end(), ("FAILED".to_owned(), "75:0".to_owned()), "{}", submitted.log());
            }
            let last = job.checkpoints().pop();
            assert_eq!(last, Some(format!("step-{:08}", job.steps().len())), "{file}: {}", submitted.log());
        }
    }
}
