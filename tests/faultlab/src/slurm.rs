//! What SLURM does to jobs, on a real one of two nodes, with the batch files of `scripts/slurm/` as they are.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::{Job, built};
use fsdp_tests_behaviour::slurm::{Cluster, Submitted, batch_file};
use rustix::process::{Pid, Signal, kill_process};

use crate::tally::{Tally, Times};

const NUM_RANKS: usize = 4;

/// With [`SLOW`], more than SLURM needs to notice that a job is at its time limit.
const SETTINGS: &[&str] =
    &["--set=training.steps=1000", "--set=precision.param=fp32", "--set=checkpoint.every_steps=20"];
/// Both nodes are one machine, so shared memory reaches both.
const SHM: &[&str] = &["--set=fsdp.backend=shm"];

/// Until something has happened, a step takes so long: not to have the cores busy until then.
const SLOW: &str = "rank=*,step=1,do=slow=120";

const FAIL_AGAIN: &str = "rank=1,step=30,do=panic";

/// No process is left so long after the end.
const SURVIVAL: Duration = Duration::from_secs(5);
/// The ranks of the other node have ended so long after a node is lost.
const LOST: Duration = Duration::from_secs(10);

/// How ranks are started.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
    OneTaskPerNode,
    OneTaskPerGpu,
    Mpi,
    /// Three tasks on one node and one on the other, by a script of one line that requeues nothing.
    Uneven,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// `scancel`: SIGTERM to all processes.
    Cancel,
    /// `scancel --signal=USR1`: to all tasks.
    Signal,
    /// `--signal=USR1@60`: the same, by SLURM itself, some time before the limit.
    SignalAhead,
    /// `--signal=B:USR1@60`: to the batch script.
    SignalBatchAhead,
    /// SIGTERM to all processes, twice.
    TimeLimit,
    /// `scontrol requeue`, as preemption does it.
    Requeue,
    /// SIGKILL to one rank.
    KillRank,
    /// SIGKILL to all tasks of the second node and to what watches them.
    LoseNode,
    /// SIGKILL to `srun`.
    KillSrun,
    /// A rank that fails at the same step at each start.
    FailAgain,
}

/// Who has a job start again that ends with status 75.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Script,
    /// `RequeueExit=75` in slurm.conf.
    Conf,
}

/// The first few are quick.
const CASES: &[(Style, Event, By)] = &[
    (Style::OneTaskPerNode, Event::Cancel, By::Script),
    (Style::OneTaskPerGpu, Event::Signal, By::Script),
    (Style::OneTaskPerNode, Event::SignalBatchAhead, By::Script),
    (Style::Uneven, Event::Signal, By::Conf),
    (Style::OneTaskPerGpu, Event::KillRank, By::Script),
    (Style::OneTaskPerNode, Event::LoseNode, By::Script),
    (Style::Mpi, Event::SignalAhead, By::Script),
    (Style::OneTaskPerGpu, Event::TimeLimit, By::Script),
    (Style::OneTaskPerNode, Event::FailAgain, By::Script),
    (Style::OneTaskPerGpu, Event::LoseNode, By::Conf),
    (Style::OneTaskPerGpu, Event::Cancel, By::Script),
    (Style::OneTaskPerNode, Event::Signal, By::Conf),
    (Style::OneTaskPerGpu, Event::SignalBatchAhead, By::Script),
    (Style::OneTaskPerNode, Event::KillRank, By::Script),
    (Style::Mpi, Event::KillRank, By::Script),
    (Style::OneTaskPerNode, Event::TimeLimit, By::Script),
    (Style::OneTaskPerGpu, Event::Requeue, By::Script),
    (Style::Uneven, Event::LoseNode, By::Conf),
    (Style::OneTaskPerNode, Event::SignalAhead, By::Script),
    (Style::Mpi, Event::Cancel, By::Script),
    (Style::OneTaskPerGpu, Event::SignalAhead, By::Conf),
    (Style::Uneven, Event::TimeLimit, By::Conf),
    (Style::OneTaskPerNode, Event::Requeue, By::Script),
    (Style::OneTaskPerGpu, Event::FailAgain, By::Script),
    (Style::OneTaskPerNode, Event::KillSrun, By::Script),
    (Style::OneTaskPerGpu, Event::KillSrun, By::Script),
];

/// What the jobs of a row have in common.
struct Row {
    cluster: Cluster,
    /// Runs that nothing happened to: over shared memory, over MPI.
    unbroken: [OnceLock<Job>; 2],
    times: Times,
}

/// Row 9: each event, and each way to start ranks.
pub fn of_jobs(tally: &mut Tally, n: usize) {
    let cluster = match Cluster::start() {
        Ok(cluster) => cluster,
        Err(reason) => return tally.skip(reason),
    };
    let mut cases: Vec<_> = CASES.iter().cycle().take(n).copied().collect();
    if let Err(reason) = cluster.has_mpi(&built("fsdp-train-faults")) {
        cases.retain(|(style, ..)| *style != Style::Mpi);
        tally.skip(reason);
    }
    let (by_script, by_conf): (Vec<_>, Vec<_>) = cases.iter().partition(|(.., by)| *by == By::Script);
    let row = Row { cluster, unbroken: Default::default(), times: Times::default() };
    // They mostly wait for SLURM.
    tally.check_at_once(3, &by_script, |(style, event, _)| row.check(*style, *event));
    if !by_conf.is_empty() {
        let _conf = RequeueExit::set(&row.cluster);
        tally.check_at_once(3, &by_conf, |(style, event, _)| row.check(*style, *event));
    }
    if cases.iter().any(|(_, event, _)| *event == Event::LoseNode) {
        tally.note(format!("a lost node's peers ended after {}", row.times));
    }
}

impl Row {
    fn check(&self, style: Style, event: Event) {
        let job = Job::new();
        put_binaries(&job);
        let submitted = self.submit(style, event, &job);
        if event == Event::FailAgain {
            // The first start comes to step 30, and three more come no further.
            assert_eq!(submitted.end(), ("FAILED".to_owned(), "93:0".to_owned()), "{}", submitted.log());
            assert_eq!(submitted.field("Restarts"), "3", "{}", submitted.log());
            assert_eq!(job.checkpoints(), ["step-00000020"]);
            return job.assert_no_survivors(SURVIVAL);
        }
        let is_ahead = matches!(event, Event::SignalAhead | Event::SignalBatchAhead);
        if !is_ahead {
            submitted.wait_until("step after a checkpoint", |_| job.steps().len() > 25);
            self.strike(event, &job, &submitted);
        }
        let starts_again = !matches!(event, Event::Cancel | Event::TimeLimit);
        if starts_again {
            submitted.wait_until("requeue", |s| s.field("Restarts") == "1");
        } else {
            let state = if event == Event::Cancel { "CANCELLED" } else { "TIMEOUT" };
            assert_eq!(submitted.end().0, state, "{}", submitted.log());
            submitted.wait_until("end of srun", |s| s.log().contains("xited with exit code"));
        }
        job.assert_no_survivors(SURVIVAL);
        let (num_steps, log) = (job.steps().len(), submitted.log());
        // SLURM may tell a job before its first step. Who is killed saves nothing.
        let saves = num_steps > 0 && !matches!(event, Event::KillRank | Event::LoseNode);
        if saves {
            assert_eq!(job.checkpoints().pop(), Some(format!("step-{num_steps:08}")), "{log}");
        }
        let says_75 = match event {
            // A killed srun says nothing.
            Event::KillSrun => false,
            // MPI has all ranks killed.
            Event::KillRank => style != Style::Mpi,
            Event::LoseNode => true,
            _ => saves,
        };
        assert!(!says_75 || log.contains("xited with exit code 75"), "{log}");
        if style == Style::Uneven {
            assert!(log.starts_with("3,1\n"), "{log}");
        }

        speed_up(&job);
        if starts_again {
            submitted.finish();
            assert!(is_ahead || submitted.field("Restarts") == "1", "{}", submitted.log());
        } else {
            self.submit(style, Event::Signal, &job).finish();
        }
        assert!(num_steps == 0 || submitted.log().contains("resuming after step"), "{}", submitted.log());
        job.assert_bits_of(self.unbroken(style));
        job.assert_no_survivors(SURVIVAL);
    }

    fn submit<'a>(&'a self, style: Style, event: Event, job: &'a Job) -> Submitted<'a> {
        let bin = job.path("bin").display().to_string();
        // SLURM_WAIT: how long srun waits for a lost node's tasks.
        let fault = if event == Event::FailAgain { FAIL_AGAIN } else { SLOW };
        let variables =
            [("FSDP_BIN", bin.as_str()), ("FSDP_FAULT", fault), ("OMP_NUM_THREADS", "1"), ("SLURM_WAIT", "3")];
        let mut args = match event {
            Event::SignalAhead => vec!["--time=1", "--signal=USR1@60"],
            Event::SignalBatchAhead => vec!["--time=1", "--signal=B:USR1@60"],
            Event::TimeLimit => vec!["--time=1", "--signal=CONT@0"],
            _ => vec!["--time=10"],
        };
        let backend = if style == Style::Mpi { &[][..] } else { SHM };
        let (file, layout, first) = match style {
            Style::OneTaskPerNode => ("one_task_per_node.sbatch", "--ntasks-per-node=1", "--nproc=2"),
            Style::OneTaskPerGpu => ("one_task_per_gpu.sbatch", "--ntasks-per-node=2", ""),
            Style::Mpi => ("mpi.sbatch", "--ntasks-per-node=2", ""),
            Style::Uneven => {
                let words = [&["job.toml"], SETTINGS, backend].concat().join(" ");
                let wrap = format!(
                    "--wrap=srun --distribution=block --kill-on-bad-exit=0 sh -c 'echo $SLURM_STEP_TASKS_PER_NODE; exec \
                     {bin}/fsdp-train {words}'"
                );
                args.extend(["--ntasks=4", "--requeue", "--open-mode=append", &wrap]);
                return self.cluster.submit(job, &variables, &args);
            }
        };
        let file = batch_file(file).display().to_string();
        args.extend([layout, "--gpus-per-node=0", &file]);
        args.extend((!first.is_empty()).then_some(first));
        args.extend([&["job.toml"], SETTINGS, backend].concat());
        self.cluster.submit(job, &variables, &args)
    }

    fn strike(&self, event: Event, job: &Job, submitted: &Submitted<'_>) {
        match event {
            Event::Cancel => drop(self.cluster.command("scancel", &[&submitted.id])),
            Event::Signal => drop(self.cluster.command("scancel", &["--signal=USR1", &submitted.id])),
            Event::Requeue => drop(self.cluster.command("scontrol", &["requeue", &submitted.id])),
            Event::KillRank => {
                let mut ranks = processes(job);
                ranks.retain(|process| process.name == "fsdp-train");
                kill(fastrand::choice(&ranks).expect("ranks").pid);
            }
            Event::LoseNode => {
                let on_node: Vec<Process> = processes(job).into_iter().filter(|process| process.node == "n2").collect();
                assert!(!on_node.is_empty(), "nobody is on n2: {:?}", processes(job));
                let is_watcher = |process: &&Process| name(process.parent) == "slurmstepd";
                on_node.iter().filter(is_watcher).for_each(|process| kill(process.parent));
                on_node.iter().for_each(|process| kill(process.pid));
                let lost = Instant::now();
                while !processes(job).is_empty() {
                    assert!(lost.elapsed() < LOST, "{:?} are left after {LOST:?}", processes(job));
                    std::thread::sleep(Duration::from_millis(10));
                }
                self.times.add(lost.elapsed());
            }
            Event::KillSrun => {
                let sruns: Vec<i32> = job.survivors().into_iter().filter(|pid| name(*pid) == "srun").collect();
                assert!(!sruns.is_empty(), "no srun: {}", submitted.log());
                sruns.into_iter().for_each(kill);
            }
            Event::SignalAhead | Event::SignalBatchAhead | Event::TimeLimit | Event::FailAgain => {}
        }
    }

    fn unbroken(&self, style: Style) -> &Job {
        let (index, backend) = if style == Style::Mpi { (1, "--backend=mpi") } else { (0, "--backend=shm") };
        self.unbroken[index].get_or_init(|| {
            let job = Job::new();
            job.finish(NUM_RANKS, &[SETTINGS, &[backend]].concat());
            job
        })
    }
}

/// `RequeueExit=75` in slurm.conf while this value lives.
struct RequeueExit<'a> {
    cluster: &'a Cluster,
    before: String,
}

impl<'a> RequeueExit<'a> {
    fn set(cluster: &'a Cluster) -> Self {
        let before = std::fs::read_to_string(cluster.conf()).expect("a config");
        std::fs::write(cluster.conf(), format!("{before}RequeueExit=75\n")).expect("a config that can be written");
        cluster.command("scontrol", &["reconfigure"]);
        RequeueExit { cluster, before }
    }
}

impl Drop for RequeueExit<'_> {
    fn drop(&mut self) {
        std::fs::write(self.cluster.conf(), &self.before).expect("a config that can be written");
        self.cluster.command("scontrol", &["reconfigure"]);
    }
}

/// A launcher or a rank of a job.
#[derive(Debug)]
struct Process {
    pid: i32,
    parent: i32,
    name: String,
    /// SLURM's name of its node.
    node: String,
}

/// The launchers and ranks of a job.
fn processes(job: &Job) -> Vec<Process> {
    let named = job.survivors().into_iter().map(|pid| (pid, name(pid)));
    let ours = named.filter(|(_, name)| name == "fsdp-launch" || name == "fsdp-train");
    ours.map(|(pid, name)| {
        // A process that ends meanwhile has nothing to read.
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let (status, environ) = (read("status"), read("environ"));
        let find = |bytes: &[u8], separator: u8, key: &str| {
            let fields = bytes.split(|&byte| byte == separator).map(String::from_utf8_lossy);
            let mut values = fields.filter_map(|field| Some(field.strip_prefix(key)?.trim().to_owned()));
            values.next().unwrap_or_default()
        };
        let parent = find(&status, b'\n', "PPid:").parse().unwrap_or(0);
        Process { pid, parent, name, node: find(&environ, 0, "SLURMD_NODENAME=") }
    })
    .collect()
}

/// A process's name; empty once it has ended.
fn name(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn kill(pid: i32) {
    // It may have ended: the lost node's ranks go with their launcher.
    let _ = kill_process(Pid::from_raw(pid).expect("a process id"), Signal::KILL);
}

/// The programs in the job's folder: workers that do as `FSDP_FAULT` says, and `fast`, which do not.
fn put_binaries(job: &Job) {
    std::fs::create_dir_all(job.path("bin/fast")).expect("a folder of the test");
    let put = |from: &str, to: &str| {
        let (from, to): (PathBuf, PathBuf) = (built(from), job.path("bin").join(to));
        // The target folder may be on another file system.
        std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(&from, &to).map(drop)).expect("a copy");
    };
    put("fsdp-launch", "fsdp-launch");
    put("fsdp-train-faults", "fsdp-train");
    put("fsdp-train", "fast/fsdp-train");
}

/// Has the job's next starts run as fast as they can.
fn speed_up(job: &Job) {
    let fast = job.path("bin/fast/fsdp-train");
    job.write("bin/next", format!("#!/bin/sh\nunset FSDP_FAULT\nexec {} \"$@\"\n", fast.display()));
    std::fs::set_permissions(job.path("bin/next"), Permissions::from_mode(0o755)).expect("a file of the test");
    std::fs::rename(job.path("bin/next"), job.path("bin/fsdp-train")).expect("a folder of the test");
}
