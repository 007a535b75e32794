//! fsdp-train: one rank of a training job. `fsdp-launch` starts one for each rank, with `fsdp-train CONFIG` and the
//! variables of `fsdp_control::env`.
//!
//! Layout:
//! - `main`: the process around the trainer: signals, logs, error record, exit status.
//! - [`trainer`]: the job on one rank, from config to exported model; `Trainer::train_step`.
//! - [`weights`]: first weights from files or at random, and the export.
//! - [`checkpoints`]: saving, and choosing what to resume from.
//! - [`validation`]: validation loss and greedy answers.
//! - [`metrics`]: `metrics.jsonl`, one line a step.
//! - [`console`]: what a person sees: the live line, log lines.
//! - [`error`]: what can go wrong, as exit status and error record.
#![forbid(unsafe_code)]

mod checkpoints;
mod console;
mod error;
mod metrics;
mod trainer;
mod validation;
mod weights;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use fsdp_config::JobConfig;
use fsdp_control::env::WorkerEnv;
use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::progress::{Progress, ProgressHandle};
use fsdp_control::stop::StopFlag;
use fsdp_control::{ExitStatus, lifeline};

use crate::error::{STEP, TrainError};
use crate::trainer::{Outcome, Trainer};

fn main() -> ExitCode {
    let status = match std::env::args_os().collect::<Vec<_>>().as_slice() {
        [_, config] => run(Path::new(config)),
        _ => {
            eprintln!("usage: fsdp-train CONFIG\nOne rank of a job; fsdp-launch starts it.");
            ExitStatus::BadInput
        }
    };
    status.into()
}

/// Runs one rank; every failure ends as a line on stderr, a record for the launcher, and a status.
fn run(config: &Path) -> ExitStatus {
    let env = match WorkerEnv::from_env() {
        Ok(env) => env,
        Err(error) => {
            eprintln!("fsdp-train: {error}; start ranks with fsdp-launch");
            return ExitStatus::BadInput;
        }
    };
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
            eprintln!("fsdp-train: rank {}: {error}", env.rank);
            return ExitStatus::Failed;
        }
    };
    let config = match JobConfig::from_resolved(config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("fsdp-train: {error}");
            return ExitStatus::BadInput;
        }
    };
    let log_dir = config.output.dir.join("logs");
    if let Err(error) = console::start_logging(&log_dir, &env) {
        eprintln!("fsdp-train: rank {}: {}: {error}", env.rank, log_dir.display());
        return ExitStatus::BadInput;
    }
    record_panics(&log_dir, &env);
    match train(config, &env, stop, progress) {
        Ok(Outcome::Done) => ExitStatus::Done,
        Ok(Outcome::Stopped) => ExitStatus::Stopped,
        Err(error) => {
            let record = error.record(&env);
            tracing::error!("{}", record.message);
            if let Err(error) = error_file::write(&log_dir, &record) {
                tracing::error!("{error}");
            }
            error.exit_status()
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
        record.step = STEP.load(Ordering::Relaxed);
        let _ = error_file::write(&log_dir, &record);
        default(info);
    }));
}
