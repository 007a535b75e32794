//! A real SLURM of two nodes, which `scripts/local_slurm.sh` makes of this machine, and jobs on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::job::Job;

/// No job of a tiny model takes longer.
const TIMEOUT: Duration = Duration::from_secs(240);

/// States of a job that SLURM is done with; others may still become them, or pending again.
const FINAL: &[&str] = &["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"];

/// The local SLURM, for one test at a time. Dropped, it stops, unless it ran before.
#[derive(Debug)]
pub struct Cluster {
    conf: String,
    was_running: bool,
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// A job of SLURM's. Dropped, it is cancelled.
#[derive(Debug)]
pub struct Submitted<'a> {
    cluster: &'a Cluster,
    job: &'a Job,
    pub id: String,
}

impl Cluster {
    /// # Errors
    /// Why there can be none here.
    pub fn start() -> Result<Self, String> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if !rustix::process::geteuid().is_root() {
            return Err("a SLURM of one's own needs root".to_owned());
        }
        for program in ["munged", "slurmctld", "slurmd", "srun"] {
            // A test installs nothing.
            if Command::new(program).arg("--version").output().is_err() {
                return Err(format!("no {program} on PATH (Debian: slurm-wlm, munge)"));
            }
        }
        let status = Self::script("status");
        let was_running = status.status.success();
        let started = if was_running { status } else { Self::script("start") };
        if !started.status.success() {
            return Err(format!("local_slurm.sh: {}", String::from_utf8_lossy(&started.stderr)));
        }
        let stdout = String::from_utf8(started.stdout).expect("text");
        let conf = stdout.trim().strip_prefix("export SLURM_CONF=").expect("what it prints").to_owned();
        Ok(Cluster { conf, was_running, _one_at_a_time: guard })
    }

    fn script(verb: &str) -> Output {
        Command::new(root().join("scripts/local_slurm.sh")).arg(verb).output().expect("the script")
    }

    /// Its slurm.conf.
    pub fn conf(&self) -> &Path {
        Path::new(&self.conf)
    }

    /// One of SLURM's commands, which must succeed; its output.
    #[track_caller]
    pub fn command(&self, program: &str, args: &[&str]) -> String {
        self.succeed(Command::new(program).args(args))
    }

    #[track_caller]
    fn succeed(&self, command: &mut Command) -> String {
        let output = command.env("SLURM_CONF", &self.conf).output().expect("a command of SLURM");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Submits a job over two nodes, in the job's folder, with `args` for `sbatch` and the job's own variables; what it
    /// prints is in `log` there.
    #[track_caller]
    pub fn submit<'a>(&'a self, job: &'a Job, variables: &[(&str, &str)], args: &[&str]) -> Submitted<'a> {
        let chdir = format!("--chdir={}", job.path("").display());
        let mut command = Command::new("sbatch");
        command.args(["--parsable", "--nodes=2", "--cpus-per-task=1", "--output=log", &chdir]).args(args);
        let id = self.succeed(command.envs(variables.iter().copied()));
        Submitted { cluster: self, job, id }
    }

    /// Whether ranks can be started with `srun --mpi=pmix`: `worker` is built for it, and SLURM has the plugin.
    ///
    /// # Errors
    /// Why not.
    pub fn has_mpi(&self, worker: &Path) -> Result<(), String> {
        let features = Command::new(worker).arg("--features").output().expect("fsdp-train");
        if !String::from_utf8_lossy(&features.stdout).lines().any(|line| line == "mpi") {
            return Err("fsdp-train is built without --features fsdp-train/mpi".to_owned());
        }
        let plugins = self.command("srun", &["--mpi=list"]);
        if plugins.contains("pmix") { Ok(()) } else { Err(format!("this srun has no pmix: {plugins}")) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.was_running {
            Self::script("stop");
        }
    }
}

impl Submitted<'_> {
    pub fn log(&self) -> String {
        self.job.read("log")
    }

    /// A field of `scontrol show job`.
    pub fn field(&self, name: &str) -> String {
        let text = self.cluster.command("scontrol", &["--oneliner", "show", "job", &self.id]);
        let value = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
    }

    #[track_caller]
    pub fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < TIMEOUT, "no {what} after {TIMEOUT:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the end: state and `status:signal` of the batch script.
    #[track_caller]
    pub fn end(&self) -> (String, String) {
        self.wait_until("end", |submitted| FINAL.contains(&submitted.field("JobState").as_str()));
        (self.field("JobState"), self.field("ExitCode"))
    }

    /// Waits for an end that must be a good one.
    #[track_caller]
    pub fn finish(&self) {
        assert_eq!(self.end(), ("COMPLETED".to_owned(), "0:0".to_owned()), "{}", self.log());
    }
}

impl Drop for Submitted<'_> {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        for args in [&["--signal=KILL", "--full", &self.id][..], &[&self.id]] {
            let _ = Command::new("scancel").args(args).env("SLURM_CONF", &self.cluster.conf).output();
        }
    }
}

/// One of the project's batch files.
pub fn batch_file(name: &str) -> PathBuf {
    root().join("scripts/slurm").join(name)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the repository").to_path_buf()
}
