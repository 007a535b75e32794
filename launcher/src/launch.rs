//! A run: lock, resolved config, store, ranks, and what became of them.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_checkpoint::sharded;
use fsdp_config::{JobConfig, Resume};
use fsdp_control::env::WorkerEnv;
use fsdp_control::lifeline::{self, Lifeline};
use fsdp_control::progress::Progress;
use fsdp_control::store::StoreServer;
use fsdp_control::{ControlError, ExitStatus, host_name};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};

use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::rank::{RankProcess, RankStart};
use crate::signals::{Arrived, Signals};
use crate::supervise::Supervisor;
use crate::{preflight, processes, verdict};

/// The worker's binary, beside the launcher's own.
const WORKER: &str = "fsdp-train";

/// How long the kernel has to end what ranks left behind.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(2);

/// How long the terminal has to take the report.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// Runs the job to its end.
pub fn launch(args: &RunArgs) -> Result<ExitStatus, Failure> {
    refuse_more_machines(args)?;
    let checked = preflight::preflight(&args.job)?;
    // From here on a signal does not end the launcher: it ends the run.
    let mut signals = Signals::install().map_err(|e| Failure::failed(format!("cannot take over signals: {e}")))?;
    let worker = worker_binary()?;
    let dir = &checked.config.output.dir;
    let log_dir = dir.join("logs");
    create_dir(&log_dir)?;
    let _lock = Lock::take(dir)?;
    let config_path = dir.join("config.toml");
    write_resolved(&checked.config, &config_path)?;
    remove_old_records(&log_dir)?;

    let store = StoreServer::bind((&args.master_addr, args.master_port)).map_err(|error| match error {
        ControlError::PortInUse { .. } | ControlError::StoreBind { .. } => Failure::bad_input(error),
        _ => Failure::failed(error),
    })?;
    let spare = processes::children();
    lifeline::become_subreaper().map_err(Failure::failed)?;
    let lifeline = Lifeline::new().map_err(Failure::failed)?;
    let progress = Progress::create(args.job.nproc).map_err(Failure::failed)?;
    let inherit = [lifeline.inherit_fd(), progress.inherit_fd()];
    if signals.take() != Arrived::Nothing {
        crate::say("fsdp-launch: stopped before the ranks started; run the same command again");
        return Ok(ExitStatus::Stopped);
    }
    let ranks = start_ranks(args.job.nproc, &spare, |rank| RankStart {
        program: &worker,
        config: &config_path,
        env: WorkerEnv {
            rank,
            local_rank: rank,
            world_size: args.job.nproc,
            local_world_size: args.job.nproc,
            group_rank: 0,
            master_addr: args.master_addr.clone(),
            master_port: store.local_addr().port(),
            lifeline_fd: Some(lifeline.inherit_fd()),
            progress_fd: Some(progress.inherit_fd()),
            terminal_width: terminal_width(),
        },
        inherit: &inherit,
        log_dir: &log_dir,
    })?;

    let mut supervisor = Supervisor::new(ranks, &progress, &log_dir, signals);
    let history = supervisor.run()?;
    drop(lifeline);
    processes::end_orphans(&spare, ORPHAN_PATIENCE);

    // The report comes first, whatever the file system says.
    let checkpoints = sharded::list(&dir.join("checkpoints")).unwrap_or_else(|error| {
        supervisor.stderr.push_line(&format!("fsdp-launch: {error}"));
        Vec::new()
    });
    let newest = checkpoints.last().map(|(_, path)| path.as_path());
    let resumes = checked.config.checkpoint.resume == Resume::Auto;
    let (status, lines) = verdict::verdict(&history, newest, resumes);
    lines.iter().for_each(|line| supervisor.stderr.push_line(line));
    supervisor.stdout.finish(OUTPUT_PATIENCE);
    supervisor.stderr.finish(OUTPUT_PATIENCE);
    Ok(status)
}

fn refuse_more_machines(args: &RunArgs) -> Result<(), Failure> {
    if args.nnodes > 1 {
        return Err(Failure::bad_input(format!(
            "--nnodes: expected 1, got {}, which is not built yet; run on one machine",
            args.nnodes
        )));
    }
    if args.node_rank > 0 {
        return Err(Failure::bad_input(format!(
            "--node-rank: expected 0 (less than --nnodes), got {}; leave it out on one machine",
            args.node_rank
        )));
    }
    Ok(())
}

fn worker_binary() -> Result<PathBuf, Failure> {
    let own =
        std::env::current_exe().map_err(|e| Failure::failed(format!("cannot find the launcher's own path: {e}")))?;
    let worker = own.with_file_name(WORKER);
    match rustix::fs::access(&worker, rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(worker),
        Err(error) => Err(Failure::failed(format!(
            "{}: expected the worker's binary beside fsdp-launch, got: {error}; build both with cargo build --release",
            worker.display()
        ))),
    }
}

fn create_dir(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir).map_err(|error| {
        Failure::bad_input(format!(
            "[output] dir: expected a folder that can be written, got {}: {error}; choose another one",
            dir.display()
        ))
    })
}

/// One run at a time has an output folder. Held until dropped, or until this process is gone in whatever way.
#[derive(Debug)]
struct Lock {
    _file: File,
}

impl Lock {
    fn take(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join("lock");
        let failed = |error: std::io::Error| {
            Failure::bad_input(format!("{}: expected a lock file that can be written, got: {error}", path.display()))
        };
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = file.take(1000).read_to_string(&mut holder);
                return Err(Failure::bad_input(format!(
                    "{}: expected an output folder that no other run uses, got one in use by fsdp-launch {}; wait for \
                     it, or choose another folder with --set output.dir=...",
                    dir.display(),
                    holder.trim()
                )));
            }
            Err(error) => return Err(failed(error.into())),
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "(pid {} on host {})", std::process::id(), host_name()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Writes what the workers read, whole or not at all.
fn write_resolved(config: &JobConfig, path: &Path) -> Result<(), Failure> {
    let temporary = path.with_extension("toml.tmp");
    std::fs::write(&temporary, config.to_toml())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| Failure::bad_input(format!("{}: cannot write the resolved config: {error}", path.display())))
}

/// Removes what ranks of earlier runs left, which would be taken for this run's.
fn remove_old_records(log_dir: &Path) -> Result<(), Failure> {
    let remove = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(log_dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("error-rank-") && name.ends_with(".json") {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(())
    };
    remove().map_err(|error| {
        Failure::bad_input(format!("{}: cannot remove the error records of an earlier run: {error}", log_dir.display()))
    })
}

/// Starts all ranks, or none.
fn start_ranks<'a>(
    num_ranks: usize,
    spare: &[Pid],
    start: impl Fn(usize) -> RankStart<'a>,
) -> Result<Vec<RankProcess>, Failure> {
    let mut ranks: Vec<RankProcess> = Vec::with_capacity(num_ranks);
    for rank in 0..num_ranks {
        match RankProcess::start(start(rank)) {
            Ok(process) => ranks.push(process),
            Err(error) => {
                ranks.iter().for_each(|started| processes::signal_group(started.pid, Signal::KILL));
                processes::end_orphans(spare, ORPHAN_PATIENCE);
                return Err(Failure::failed(format!("cannot start rank {rank} of {num_ranks}: {error}")));
            }
        }
    }
    Ok(ranks)
}

/// Columns of the terminal on stderr, where the progress is drawn.
fn terminal_width() -> Option<u16> {
    let stderr = std::io::stderr();
    if !stderr.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stderr).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}
