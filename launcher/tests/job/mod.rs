//! A folder with all that a job needs, and the launcher beside a worker of the tests in it.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fsdp_plan::{Architecture, units};
use rustix::process::{Pid, Signal, kill_process};

pub struct Job {
    pub dir: tempfile::TempDir,
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

const MODEL: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false
}"#;

const TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 15}, "unk_token": "<unk>"}
}"#;

impl Job {
    /// A job of `num_steps` steps that is right in all parts.
    pub fn new(num_steps: u64) -> Self {
        let job = Self { dir: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() };
        let launcher = Path::new(env!("CARGO_BIN_EXE_fsdp-launch"));
        let worker = launcher.with_file_name("examples").join("scripted_worker");
        assert!(worker.exists(), "{} is built by `cargo test -p fsdp-launch`", worker.display());
        std::fs::create_dir(job.path("bin")).unwrap();
        std::fs::hard_link(launcher, job.path("bin/fsdp-launch")).unwrap();
        std::fs::hard_link(worker, job.path("bin/fsdp-train")).unwrap();
        std::fs::create_dir(job.path("model")).unwrap();
        job.write("model/config.json", MODEL);
        job.write("model/tokenizer.json", TOKENIZER);
        job.write_weights(|_, _| true);
        job.write("data.jsonl", "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5]}\n");
        job.write(
            "job.toml",
            format!(
                "[model]\npath = \"model\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = {num_steps}\nseq_len = 8\n\
                 [data]\ntrain = [\"data.jsonl\"]\n[checkpoint]\nevery_steps = 0\n"
            ),
        );
        job
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Writes the model's tensors, in fp32 and all zero; `change` may change name and shape, or leave a tensor out.
    pub fn write_weights(&self, mut change: impl FnMut(&mut String, &mut Vec<usize>) -> bool) {
        let arch = Architecture::from_config_json(&self.path("model/config.json")).unwrap();
        let mut entries = Vec::new();
        let mut end = 0;
        for param in units::units(&arch).into_iter().flat_map(|unit| unit.params) {
            let (mut name, mut shape) = (param.name, param.shape);
            if change(&mut name, &mut shape) {
                let start = end;
                end += 4 * shape.iter().product::<usize>();
                entries.push(format!(
                    "\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
                ));
            }
        }
        let header = format!("{{{}}}", entries.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + end, 0);
        self.write("model/model.safetensors", bytes);
    }

    /// The launcher, to be started in the job's folder. Signals that the tests' own starter ignores (`nohup`) are not
    /// ignored by it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(self.path("bin/fsdp-launch"));
        command.current_dir(self.dir.path()).args(args).stdin(Stdio::null());
        command
            .env_remove("OMP_NUM_THREADS")
            .env("CUDA_VISIBLE_DEVICES", "")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts the job with a script for the worker.
    pub fn start(&self, num_ranks: usize, script: &str, args: &[&str]) -> Child {
        let num_ranks = num_ranks.to_string();
        let mut command = self.command(&["--nproc", &num_ranks, "job.toml"]);
        command.args(args).env("WORKER_SCRIPT", script).spawn().unwrap()
    }

    /// Starts the launcher of one of two nodes, which meet at `port` of this machine.
    pub fn start_node(&self, node_rank: usize, port: u16, num_ranks: usize, script: &str, args: &[&str]) -> Child {
        let [node_rank, port, num_ranks] = [node_rank.to_string(), port.to_string(), num_ranks.to_string()];
        let mut command = self.command(&["--nnodes", "2", "--node-rank", &node_rank, "--master-addr", "127.0.0.1"]);
        command.args(["--master-port", &port, "--nproc", &num_ranks, "--backend", "shm", "job.toml"]);
        command.args(args).env("WORKER_SCRIPT", script).spawn().unwrap()
    }

    pub fn run(&self, num_ranks: usize, script: &str, args: &[&str]) -> Ended {
        end(self.start(num_ranks, script, args))
    }

    /// Waits until every rank has done its first step.
    pub fn wait_for_ranks(&self, num_ranks: usize) -> Vec<i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let pids = |rank| {
            let text = self.read(&format!("out/started-{rank}"));
            text.strip_prefix("pid=")?.split(' ').next()?.parse::<i32>().ok()
        };
        loop {
            let started: Vec<i32> = (0..num_ranks).filter_map(pids).collect();
            if started.len() == num_ranks && !self.read("out/metrics.jsonl").is_empty() {
                // Where that is an earlier start's, it is a rendezvous and a few milliseconds to the first step.
                std::thread::sleep(Duration::from_millis(60));
                return started;
            }
            assert!(Instant::now() < deadline, "the ranks do not start");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the file is there.
    pub fn wait_for(&self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.path(name).exists() {
            assert!(Instant::now() < deadline, "{name} does not appear");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn num_ranks_started(&self) -> usize {
        (0..16).filter(|rank| self.path(&format!("out/started-{rank}")).exists()).count()
    }

    /// What the launcher says of the run at its end.
    pub fn summary(&self) -> serde_json::Value {
        serde_json::from_str(&self.read("out/logs/summary.json")).unwrap()
    }

    /// Names of the committed checkpoints.
    pub fn checkpoints(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("out/checkpoints")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Processes that have this job's folder as their working directory.
    pub fn survivors(&self) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let dir = self.dir.path().canonicalize().unwrap();
        pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == dir)).collect()
    }

    pub fn assert_no_survivors(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while !self.survivors().is_empty() {
            assert!(Instant::now() < deadline, "still alive: {:?}", self.survivors());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A port that nobody uses at the moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn send(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// The ranks that a report names as the first failure.
pub fn named(stderr: &str) -> Vec<String> {
    let lines = stderr.lines().filter_map(|line| line.strip_prefix("fsdp-launch: rank "));
    lines.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// Waits for the launcher, at most 60 s.
pub fn end(mut child: Child) -> Ended {
    let start = Instant::now();
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let deadline = start + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() >= deadline {
            // Its ranks go with it.
            child.kill().unwrap();
            panic!("the launcher does not end");
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    Ended {
        status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap()),
        took: start.elapsed(),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

fn read_all(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut bytes).unwrap();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
