//! The config of a run, in agreement with all ranks, and what rank 0 does where no launcher has prepared the run.
//!
//! Where `mpirun` or `srun` started the ranks, rank 0 serves the store, reads the config and locks the output folder; the
//! others get the config from it. All must have been given the same.

use std::io;
use std::net::ToSocketAddrs;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fsdp_checkpoint::sharded;
use fsdp_config::{Backend, ConfigError, JobConfig};
use fsdp_control::env::{StartedBy, WorkerEnv};
use fsdp_control::error_file::{self, ErrorRecord};
use fsdp_control::lock::Lock;
use fsdp_control::restarts::{self, Reached, Start};
use fsdp_control::store::{Store, StoreServer};
use fsdp_control::{ControlError, ExitStatus, failures};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::TrainError;
use crate::trainer::Outcome;
use crate::verdict::{self, GRACE, Output, Ties};

/// How long ranks wait for each other before they know the job's own timeout: a scheduler may start them far apart.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a launcher's store may take to accept: it listens before any rank starts.
const LAUNCHER_TIMEOUT: Duration = Duration::from_secs(10);

/// How many of the others have heard what rank 0 makes of the config.
const HEARD: &str = "heard";

const POLL_EVERY: Duration = Duration::from_millis(20);

/// A rank's part in a run, from its config to its exit status.
#[derive(Debug)]
pub struct Run {
    pub config: JobConfig,
    env: WorkerEnv,
    /// Where no launcher watches this process.
    ties: Option<Ties>,
    /// Rank 0's, where no launcher has them.
    server: Option<StoreServer>,
    /// The count of starts that led nowhere, and the output folder's lock: rank 0's, where no launcher has them.
    start: Option<Start>,
    _lock: Option<Lock>,
}

/// What rank 0 tells the others about the config.
#[derive(Debug, Serialize, Deserialize)]
enum Announcement {
    /// The digest of what rank 0 was given, and what came of it, as TOML.
    Config { digest: String, resolved: String },
    /// Rank 0 has said why not.
    Refused,
}

/// Why a rank does not train.
#[derive(Debug)]
pub struct Refused {
    /// `None` where another rank says it.
    pub error: Option<Box<TrainError>>,
    pub status: ExitStatus,
}

impl<E: Into<TrainError>> From<E> for Refused {
    fn from(error: E) -> Self {
        let error = error.into();
        Refused { status: error.exit_status(), error: Some(Box::new(error)) }
    }
}

impl Run {
    /// Reads the config, in agreement with the other ranks. `sets` are `table.key=value`.
    ///
    /// # Errors
    /// The config is wrong or not the same on all ranks, another run has the output folder, or ranks cannot be reached.
    pub fn join(env: WorkerEnv, config: &Path, sets: &[String]) -> Result<Self, Refused> {
        match env.run_id.clone() {
            Some(run_id) if env.rank == 0 => Self::host(&run_id, env, config, sets),
            Some(run_id) => Self::follow(&run_id, env, config, sets),
            None => {
                let config = JobConfig::load(config, sets)?;
                let ties = match env.lifeline_fd {
                    Some(_) => None,
                    None => {
                        let timeout = Duration::from_secs(config.fsdp.timeout_secs);
                        let accepts_within = timeout.min(LAUNCHER_TIMEOUT);
                        let store = Store::connect((&env.master_addr, env.master_port), accepts_within)?;
                        Some(Ties::new(store, &env, timeout, Arc::new(Output::of(&config).into()))?)
                    }
                };
                Ok(Run { config, env, ties, server: None, start: None, _lock: None })
            }
        }
    }

    /// Rank 0 without a launcher.
    fn host(run_id: &str, env: WorkerEnv, config: &Path, sets: &[String]) -> Result<Self, Refused> {
        // The port is the user's, or can be chosen.
        let server = StoreServer::bind((bind_host(&env.master_addr), env.master_port))
            .map_err(|error| Refused { error: Some(Box::new(error.into())), status: ExitStatus::BadInput })?;
        let mut store = Store::connect((&env.master_addr, env.master_port), START_TIMEOUT)?;
        store.set("run", run_id.as_bytes())?;
        let (config, digest, lock, start) = match prepare(config, sets) {
            Ok(prepared) => prepared,
            Err(error) => {
                announce(&mut store, &Announcement::Refused)?;
                wait_until_heard(&mut store, &env)?;
                return Err(error.into());
            }
        };
        let mut ties = Ties::new(store, &env, START_TIMEOUT, Arc::new(Output::of(&config).into()))?;
        announce(&mut ties.store, &Announcement::Config { digest, resolved: config.to_toml() })?;
        Run { config, env, ties: Some(ties), server: Some(server), start: Some(start), _lock: Some(lock) }.agree(Ok(()))
    }

    /// Another rank without a launcher.
    fn follow(run_id: &str, env: WorkerEnv, config: &Path, sets: &[String]) -> Result<Self, Refused> {
        let addr = (env.master_addr.as_str(), env.master_port);
        let mut store = Store::connect(addr, START_TIMEOUT)?;
        // Asked without a wait, who has the port soon shows whether it is a store.
        let hosted = match store.get("run", Duration::ZERO) {
            Err(ControlError::KeyTimeout { .. }) => store.get("run", START_TIMEOUT)?,
            Err(error) if is_foreign(&error) => {
                let message = format!("{error}; expected the store of rank 0; choose another MASTER_PORT");
                return Err(TrainError::BadInput(message).into());
            }
            result => result?,
        };
        if hosted != run_id.as_bytes() {
            let (host, port) = addr;
            let got = String::from_utf8_lossy(&hosted).into_owned();
            return Err(TrainError::BadInput(format!(
                "the store at {host}:{port} is of another run: expected {run_id:?}, got {got:?}; choose another MASTER_PORT"
            ))
            .into());
        }
        let output = Arc::new(OnceLock::new());
        let mut ties = Ties::new(store, &env, START_TIMEOUT, Arc::clone(&output))?;
        let bytes = ties.store.get("config", START_TIMEOUT)?;
        let announcement: Announcement = serde_json::from_slice(&bytes).map_err(|source| TrainError::Message {
            rank: 0,
            what: "the config",
            source,
        })?;
        ties.store.add(HEARD, 1)?;
        let Announcement::Config { digest: expected, resolved } = announcement else {
            ties.let_go();
            return Err(Refused { error: None, status: ExitStatus::BadInput });
        };
        let resolved = JobConfig::parse("the config that rank 0 has resolved", &resolved)?;
        output.set(Output::of(&resolved)).expect("set once");
        let same = digest(config, sets).and_then(|got| match got == expected {
            true => Ok(()),
            false => Err(TrainError::BadInput(format!(
                "{}: expected the same config and the same --set flags on all ranks, got digest {got} here and {expected} \
                 on rank 0",
                config.display()
            ))),
        });
        Run { config: resolved, env, ties: Some(ties), server: None, start: None, _lock: None }.agree(same)
    }

    /// Waits until all ranks have the same config. `own` says whether this one has.
    fn agree(mut self, own: Result<(), TrainError>) -> Result<Self, Refused> {
        let ties = self.ties.as_mut().expect("ranks without a launcher have ties");
        let timeout = START_TIMEOUT.min(Duration::from_secs(self.config.fsdp.timeout_secs));
        match own.and_then(|()| wait_for_all(&mut ties.store, &self.env, timeout)) {
            Ok(None) => Ok(self),
            Ok(Some(cause)) => {
                if self.server.is_some() {
                    // Who comes after the store is gone would look for it.
                    let _ = wait_until_heard(&mut ties.store, &self.env);
                }
                let message = format!("rank {} failed before the first step", cause.rank);
                let record = verdict::peer_lost(self.env.rank, self.env.local_rank, message);
                Err(Refused { error: None, status: self.end(Err(Box::new(record))) })
            }
            Err(error) => {
                let record = error.record(&self.env);
                // The refusal says the same; a full disk must not hide it.
                let _ = error_file::write(&self.config.output.dir.join("logs"), &record);
                Err(Refused { error: Some(Box::new(error)), status: self.end(Err(Box::new(record))) })
            }
        }
    }

    /// Ends this rank's part of the run: hears and tells what became of it. Rank 0 ends last where it serves the store.
    ///
    /// The status is the same on all ranks that come to their end: where one has failed, that of the first failure that
    /// can be a cause, and 75 instead of 1 where a checkpoint is committed. Rank 0 may say 93 instead, where this was the last
    /// of the starts that led nowhere; schedulers take the largest.
    pub fn end(mut self, outcome: Result<Outcome, Box<ErrorRecord>>) -> ExitStatus {
        let start = self.start.take();
        let (status, cause) = self.judge(outcome);
        let Some(start) = start else { return status };
        let cause = cause.map(|cause| cause.to_string());
        let (status, last) = start.conclude(status, cause.as_deref(), reached(&self.config.output.dir));
        if let Some(last) = last {
            verdict::say(format_args!("fsdp-train: {last}"));
        }
        status
    }

    /// The status, and the first failure if there was one.
    fn judge(&mut self, outcome: Result<Outcome, Box<ErrorRecord>>) -> (ExitStatus, Option<ErrorRecord>) {
        let dir = &self.config.output.dir;
        let own = match (&outcome, self.ties.take()) {
            (Ok(outcome), ties) => {
                if let Some(ties) = ties {
                    ties.let_go();
                }
                match outcome {
                    Outcome::Done => (ExitStatus::Done, None),
                    Outcome::Stopped => (ExitStatus::Stopped, None),
                }
            }
            // The launcher judges.
            (Err(record), None) => (ExitStatus::from_code(record.exit_status).unwrap_or(ExitStatus::Failed), None),
            (Err(record), Some(ties)) => {
                let cause = ties.fail(record);
                (verdict::verdict(&cause, dir), Some(cause))
            }
        };
        let Some(server) = &self.server else { return own };
        let patience = if outcome.is_ok() { Duration::from_secs(self.config.fsdp.timeout_secs) } else { GRACE };
        let Some(cause) = verdict::wait_for_others(server, &self.env, patience) else { return own };
        verdict::report(&cause, self.env.rank, &Output::of(&self.config));
        (verdict::verdict(&cause, dir), Some(cause))
    }
}

/// How far the run in the output folder has come.
fn reached(dir: &Path) -> Reached {
    let checkpoints = sharded::list(&dir.join("checkpoints")).unwrap_or_default();
    Reached {
        checkpoint_step: checkpoints.last().map_or(0, |(step, _)| *step),
        finished_step: restarts::finished_step(&dir.join("metrics.jsonl")),
    }
}

/// Rank 0: returns once all others have heard of the config, or of its refusal; after a while without them.
fn wait_until_heard(store: &mut Store, env: &WorkerEnv) -> Result<(), ControlError> {
    let (start, others) = (Instant::now(), env.world_size as i64 - 1);
    while store.add(HEARD, 0)? < others && start.elapsed() < GRACE {
        std::thread::sleep(POLL_EVERY);
    }
    Ok(())
}

/// Returns when all ranks have called it, or with the cause as soon as one has failed.
fn wait_for_all(store: &mut Store, env: &WorkerEnv, timeout: Duration) -> Result<Option<ErrorRecord>, TrainError> {
    let agreed = |rank: usize| format!("agreed/rank-{rank}");
    store.set(&agreed(env.rank), b"")?;
    if store.add("agreed/count", 1)? == env.world_size as i64 {
        store.set("agreed/all", b"")?;
    }
    let start = Instant::now();
    loop {
        match store.get("agreed/all", Duration::from_millis(200)) {
            Err(ControlError::KeyTimeout { .. }) if start.elapsed() < timeout => {}
            Err(ControlError::KeyTimeout { .. }) => break,
            result => return Ok(result.map(|_| None)?),
        }
        if let Some(cause) = failures::first_cause(&failures::list(store)?) {
            return Ok(Some(cause.clone()));
        }
    }
    let mut missing = Vec::new();
    for rank in 0..env.world_size {
        match store.get(&agreed(rank), Duration::ZERO) {
            Ok(_) => {}
            Err(ControlError::KeyTimeout { .. }) => missing.push(rank),
            Err(error) => return Err(error.into()),
        }
    }
    let name = "start".to_owned();
    Err(ControlError::BarrierTimeout { name, world_size: env.world_size, missing, timeout }.into())
}

/// What carries the collectives of this rank: what the config asks for, and else what is best.
///
/// # Errors
/// MPI is asked for, or nothing else would do, and no MPI started the ranks.
pub fn resolve_backend(
    wanted: Backend,
    env: &WorkerEnv,
    has_cuda: bool,
    is_mpi_built: bool,
) -> Result<Backend, TrainError> {
    let is_one_node = env.world_size == env.local_world_size;
    let backend = match wanted {
        Backend::Auto if has_cuda => Backend::Nccl,
        Backend::Auto if env.started_by == StartedBy::Mpi && is_mpi_built => Backend::Mpi,
        Backend::Auto if is_one_node => Backend::Shm,
        Backend::Auto => Backend::Mpi,
        wanted => wanted,
    };
    let got = match (backend, env.started_by) {
        (Backend::Mpi, StartedBy::Launcher) => "fsdp-launch itself; use fsdp-launch --backend mpi",
        (Backend::Mpi, StartedBy::Slurm) => "srun without MPI; use srun --mpi=pmix",
        _ => return Ok(backend),
    };
    let why = match wanted {
        Backend::Auto => "ranks on the CPUs of several nodes need backend \"mpi\", which",
        _ => "[fsdp] backend = \"mpi\"",
    };
    Err(TrainError::BadInput(format!("{why} expects ranks that an MPI started, got ranks started by {got}")))
}

/// Rank 0: the config, its digest, and the lock of the output folder, which is made ready for the run; its start is noted.
fn prepare(path: &Path, sets: &[String]) -> Result<(JobConfig, String, Lock, Start), TrainError> {
    let config = JobConfig::load(path, sets)?;
    let digest = digest(path, sets)?;
    let dir = &config.output.dir;
    let log_dir = dir.join("logs");
    std::fs::create_dir_all(&log_dir).map_err(|error| {
        TrainError::BadInput(format!(
            "[output] dir: expected a folder that can be written, got {}: {error}; choose another one",
            dir.display()
        ))
    })?;
    let lock = Lock::take(dir, "fsdp-train").map_err(|error| TrainError::BadInput(error.to_string()))?;
    let (whole, temporary) = (dir.join("config.toml"), dir.join("config.toml.tmp"));
    std::fs::write(&temporary, config.to_toml())
        .and_then(|()| std::fs::rename(&temporary, &whole))
        .map_err(|source| TrainError::Io { path: whole, source })?;
    // Before the records are removed: who is refused looks at them.
    let start = Start::begin(dir, reached(dir))?;
    error_file::remove_all(&log_dir)?;
    Ok((config, digest, lock, start))
}

fn digest(path: &Path, sets: &[String]) -> Result<String, TrainError> {
    let mut bytes = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    for set in sets {
        bytes.push(0);
        bytes.extend_from_slice(set.as_bytes());
    }
    Ok(format!("{:032x}", xxh3_128(&bytes)))
}

/// Whether what was at the other end does not speak the store's language.
fn is_foreign(error: &ControlError) -> bool {
    let ControlError::StoreLost { source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::TimedOut | io::ErrorKind::InvalidData)
}

/// Where rank 0 listens so that all reach `master_addr`: on that itself where it is this host's alone, else on all
/// addresses of its kind.
fn bind_host(master_addr: &str) -> &str {
    if ["127.0.0.1", "::1", "localhost"].contains(&master_addr) {
        return master_addr;
    }
    // What is no address fails to connect, with the reason.
    let mut addrs = (master_addr, 0).to_socket_addrs().into_iter().flatten();
    if addrs.next().is_some_and(|addr| addr.is_ipv6()) && addrs.all(|addr| addr.is_ipv6()) { "::" } else { "0.0.0.0" }
}

fn announce(store: &mut Store, announcement: &Announcement) -> Result<(), ControlError> {
    store.set("config", &serde_json::to_vec(announcement).expect("text is always representable as JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(started_by: StartedBy, world_size: usize, local_world_size: usize) -> WorkerEnv {
        WorkerEnv {
            started_by,
            run_id: None,
            rank: 0,
            local_rank: 0,
            world_size,
            local_world_size,
            group_rank: 0,
            master_addr: "127.0.0.1".into(),
            master_port: 1,
            lifeline_fd: None,
            progress_fd: None,
            terminal_width: None,
        }
    }

    #[test]
    fn the_back_end_follows_from_devices_nodes_and_starter() {
        use Backend::{Auto, Mpi, Nccl, Shm};
        use StartedBy::{Launcher, Slurm};
        for (wanted, started_by, nodes, has_cuda, is_mpi_built, expected) in [
            (Auto, Launcher, 1, true, true, Ok(Nccl)),
            (Auto, Slurm, 2, true, false, Ok(Nccl)),
            (Auto, StartedBy::Mpi, 2, true, true, Ok(Nccl)),
            (Auto, Launcher, 1, false, true, Ok(Shm)),
            (Auto, Slurm, 1, false, true, Ok(Shm)),
            (Auto, StartedBy::Mpi, 1, false, true, Ok(Mpi)),
            (Auto, StartedBy::Mpi, 1, false, false, Ok(Shm)),
            // The process group says that it is not built.
            (Auto, StartedBy::Mpi, 2, false, false, Ok(Mpi)),
            (Auto, Slurm, 2, false, true, Err("several nodes need backend \"mpi\"")),
            (Auto, Launcher, 2, false, true, Err("fsdp-launch --backend mpi")),
            (Mpi, Slurm, 1, true, true, Err("srun --mpi=pmix")),
            (Mpi, StartedBy::Mpi, 1, true, true, Ok(Mpi)),
            (Shm, StartedBy::Mpi, 2, true, true, Ok(Shm)),
            (Nccl, StartedBy::Mpi, 1, false, true, Ok(Nccl)),
        ] {
            let case = format!("{wanted:?}, {started_by:?}, {nodes} nodes, {has_cuda}, {is_mpi_built}");
            match (resolve_backend(wanted, &env(started_by, 2 * nodes, 2), has_cuda, is_mpi_built), expected) {
                (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{case}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{case}: {error}"),
                (got, _) => panic!("{case}: {got:?}"),
            }
        }
    }

    #[test]
    fn rank_0_listens_on_addresses_of_the_kind_that_others_connect_to() {
        for (master_addr, expected) in [
            ("127.0.0.1", "127.0.0.1"),
            ("localhost", "localhost"),
            ("::1", "::1"),
            ("10.1.2.3", "0.0.0.0"),
            ("fd00::1", "::"),
            ("no name of a host", "0.0.0.0"),
        ] {
            assert_eq!(bind_host(master_addr), expected, "{master_addr}");
        }
    }

    #[test]
    fn digests_differ_by_text_and_flags() {
        let file = std::env::temp_dir().join(format!("fsdp-digest-{}", std::process::id()));
        let of = |text: &str, sets: &[&str]| {
            std::fs::write(&file, text).unwrap();
            digest(&file, &sets.iter().map(|set| set.to_string()).collect::<Vec<_>>()).unwrap()
        };
        let all = [of("a", &[]), of("b", &[]), of("a", &["x=1"]), of("a", &["x=1", "y=2"])];
        assert!(all.iter().enumerate().all(|(i, one)| all[..i].iter().all(|other| other != one)), "{all:?}");
        assert_eq!(all[2], of("a", &["x=1"]));
        std::fs::remove_file(&file).unwrap();
    }
}
