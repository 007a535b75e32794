//! fsdp-train: one rank of a training job. `fsdp-launch`, `mpirun` or `srun` starts one for each rank, with
//! `fsdp-train CONFIG` and the variables of `fsdp_control::env`. The binaries call [`main`] and nothing else:
//! `fsdp-train`, and for tests `fsdp-train-faults`, which is built with the feature `faults`.
//!
//! Layout:
//! - [`main`]: the process around the trainer: signals, logs, error record, exit status.
//! - `bootstrap`: the config in agreement with all ranks; what rank 0 does where no launcher has prepared the run.
//! - `verdict`: how ranks that no launcher watches learn of each other's ends.
//! - `trainer`: the job on one rank, from config to exported model; `Trainer::start_step`.
//! - `nodes`: what ranks compare before they set anything up: devices, sharding, the output folder of all nodes.
//! - `device`: the GPU of a rank, and the cores next to it.
//! - `weights`: first weights from files or at random, and the export.
//! - `checkpoints`: what a run goes on from: choosing a checkpoint together, and loading it.
//! - `saver`: saving the state behind the next steps.
//! - `stragglers`: which rank is slower than the others.
//! - `validation`: validation loss and greedy answers.
//! - `metrics`: `metrics.jsonl`, one line a step.
//! - `step_log`: what is told of each step.
//! - `mfu`: the model's operations, and their share of a card's peak.
//! - `traces`: timelines of steps, in the Chrome trace format.
//! - `console`: what a person sees: the live line, log lines.
//! - `error`: what can go wrong, as exit status and error record.
//! - `whereabouts`: what this rank is busy with, for error records and the launcher.
//! - `faults`: with the feature of that name, faults that tests ask for.
#![forbid(unsafe_code)]

mod bootstrap;
mod checkpoints;
mod console;
mod device;
mod error;
#[cfg(feature = "faults")]
mod faults;
mod metrics;
mod mfu;
mod nodes;
mod saver;
mod step_log;
mod stragglers;
mod traces;
mod trainer;
mod validation;
mod verdict;
mod weights;
mod whereabouts;

use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use fsdp_config::JobConfig;
use fsdp_control::env::WorkerEnv;
use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::progress::{Progress, ProgressHandle};
use fsdp_control::stop::StopFlag;
use fsdp_control::{ExitStatus, host_name, lifeline};

use crate::bootstrap::Run;
use crate::error::TrainError;
use crate::trainer::{Outcome, Trainer};
use crate::verdict::say;

const USAGE: &str = "usage: fsdp-train CONFIG [--set table.key=value]...
       fsdp-train --features
One rank of a job; fsdp-launch, mpirun or srun starts it. --features prints the back ends that are built.";

/// One rank's process, from its arguments to its exit status.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args == ["--features"] {
        // Who reads no further has seen enough.
        let _ = write!(io::stdout(), "{}shm\nnccl\n", if cfg!(feature = "mpi") { "mpi\n" } else { "" });
        return ExitStatus::Done.into();
    }
    let status = match parse(&args) {
        Some((config, sets)) => run(&config, &sets),
        None => {
            say(USAGE);
            ExitStatus::BadInput
        }
    };
    status.into()
}

/// The config's path and the values of `--set`; `None` if the arguments are not those of a rank.
fn parse(args: &[OsString]) -> Option<(PathBuf, Vec<String>)> {
    let (config, rest) = args.split_first()?;
    let mut sets = Vec::new();
    let mut rest = rest.iter();
    while let Some(flag) = rest.next() {
        let value = match flag.to_str()? {
            "--set" => rest.next()?.to_str()?,
            joined => joined.strip_prefix("--set=")?,
        };
        sets.push(value.to_owned());
    }
    (!config.to_string_lossy().starts_with('-')).then(|| (config.into(), sets))
}

/// Runs one rank; every failure ends as a line on stderr, a record for the launcher, and a status.
fn run(config: &Path, sets: &[String]) -> ExitStatus {
    let env = match WorkerEnv::from_env() {
        Ok(env) => env,
        Err(error) => {
            say(format_args!("fsdp-train: {error}"));
            return ExitStatus::BadInput;
        }
    };
    let whoami = format!("rank {} (host {}, pid {})", env.rank, host_name(), std::process::id());
    // Before anything that takes time: a signal must find its handler, a dead launcher its mourners.
    let prepared = StopFlag::install().and_then(|stop| {
        if let Some(fd) = env.lifeline_fd {
            lifeline::watch(fd)?;
        }
        let progress = env.progress_fd.map(|fd| Progress::attach(fd, env.local_rank)).transpose()?;
        Ok((stop, progress))
    });
    let (stop, progress) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            say(format_args!("fsdp-train: {whoami}: {error}"));
            return ExitStatus::Failed;
        }
    };
    let run = match Run::join(env.clone(), config, sets) {
        Ok(run) => run,
        Err(refused) => {
            if let Some(error) = refused.error {
                say(format_args!("fsdp-train: {whoami}: {error}"));
            }
            return refused.status;
        }
    };
    let outcome = in_logs(&run.config, &env, stop, progress);
    let status = run.end(outcome);
    if !matches!(status, ExitStatus::Done | ExitStatus::Stopped) {
        fsdp_comm::mpi::abort_job(status.code() as u8);
    }
    // All that matters is written, and no destructor of a device's library has anything to add.
    status.exit_now()
}

/// Trains, with logs and error records in the output folder.
fn in_logs(
    config: &JobConfig,
    env: &WorkerEnv,
    stop: StopFlag,
    progress: Option<ProgressHandle>,
) -> Result<Outcome, Box<ErrorRecord>> {
    let log_dir = config.output.dir.join("logs");
    if let Err(source) = console::start_logging(&log_dir, env) {
        let error = TrainError::BadInput(format!("{}: cannot write logs: {source}", log_dir.display()));
        let record = error.record(env);
        say(format_args!("fsdp-train: {}", verdict::describe(&record)));
        return Err(Box::new(record));
    }
    record_panics(&log_dir, env);
    // A panic has left a record, and ends as any failure does.
    match catch_unwind(AssertUnwindSafe(|| train(config.clone(), env, stop, progress))) {
        Ok(Ok(outcome)) => Ok(outcome),
        Ok(Err(error)) => {
            let record = error.record(env);
            // A launcher says who it was.
            match env.lifeline_fd {
                Some(_) => tracing::error!("{}", record.message),
                None => tracing::error!("{}", verdict::describe(&record)),
            }
            if let Err(error) = error_file::write(&log_dir, &record) {
                tracing::error!("{error}");
            }
            Err(Box::new(record))
        }
        Err(_) => {
            let record = error_file::read(&log_dir, env.rank).ok().flatten().unwrap_or_else(|| {
                let message = format!("panic; see rank-{}.log", env.rank);
                ErrorRecord::new(env.rank, env.local_rank, ErrorKind::Panic, message, ExitStatus::Failed)
            });
            Err(Box::new(record))
        }
    }
}

fn train(
    config: JobConfig,
    env: &WorkerEnv,
    stop: StopFlag,
    progress: Option<ProgressHandle>,
) -> Result<Outcome, TrainError> {
    fsdp_torch_ext::tune_malloc();
    Trainer::new(config, env, stop, progress)?.run()
}

/// A panic is a bug; it is recorded like any failure, so that the launcher can name the rank and the place.
fn record_panics(log_dir: &Path, env: &WorkerEnv) {
    let (log_dir, env) = (log_dir.to_path_buf(), env.clone());
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload_as_str().unwrap_or("no message");
        let place = info.location().map_or(String::new(), |at| format!(" at {}:{}", at.file(), at.line()));
        let message = format!("panic{place}: {text}");
        tracing::error!("{message}");
        let mut record = ErrorRecord::new(env.rank, env.local_rank, ErrorKind::Panic, message, ExitStatus::Failed);
        record.step = whereabouts::step();
        record.phase = Some(whereabouts::phase());
        let _ = error_file::write(&log_dir, &record);
        default(info);
    }));
}
