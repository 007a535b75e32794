//! One start of a node's ranks: the store that they meet at, their counters and their lifeline, and the ranks themselves.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_control::ControlError;
use fsdp_control::env::{StartedBy, WorkerEnv, prepared_vars};
use fsdp_control::lifeline::Lifeline;
use fsdp_control::progress::Progress;
use fsdp_control::store::StoreServer;
use rustix::process::{Pid, Signal};

use crate::attempts::Ranks;
use crate::failure::Failure;
use crate::launch::all_interfaces;
use crate::mpirun::{Mpirun, MpirunStart};
use crate::place::Place;
use crate::processes;
use crate::rank::{RankProcess, RankStart};

/// How long the kernel has to end what ranks left behind.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(2);

/// How the ranks of a node are started, each time.
#[derive(Debug)]
pub struct NodeStart<'a> {
    pub place: &'a Place,
    pub ranks: &'a Ranks,
    pub mpirun: Option<&'a Mpirun>,
    /// The worker's binary.
    pub worker: &'a Path,
    /// The resolved config, its one argument.
    pub config: &'a Path,
    pub log_dir: &'a Path,
    /// Variables of all ranks.
    pub vars: Vec<(String, String)>,
    /// Children of this process that are none of the run's.
    pub spare: &'a [Pid],
}

/// What ranks live by. Dropping it ends them.
#[derive(Debug)]
pub struct Started {
    pub progress: Progress,
    _lifeline: Lifeline,
}

impl NodeStart<'_> {
    /// Within a SLURM job mpirun may start even a few ranks on another node than this one.
    fn is_on_one_machine(&self) -> bool {
        let is_spread = self.mpirun.is_some() && std::env::var_os("SLURM_JOB_ID").is_some();
        self.place.num_nodes == 1 && self.ranks.num_local == self.ranks.world_size && !is_spread
    }

    /// # Errors
    /// The port cannot be listened on.
    pub fn serve_store(&self) -> Result<StoreServer, Failure> {
        let host = if self.is_on_one_machine() { &self.place.master_addr } else { all_interfaces(self.place)? };
        StoreServer::bind((host, self.place.master_port)).map_err(|error| match error {
            ControlError::PortInUse { .. } | ControlError::StoreBind { .. } => Failure::bad_input(error),
            _ => Failure::failed(error),
        })
    }

    /// Starts all ranks, or none. `store` is there where this launcher serves it.
    ///
    /// # Errors
    /// The system refuses a process, or what processes share.
    pub fn start(&self, store: Option<&StoreServer>) -> Result<(Started, Vec<RankProcess>), Failure> {
        let lifeline = Lifeline::new().map_err(Failure::failed)?;
        let progress = Progress::create(self.ranks.num_local).map_err(Failure::failed)?;
        let master_port = store.map_or(self.place.master_port, |store| store.local_addr().port());
        let processes = match self.mpirun {
            Some(mpirun) => vec![self.start_mpirun(mpirun, store.expect("mpirun is the only node's"), master_port)?],
            None => self.start_ranks(&lifeline, &progress, master_port)?,
        };
        Ok((Started { progress, _lifeline: lifeline }, processes))
    }

    fn start_mpirun(&self, mpirun: &Mpirun, store: &StoreServer, master_port: u16) -> Result<RankProcess, Failure> {
        let host = fsdp_control::host_name();
        let master_addr = if self.is_on_one_machine() { &self.place.master_addr } else { &host };
        let mut vars = prepared_vars(master_addr, master_port, terminal_width());
        vars.extend(self.vars.iter().cloned());
        let start = MpirunStart {
            mpirun,
            worker: self.worker,
            config: self.config,
            log_dir: self.log_dir,
            vars: &vars,
            num_ranks: self.ranks.world_size,
            num_local_ranks: self.ranks.num_local,
            store: store.local_addr(),
        };
        RankProcess::start_mpirun(&start).map_err(|e| Failure::failed(format!("cannot start mpirun: {e}")))
    }

    fn start_ranks(
        &self,
        lifeline: &Lifeline,
        progress: &Progress,
        master_port: u16,
    ) -> Result<Vec<RankProcess>, Failure> {
        let inherit = [lifeline.inherit_fd(), progress.inherit_fd()];
        let num_local = self.ranks.num_local;
        let mut ranks: Vec<RankProcess> = Vec::with_capacity(num_local);
        for local_rank in 0..num_local {
            let env = WorkerEnv {
                started_by: StartedBy::Launcher,
                run_id: None,
                rank: self.ranks.first_rank + local_rank,
                local_rank,
                world_size: self.ranks.world_size,
                local_world_size: num_local,
                group_rank: self.place.node_rank,
                master_addr: self.place.master_addr.clone(),
                master_port,
                lifeline_fd: Some(lifeline.inherit_fd()),
                progress_fd: Some(progress.inherit_fd()),
                terminal_width: terminal_width(),
            };
            let (program, config, log_dir) = (self.worker, self.config, self.log_dir);
            let start = RankStart { program, config, env, vars: &self.vars, inherit: &inherit, log_dir };
            match RankProcess::start(start) {
                Ok(process) => ranks.push(process),
                Err(error) => {
                    ranks.iter().for_each(|started| processes::signal_group(started.pid, Signal::KILL));
                    self.end_orphans();
                    return Err(Failure::failed(format!(
                        "cannot start rank {local_rank} of this machine's {num_local}: {error}"
                    )));
                }
            }
        }
        Ok(ranks)
    }

    /// Ends what ranks have left behind.
    pub fn end_orphans(&self) {
        processes::end_orphans(self.spare, ORPHAN_PATIENCE);
    }
}

/// The variables by which torchrun's workers know how often they have been started.
pub fn restart_vars(ranks: &Ranks, attempt: u32) -> Vec<(String, String)> {
    let vars = [
        ("TORCHELASTIC_RESTART_COUNT", attempt.to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", ranks.max_restarts.to_string()),
        ("TORCHELASTIC_RUN_ID", ranks.run_id.clone()),
    ];
    vars.map(|(name, value)| (name.to_owned(), value)).into()
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

/// The config that the workers of a node read. The folder may be one for all nodes.
pub fn config_path(dir: &Path, node_rank: usize) -> PathBuf {
    match node_rank {
        0 => dir.join("config.toml"),
        _ => dir.join(format!("config.node-{node_rank}.toml")),
    }
}
