//! A worker for the tests of the launcher: the control plane of a real one, without tensors. It runs the config's steps,
//! meets the other ranks in each of them, saves when it should, and stops when it is asked to; `WORKER_SCRIPT` says what
//! else happens, as `RANK STEP ACTION` separated by semicolons (rank `*` is every one; step 0 is before the rendezvous;
//! `once:ACTION` is done in the first start that comes there only).

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::time::{Duration, Instant};

use fsdp_config::{Duration as Length, JobConfig, Resume};
use fsdp_control::env::WorkerEnv;
use fsdp_control::error_file::{self, Collective, ErrorKind, ErrorRecord};
use fsdp_control::lifeline::StoreLifeline;
use fsdp_control::progress::{Op, Phase, Progress, ProgressHandle};
use fsdp_control::stop::StopFlag;
use fsdp_control::store::Store;
use fsdp_control::{ExitStatus, lifeline};
use rustix::process::{Pid, Signal};

struct Worker {
    env: WorkerEnv,
    config: JobConfig,
    store: Store,
    /// Where a launcher started this rank itself.
    progress: Option<ProgressHandle>,
    /// Elsewhere.
    lifeline: Option<StoreLifeline>,
    stop: StopFlag,
    step: u64,
    /// Process ids of all ranks.
    peers: Vec<i32>,
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("--features") {
        return print!("mpi\nshm\n");
    }
    let stop = StopFlag::install().unwrap();
    let config_path = PathBuf::from(std::env::args_os().nth(1).unwrap());
    let env = WorkerEnv::from_env().unwrap();
    if let Some(fd) = env.lifeline_fd {
        lifeline::watch(fd).unwrap();
    }
    let progress = env.progress_fd.map(|fd| Progress::attach(fd, env.local_rank).unwrap());
    let config = JobConfig::from_resolved(&config_path).unwrap();
    note_start(&config.output.dir, &env);
    let (addr, wait) = ((env.master_addr.as_str(), env.master_port), Duration::from_secs(10));
    let store = Store::connect(addr, wait).unwrap();
    let lifeline = env.lifeline_fd.is_none().then(|| {
        let will = ErrorRecord::new(
            env.rank,
            env.local_rank,
            ErrorKind::Signal,
            "ended without a word".to_owned(),
            ExitStatus::Failed,
        );
        lifeline::watch_store(addr, wait, Duration::from_secs(5), &will, |_| ExitStatus::Failed).unwrap()
    });
    let mut worker = Worker { env, config, store, progress, lifeline, stop, step: 0, peers: Vec::new() };
    worker.act_as_scripted();
    worker.find_peers();
    let status = worker.train();
    if let Some(lifeline) = worker.lifeline.take() {
        lifeline.let_go();
    }
    exit(status.code());
}

/// What the tests look at: that this rank ran, and with which environment.
fn note_start(dir: &Path, env: &WorkerEnv) {
    let threads = std::env::var("OMP_NUM_THREADS").unwrap();
    let group = rustix::process::getpgrp();
    let count = std::env::var("TORCHELASTIC_RESTART_COUNT").unwrap();
    let most = std::env::var("TORCHELASTIC_MAX_RESTARTS").unwrap();
    let pid = std::process::id();
    let text = format!("pid={pid} group={group} threads={threads} restarts={count}/{most} {env:?}");
    std::fs::write(dir.join(format!("started-{}", env.rank)), text).unwrap();
}

impl Worker {
    fn find_peers(&mut self) {
        self.store.set(&format!("pid-{}", self.env.rank), std::process::id().to_string().as_bytes()).unwrap();
        for rank in 0..self.env.world_size {
            let pid = self.store.get(&format!("pid-{rank}"), Duration::from_secs(10)).unwrap();
            self.peers.push(String::from_utf8(pid).unwrap().parse().unwrap());
        }
    }

    fn train(&mut self) -> ExitStatus {
        let Length::Steps(num_steps) = self.config.training.duration else { panic!("the tests use steps") };
        let every = self.config.checkpoint.every_steps;
        self.step = self.resume();
        while self.step < num_steps {
            self.step += 1;
            if let Some(progress) = &self.progress {
                progress.set_step(self.step);
                progress.set_phase(Phase::ForwardBackward);
            }
            self.act_as_scripted();
            std::thread::sleep(Duration::from_millis(5));
            let stops = self.meet("step", i64::from(self.stop.is_set()));
            self.log_step();
            if stops > 0 || (every > 0 && self.step.is_multiple_of(every)) {
                self.save();
            }
            if stops > 0 {
                return ExitStatus::Stopped;
            }
        }
        ExitStatus::Done
    }

    /// The step to go on from.
    fn resume(&self) -> u64 {
        let step_of = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
        match &self.config.checkpoint.resume {
            Resume::Never => 0,
            Resume::Path(path) => step_of(path).unwrap(),
            Resume::Auto => {
                let folders = std::fs::read_dir(self.config.output.dir.join("checkpoints")).into_iter().flatten();
                folders.filter_map(|entry| step_of(&entry.unwrap().path())).max().unwrap_or(0)
            }
        }
    }

    fn log_step(&self) {
        if self.env.rank == 0 {
            let path = self.config.output.dir.join("metrics.jsonl");
            let mut log = std::fs::File::options().create(true).append(true).open(path).unwrap();
            writeln!(log, "{{\"step\": {}}}", self.step).unwrap();
        }
    }

    /// Does what the script has for this rank and step.
    fn act_as_scripted(&self) {
        for action in std::env::var("WORKER_SCRIPT").unwrap_or_default().split(';') {
            let [rank, step, action] = action.split_whitespace().collect::<Vec<_>>()[..] else { continue };
            let is_for_me = rank == "*" || rank == self.env.rank.to_string();
            if is_for_me && step == self.step.to_string() {
                self.act(action);
            }
        }
    }

    fn act(&self, action: &str) {
        let acted = self.config.output.dir.join(format!("acted-{}-{}", self.env.rank, self.step));
        let action = match action.strip_prefix("once:") {
            Some(_) if acted.exists() => return,
            Some(action) => action,
            None => action,
        };
        std::fs::write(acted, action).unwrap();
        let (name, value) = action.split_once('=').unwrap_or((action, ""));
        let number = || value.parse::<i32>().unwrap();
        match name {
            "signal" => {
                let signal = Signal::from_named_raw(number()).unwrap();
                rustix::process::kill_process(rustix::process::getpid(), signal).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
            "exit" => exit(number()),
            "fail" => self.fail(ErrorKind::NonFinite, "the loss is NaN", number()),
            "hang" => loop {
                std::thread::sleep(Duration::from_secs(1));
            },
            "spin" => loop {
                std::hint::spin_loop();
            },
            "mib" => drop(std::hint::black_box(vec![1u8; number() as usize * (1 << 20)])),
            "print" => eprintln!("rank {} says {value}", self.env.rank),
            "stdout" => println!("rank {} says {value}", self.env.rank),
            "spew" => {
                let mut stderr = std::io::stderr().lock();
                (0..number()).for_each(|line| writeln!(stderr, "{line} {}", "x".repeat(1000)).unwrap());
            }
            "child" => drop(Command::new("sleep").arg("1000").spawn().unwrap()),
            "escape" => drop(Command::new("setsid").args(["--fork", "sleep", "1000"]).spawn().unwrap()),
            other => panic!("unknown action {other}"),
        }
    }

    /// Waits until all ranks are here; returns the sum of their `value`s. As a process group does, it fails when one of
    /// them is gone, or stays away for too long.
    fn meet(&mut self, what: &str, value: i64) -> i64 {
        let (sum, arrived) = (format!("{what}-{}-sum", self.step), format!("{what}-{}-arrived", self.step));
        if let Some(progress) = &self.progress {
            progress.enter(Op::AllReduce, self.step, "layers.0", 1 << 20);
        }
        self.add(&sum, value);
        let rank = |rank: usize| format!("{arrived}-{rank}");
        self.add(&rank(self.env.rank), 1);
        self.add(&arrived, 1);
        let start = Instant::now();
        while self.add(&arrived, 0) < self.env.world_size as i64 {
            if let Some(lost) = self.peers.iter().position(|&pid| !is_alive(pid)) {
                // The last one to arrive may have gone on and ended meanwhile.
                if self.add(&arrived, 0) < self.env.world_size as i64 {
                    self.fail(ErrorKind::PeerLost, &format!("rank {lost} is gone"), 1);
                }
            }
            if start.elapsed() > Duration::from_secs(self.config.fsdp.timeout_secs) {
                let missing = (0..self.env.world_size).filter(|&other| self.add(&rank(other), 0) == 0).collect();
                let (op, unit) = (Op::AllReduce.to_string(), "layers.0".to_owned());
                let (seq, entered) = (self.step, vec![self.env.rank]);
                let collective = Collective { seq, op, num_bytes: 1 << 20, unit, entered, missing };
                let mut record = self.record(ErrorKind::CollectiveTimeout, "a rank did not come", ExitStatus::Failed);
                record.collective = Some(collective);
                self.end_with(&record);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(progress) = &self.progress {
            progress.leave();
        }
        self.add(&sum, 0)
    }

    /// Adds to a number in the store, which goes when its launcher does.
    fn add(&mut self, key: &str, delta: i64) -> i64 {
        match self.store.add(key, delta) {
            Ok(sum) => sum,
            Err(error) => self.fail(ErrorKind::PeerLost, &error.to_string(), 1),
        }
    }

    /// Commits a checkpoint by a rename, once all ranks have their part in it, as the real one does.
    fn save(&mut self) {
        self.meet("shards", 0);
        if self.env.rank == 0 {
            let root = self.config.output.dir.join("checkpoints");
            let temporary = root.join("new");
            std::fs::create_dir_all(&temporary).unwrap();
            std::fs::write(temporary.join("manifest.json"), "{}").unwrap();
            std::fs::rename(&temporary, root.join(format!("step-{:08}", self.step))).unwrap();
        }
        self.meet("commit", 0);
    }

    fn fail(&self, kind: ErrorKind, message: &str, status: i32) -> ! {
        self.end_with(&self.record(kind, message, ExitStatus::from_code(status).unwrap()));
    }

    fn record(&self, kind: ErrorKind, message: &str, status: ExitStatus) -> ErrorRecord {
        let mut record = ErrorRecord::new(self.env.rank, self.env.local_rank, kind, message.to_owned(), status);
        record.step = self.step;
        record
    }

    fn end_with(&self, record: &ErrorRecord) -> ! {
        // The disk may be full.
        let _ = error_file::write(&self.config.output.dir.join("logs"), record);
        exit(record.exit_status);
    }
}

/// The process exists and has not ended.
fn is_alive(pid: i32) -> bool {
    let exists = rustix::process::test_kill_process(Pid::from_raw(pid).unwrap()).is_ok();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    exists && !stat.contains(") Z ")
}
