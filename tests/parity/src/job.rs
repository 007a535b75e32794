//! One run of `fsdp-launch` over a golden.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tempfile::TempDir;

use crate::golden::Golden;
use crate::place::{self, TestDevice};

/// No run of a tiny model takes longer, so a run that does hangs.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A job in a folder of its own, which goes when this value does. It may be run several times, as for a resume.
#[derive(Debug)]
pub struct Job {
    dir: TempDir,
    nproc: u64,
    device: &'static str,
    backend: &'static str,
}

/// A line of `metrics.jsonl`, with all keys that it must have.
#[derive(Debug, Clone, Deserialize)]
pub struct StepMetrics {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: u64,
    pub step_time_s: f64,
    pub tokens_per_second: f64,
    pub peak_memory_bytes: u64,
}

/// A job that is running. Dropped, it is killed.
#[derive(Debug)]
pub struct Running<'a> {
    job: &'a Job,
    launcher: Child,
}

impl Job {
    /// The golden's fp32 run on `nproc` ranks with `grad_accumulation` microbatches a step, not run yet.
    pub fn new(golden: &Golden, nproc: u64, grad_accumulation: u64) -> Result<Self> {
        Self::with_kernels(golden, nproc, grad_accumulation, false)
    }

    /// As [`Job::new`], with kernels that give the same bits each time.
    pub fn deterministic(golden: &Golden, nproc: u64, grad_accumulation: u64) -> Result<Self> {
        Self::with_kernels(golden, nproc, grad_accumulation, true)
    }

    fn with_kernels(golden: &Golden, nproc: u64, grad_accumulation: u64, deterministic: bool) -> Result<Self> {
        let s = &golden.settings;
        let parts = nproc * grad_accumulation;
        assert_eq!(s.global_batch_size % parts, 0, "{nproc} ranks with {grad_accumulation} microbatches");
        let dir = tempfile::Builder::new().prefix("parity-").tempdir()?;
        let (model, out) = (golden.folder(), dir.path().join("out"));
        let (device, backend) = TestDevice::from_env()?.device_and_backend(nproc);
        // On CPUs they always do.
        let deterministic = deterministic && device != "cpu";
        let toml = format!(
            "[model]\npath = {model:?}\n\
             [fsdp]\ndevice = \"{device}\"\nbackend = \"{backend}\"\n\
             [precision]\nparam = \"fp32\"\n\
             [optimizer]\nlr = {}\nbetas = {:?}\neps = {}\nweight_decay = {}\n\
             [lr_scheduler]\nkind = \"cosine\"\nwarmup_steps = {}\nmin_lr = {}\n\
             [training]\nsteps = {}\nseq_len = {}\nmicro_batch_size = {}\ngrad_accumulation = {grad_accumulation}\n\
             max_grad_norm = {:?}\ndeterministic = {deterministic}\n\
             [data]\ntrain = [{:?}]\nformat = \"tokens\"\nshuffle = false\n\
             [checkpoint]\nevery_steps = 0\n\
             [output]\ndir = {out:?}\ndtype = \"fp32\"\n",
            s.lr,
            s.betas,
            s.eps,
            s.weight_decay,
            s.warmup_steps,
            s.min_lr,
            s.steps,
            s.seq_len,
            s.global_batch_size / parts,
            s.max_grad_norm,
            model.join("train.jsonl"),
        );
        std::fs::write(dir.path().join("job.toml"), toml)?;
        Ok(Self { dir, nproc, device, backend })
    }

    /// Starts the launcher with `settings` (`key.path=value`) over the job's own.
    ///
    /// # Errors
    /// If the binaries are not built.
    pub fn start(&self, settings: &[&str]) -> Result<Running<'_>> {
        let mut command = Command::new(place::launcher()?);
        command.args(["--nproc", &self.nproc.to_string()]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        let log = File::create(self.log_path())?;
        command
            .arg(self.dir.path().join("job.toml"))
            // one thread a rank: the tests themselves run beside each other
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let launcher = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Running { job: self, launcher })
    }

    /// Runs to the end and returns the metrics.
    ///
    /// # Errors
    /// If the exit status is not 0, with what the launcher said.
    pub fn run(&self, settings: &[&str]) -> Result<Vec<StepMetrics>> {
        let status = self.start(settings)?.wait()?;
        ensure!(status == 0, "exit status {status} with {settings:?}; the launcher said:\n{}", self.log());
        self.metrics()
    }

    /// The lines of `metrics.jsonl` so far.
    pub fn metrics(&self) -> Result<Vec<StepMetrics>> {
        let path = self.out().join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // a line that is being written has no end yet
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))).collect()
    }

    /// How many ranks, and on what, in words.
    pub fn ranks(&self) -> String {
        let Job { nproc, device, backend, .. } = self;
        format!("{nproc} {} ({device}, {backend})", if *nproc == 1 { "rank" } else { "ranks" })
    }

    /// The exported model.
    pub fn exported(&self) -> PathBuf {
        self.out().join("hf")
    }

    /// `[output] dir`.
    pub fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// What the launcher wrote to its stdout and stderr.
    pub fn log(&self) -> String {
        std::fs::read(self.log_path()).map_or_else(|e| e.to_string(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("launcher.log")
    }
}

impl Running<'_> {
    /// Waits until `step` is in the metrics.
    ///
    /// # Errors
    /// If the run ends before.
    pub fn wait_for_step(&mut self, step: u64) -> Result<()> {
        let start = Instant::now();
        // the file appears with the first step
        while self.job.metrics().unwrap_or_default().last().is_none_or(|line| line.step < step) {
            if let Some(status) = self.launcher.try_wait()? {
                bail!("{status} before step {step}; the launcher said:\n{}", self.job.log());
            }
            ensure!(start.elapsed() < TIMEOUT, "no step {step} after {TIMEOUT:?}; {}", self.job.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Sends SIGTERM to the launcher.
    pub fn terminate(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.launcher);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("cannot send SIGTERM")
    }

    /// The exit status, once the launcher has ended.
    ///
    /// # Errors
    /// If it was killed by a signal or does not end.
    pub fn wait(mut self) -> Result<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.launcher.try_wait()? {
                return status.code().with_context(|| format!("the launcher ended by {status}; {}", self.job.log()));
            }
            ensure!(start.elapsed() < TIMEOUT, "still running after {TIMEOUT:?}; it said:\n{}", self.job.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // an error means that it has ended, which is what is wanted
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}
