//! A folder with all that a job needs, and runs of the launcher over it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use safetensors::tensor::Dtype;
use serde_json::Value;
use tempfile::TempDir;

use crate::{model, processes};

/// No run of a tiny model takes longer, so one that does hangs.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A job in a folder of its own, which goes when this value does.
#[derive(Debug)]
pub struct Job {
    dir: TempDir,
}

/// What a run left.
#[derive(Debug)]
pub struct Ended {
    /// The exit status; 128 + signal where one ended the launcher.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// A launcher that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running<'a> {
    job: &'a Job,
    launcher: Child,
    started: Instant,
    /// Sets the outputs of this run apart from those of others over the same job.
    number: usize,
}

impl Default for Job {
    fn default() -> Self {
        Self::new()
    }
}

impl Job {
    /// A job of 20 steps on 30 sequences of tokens that is right in all parts; nothing runs yet.
    pub fn new() -> Self {
        let job = Job { dir: tempfile::Builder::new().prefix("behaviour-").tempdir().expect("a temporary folder") };
        std::fs::create_dir(job.path("model")).expect("an empty folder");
        job.write("model/config.json", model::CONFIG);
        job.write("model/tokenizer.json", model::tokenizer());
        model::write(&job.path("model/model.safetensors"), &model::tensors(&job.path("model"), Dtype::F32));
        let lines: Vec<String> = (0..30)
            .map(|line| {
                let ids: Vec<String> = (0..5 + line % 4).map(|i| ((line * 11 + i * i * 3) % 48).to_string()).collect();
                format!("{{\"input_ids\": [{}]}}\n", ids.join(", "))
            })
            .collect();
        job.write("train.jsonl", lines.concat());
        // The output folder is absolute, so that no two jobs' processes look alike.
        let toml = format!(
            "[model]\npath = \"model\"\n\
             [optimizer]\nlr = 1e-3\n\
             [training]\nsteps = 20\nseq_len = 8\nmicro_batch_size = 2\n\
             [data]\ntrain = [\"train.jsonl\"]\n\
             [checkpoint]\nevery_steps = 0\n\
             [output]\ndir = {:?}\n",
            job.path("out")
        );
        job.write("job.toml", toml);
        job
    }

    /// The quickstart's own config and data, without its checkpoints and prompts.
    pub fn quickstart() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let job = Job::new();
        let script = root.join("scripts/make_quickstart.py");
        let made = Command::new("python3").arg(script).current_dir(job.dir.path()).status().expect("python3");
        assert!(made.success(), "the quickstart's data cannot be made");
        job.write("job.toml", std::fs::read(root.join("configs/quickstart.toml")).expect("the quickstart's config"));
        job.replace("job.toml", "\"out/quickstart\"", &format!("{:?}", job.path("out")));
        job.replace("job.toml", "every_steps = 500", "every_steps = 0");
        let text = job.read("job.toml");
        let (start, rest) = text.split_once("prompts = [").expect("prompts");
        let (_, end) = rest.split_once(']').expect("their end");
        job.write("job.toml", format!("{start}prompts = []{end}"));
        job
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).expect("a folder of the test");
    }

    /// A file's text; empty where there is none.
    pub fn read(&self, name: &str) -> String {
        std::fs::read(self.path(name)).map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into_owned())
    }

    /// Replaces `from`, which must be there, in a file.
    pub fn replace(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{from:?} is not in {name}");
        self.write(name, text.replace(from, to));
    }

    /// The launcher in the job's folder, with the arguments in front of the config.
    pub fn command(&self, nproc: usize, args: &[&str]) -> Command {
        built("fsdp-train");
        self.command_of(&built("fsdp-launch"), nproc, args)
    }

    /// The same with workers that do what `fault` says; see `crates/train/src/faults.rs`.
    pub fn faulty_command(&self, nproc: usize, args: &[&str], fault: &str) -> Command {
        // The launcher's worker is the one beside it.
        for (program, name) in [("fsdp-launch", "fsdp-launch"), ("fsdp-train-faults", "fsdp-train")] {
            let (from, to) = (built(program), self.path("bin").join(name));
            std::fs::create_dir_all(self.path("bin")).expect("a folder of the test");
            if !to.exists() {
                // The target folder may be on another file system.
                std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(&from, &to).map(drop)).expect("a copy");
            }
        }
        let mut command = self.command_of(&self.path("bin/fsdp-launch"), nproc, args);
        command.env("FSDP_FAULT", fault);
        command
    }

    fn command_of(&self, launcher: &Path, nproc: usize, args: &[&str]) -> Command {
        let mut command = Command::new(launcher);
        command
            .current_dir(self.dir.path())
            .args(args)
            .args(["--nproc", &nproc.to_string(), "job.toml"])
            // One thread a rank: tests run beside each other.
            .env("OMP_NUM_THREADS", "1")
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null());
        command
    }

    /// Starts a launcher that [`Job::command`] made; what it prints goes to files of the job.
    pub fn spawn(&self, mut command: Command) -> Running<'_> {
        let number = (0..).find(|n| !self.path(&format!("stderr-{n}")).exists()).expect("a free number");
        let output = |name: &str| File::create(self.path(&format!("{name}-{number}"))).expect("a folder of the test");
        let launcher = command.stdout(output("stdout")).stderr(output("stderr")).spawn().expect("the launcher");
        Running { job: self, launcher, started: Instant::now(), number }
    }

    pub fn start(&self, nproc: usize, args: &[&str]) -> Running<'_> {
        self.spawn(self.command(nproc, args))
    }

    pub fn run(&self, nproc: usize, args: &[&str]) -> Ended {
        self.start(nproc, args).wait()
    }

    /// Runs to the end, which must be a good one.
    pub fn finish(&self, nproc: usize, args: &[&str]) -> Ended {
        let ended = self.run(nproc, args);
        assert_eq!(ended.status, 0, "{args:?}: {}", ended.stderr);
        ended
    }

    /// The whole lines of `out/metrics.jsonl` that are of steps.
    pub fn steps(&self) -> Vec<Value> {
        let text = self.read("out/metrics.jsonl");
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let lines = whole.map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{line}: {e}")));
        lines.filter(|line| line["loss"].is_number()).collect()
    }

    /// The loss of each step.
    pub fn losses(&self) -> Vec<f64> {
        self.steps().iter().map(|line| line["loss"].as_f64().expect("a step has a loss")).collect()
    }

    /// As many steps as `expected` has had, at least one, with the same losses up to 1e-6 of each.
    #[track_caller]
    pub fn assert_losses_of(&self, expected: &Job) {
        let (got, expected) = (self.losses(), expected.losses());
        assert!(got.len() == expected.len() && !got.is_empty(), "{} steps, not {}", got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-6 * expected, "a loss of {got}, expected {expected}");
        }
    }

    /// Step, loss and gradient norm of each step, as written: the digits name a number's bits.
    pub fn curve(&self) -> Vec<[Value; 3]> {
        self.steps().iter().map(|line| ["step", "loss", "grad_norm"].map(|key| line[key].clone())).collect()
    }

    /// Name and bytes of every file of the exported model.
    pub fn exported(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.path("out/hf")).expect("an exported model");
        entries
            .map(|entry| {
                let entry = entry.expect("an entry");
                let bytes = std::fs::read(entry.path()).expect("a readable file");
                (entry.file_name().to_string_lossy().into_owned(), bytes)
            })
            .collect()
    }

    /// The curve and the exported bytes are those of `expected`.
    #[track_caller]
    pub fn assert_bits_of(&self, expected: &Job) {
        assert_eq!(self.curve(), expected.curve());
        assert!(self.exported() == expected.exported(), "the exported models differ");
    }

    /// Names of the committed checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("out/checkpoints")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter(|name| name.len() == "step-00000000".len()).collect();
        names.sort();
        names
    }

    /// Processes that were started in the job's folder, children of ranks included.
    pub fn survivors(&self) -> Vec<i32> {
        let dir = self.dir.path().canonicalize().expect("a folder of the test");
        let entries = std::fs::read_dir("/proc").expect("Linux").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == dir)).collect()
    }

    /// Fails if one of [`Job::survivors`] is left after `patience`.
    #[track_caller]
    pub fn assert_no_survivors(&self, patience: Duration) {
        let start = Instant::now();
        while !self.survivors().is_empty() {
            assert!(start.elapsed() < patience, "{:?} are left after {patience:?}", self.survivors());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the workers are started with.
    pub fn resolved_config(&self) -> PathBuf {
        self.path("out/config.toml")
    }
}

impl Running<'_> {
    pub fn pid(&self) -> i32 {
        self.launcher.id() as i32
    }

    pub fn send(&self, signal: Signal) {
        processes::send(self.pid(), signal);
    }

    /// Waits until `what` holds, while the launcher runs.
    pub fn wait_until(&mut self, what: &str, holds: impl Fn(&Job) -> bool) {
        while !holds(self.job) {
            if let Some(status) = self.launcher.try_wait().expect("a child") {
                panic!("{status} before {what}: {}", self.job.read(&format!("stderr-{}", self.number)));
            }
            assert!(self.started.elapsed() < TIMEOUT, "no {what} after {TIMEOUT:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `holds`, or for the launcher's end; whether it holds.
    pub fn wait_until_or_end(&mut self, holds: impl Fn(&Job) -> bool) -> bool {
        while self.launcher.try_wait().expect("a child").is_none() {
            if holds(self.job) {
                return true;
            }
            assert!(self.started.elapsed() < TIMEOUT, "still running after {TIMEOUT:?}: {self:?}");
            std::thread::sleep(Duration::from_micros(100));
        }
        false
    }

    /// Waits until `step` is in the metrics.
    pub fn wait_for_step(&mut self, step: u64) {
        let is_there = |job: &Job| job.steps().last().and_then(|line| line["step"].as_u64()) >= Some(step);
        self.wait_until(&format!("step {step}"), is_there);
    }

    pub fn wait(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.launcher.try_wait().expect("a child") {
                break status;
            }
            assert!(self.started.elapsed() < TIMEOUT, "still running after {TIMEOUT:?}: {self:?}");
            std::thread::sleep(Duration::from_millis(2));
        };
        Ended {
            status: status.code().unwrap_or_else(|| 128 + status.signal().expect("an exit or a signal")),
            stdout: self.job.read(&format!("stdout-{}", self.number)),
            stderr: self.job.read(&format!("stderr-{}", self.number)),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// A binary of the workspace in the target folder of the running program: `target/<profile>/<program>` and
/// `target/<profile>/deps/<test>` -> `target/<profile>/fsdp-launch`.
pub fn built(binary: &str) -> PathBuf {
    let program = std::env::current_exe().expect("the program's own path");
    let mut folder = program.parent().expect("a target folder");
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder = folder.parent().expect("a target folder");
    }
    let profile = if folder.ends_with("release") { " --release" } else { "" };
    let features = match binary {
        "fsdp-train-faults" => " -p fsdp-train --features faults",
        "examples/save_loop" => " -p fsdp-checkpoint --features faults --example save_loop",
        _ => "",
    };
    let path = folder.join(binary);
    assert!(path.exists(), "{binary} is missing: run `cargo build{profile}{features}` first");
    path
}
