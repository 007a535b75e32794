//! A rank's place in the run, from the environment. The variables of whatever started it count, in this order: our
//! launcher's (the first seven are those of torchrun), an MPI's, SLURM's.

use std::os::fd::RawFd;
use std::str::FromStr;

use crate::ControlError;
use place::Place;

mod place;

/// Gives a variable's value.
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A worker's place in the run, and the descriptors it inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnv {
    pub started_by: StartedBy,
    /// `None`: a launcher serves the store, holds the output folder's lock and has resolved the config. It started the
    /// ranks itself, or had an MPI start them with [`prepared_vars`].
    ///
    /// Else rank 0 does so, and this is what the ranks of this run share with each other and with no other run.
    pub run_id: Option<String>,
    /// `RANK`: this process among all of the run, `0..world_size`.
    pub rank: usize,
    /// `LOCAL_RANK`: this process among those of its launcher or node, `0..local_world_size`.
    pub local_rank: usize,
    /// `WORLD_SIZE`: number of ranks of the run.
    pub world_size: usize,
    /// `LOCAL_WORLD_SIZE`: number of ranks of this launcher or node.
    pub local_world_size: usize,
    /// `GROUP_RANK`: the launcher or node among all. An MPI does not tell it: there it is what it is where ranks are
    /// numbered node by node and all nodes have as many.
    pub group_rank: usize,
    /// `MASTER_ADDR`: host of the store.
    pub master_addr: String,
    /// `MASTER_PORT`: port of the store.
    pub master_port: u16,
    /// `FSDP_LIFELINE_FD`: read end of the launcher's lifeline; see [`crate::lifeline`].
    pub lifeline_fd: Option<RawFd>,
    /// `FSDP_PROGRESS_FD`: the launcher's progress counters; see [`crate::progress`].
    pub progress_fd: Option<RawFd>,
    /// `FSDP_TERMINAL_WIDTH`: columns of the launcher's stderr, set when that is a terminal.
    pub terminal_width: Option<u16>,
}

/// What started a rank, and so gave it its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartedBy {
    Launcher,
    /// `mpirun`, or `srun` with `--mpi=pmix` or `--mpi=pmi2`.
    Mpi,
    /// `srun` without MPI.
    Slurm,
}

/// The variables by which ranks that an MPI starts for a launcher find it (`mpirun -x NAME=VALUE`); MPI itself numbers
/// them.
pub fn prepared_vars(master_addr: &str, master_port: u16, terminal_width: Option<u16>) -> Vec<(String, String)> {
    let mut vars = vec![
        ("MASTER_ADDR".to_owned(), master_addr.to_owned()),
        ("MASTER_PORT".to_owned(), master_port.to_string()),
        ("FSDP_PREPARED".to_owned(), "1".to_owned()),
    ];
    vars.extend(terminal_width.map(|width| ("FSDP_TERMINAL_WIDTH".to_owned(), width.to_string())));
    vars
}

impl WorkerEnv {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// Nothing says which rank this is, or a variable is missing, is no number, or contradicts another one.
    pub fn from_env() -> Result<Self, ControlError> {
        Self::from_lookup(&process_variable)
    }

    fn from_lookup(lookup: Lookup) -> Result<Self, ControlError> {
        let fd = |name| lookup(name).map(|v| number_in::<RawFd>(name, v, |fd| fd >= 3, "a descriptor above 2"));
        let place = Place::find(lookup)?;
        let is_prepared = place.started_by == StartedBy::Launcher || lookup("FSDP_PREPARED").is_some();
        let (master_addr, master_port) =
            if is_prepared { Place::launchers_store(lookup)? } else { place.store(lookup)? };
        Ok(WorkerEnv {
            started_by: place.started_by,
            run_id: (!is_prepared).then(|| place.run_id.unwrap_or_else(|| format!("{master_addr}:{master_port}"))),
            rank: place.rank,
            local_rank: place.local_rank,
            world_size: place.world_size,
            local_world_size: place.local_world_size,
            group_rank: place.group_rank,
            master_addr,
            master_port,
            lifeline_fd: fd("FSDP_LIFELINE_FD").transpose()?,
            progress_fd: fd("FSDP_PROGRESS_FD").transpose()?,
            terminal_width: lookup("FSDP_TERMINAL_WIDTH")
                .map(|v| number("FSDP_TERMINAL_WIDTH", v, "a number of columns"))
                .transpose()?,
        })
    }

    /// The variables that make [`WorkerEnv::from_env`] return this value in a child that the launcher starts itself.
    pub fn vars(&self) -> Vec<(String, String)> {
        let mut vars = vec![
            ("RANK", self.rank.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("GROUP_RANK", self.group_rank.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
        ];
        vars.extend(self.lifeline_fd.map(|fd| ("FSDP_LIFELINE_FD", fd.to_string())));
        vars.extend(self.progress_fd.map(|fd| ("FSDP_PROGRESS_FD", fd.to_string())));
        vars.extend(self.terminal_width.map(|width| ("FSDP_TERMINAL_WIDTH", width.to_string())));
        vars.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// A variable of this process; what is not UTF-8 in it is replaced, and then refused where a number is expected.
pub(crate) fn process_variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|v| v.to_string_lossy().into_owned())
}

fn need(lookup: Lookup, name: &'static str, hint: &'static str) -> Result<String, ControlError> {
    lookup(name).ok_or(ControlError::MissingVariable { name, hint })
}

fn number<T: FromStr + Copy>(name: &'static str, value: String, expected: &str) -> Result<T, ControlError> {
    number_in(name, value, |_| true, expected)
}

fn number_in<T: FromStr + Copy>(
    name: &'static str,
    value: String,
    ok: impl Fn(T) -> bool,
    expected: &str,
) -> Result<T, ControlError> {
    match value.parse::<T>() {
        Ok(parsed) if ok(parsed) => Ok(parsed),
        _ => Err(ControlError::BadVariable { name, value, expected: expected.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn sample() -> WorkerEnv {
        WorkerEnv {
            started_by: StartedBy::Launcher,
            run_id: None,
            rank: 5,
            local_rank: 1,
            world_size: 8,
            local_world_size: 4,
            group_rank: 1,
            master_addr: "node7".into(),
            master_port: 29500,
            lifeline_fd: Some(3),
            progress_fd: None,
            terminal_width: Some(120),
        }
    }

    fn parse(vars: Vec<(String, String)>) -> Result<WorkerEnv, ControlError> {
        let map: HashMap<_, _> = vars.into_iter().collect();
        WorkerEnv::from_lookup(&|name| map.get(name).cloned())
    }

    /// Variables from lines of `NAME=value`.
    fn vars(lines: &str) -> Vec<(String, String)> {
        let pair = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        lines.split_whitespace().filter_map(pair).collect()
    }

    /// What `mpirun` of Open MPI 4.1 sets in rank 3 of 4 on two hosts.
    const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 \
                            OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_ess_base_jobid=1251147777 PMIX_RANK=3 \
                            PMIX_NAMESPACE=1251147777";
    /// What `mpiexec.hydra` of MPICH 4.0 sets in rank 1 of 2.
    const HYDRA: &str = "PMI_RANK=1 PMI_SIZE=2 PMI_FD=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2";
    /// What `srun -n4` of SLURM 22.05 sets in rank 2 of 4, three of them on the first node.
    const SRUN: &str = "SLURM_JOB_ID=3 SLURM_STEP_ID=1 SLURM_PROCID=2 SLURM_NODEID=0 SLURM_LOCALID=2 SLURM_NTASKS=4 \
                        SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE=3,1 \
                        SLURM_STEP_NODELIST=n[1-2] SLURM_JOB_NODELIST=n[1-2]";

    #[test]
    fn vars_round_trip() {
        assert_eq!(parse(sample().vars()).unwrap(), sample());
    }

    #[test]
    fn bad_variables_are_named() {
        for (name, value, expected) in [
            ("RANK", "8", "less than WORLD_SIZE, which is 8"),
            ("RANK", "-1", "a whole number"),
            ("WORLD_SIZE", "18446744073709551615", "at most 1048576 ranks"),
            ("LOCAL_RANK", "4", "less than LOCAL_WORLD_SIZE, which is 4"),
            ("LOCAL_WORLD_SIZE", "9", "less than WORLD_SIZE + 1, which is 9"),
            ("MASTER_PORT", "0", "a port"),
            ("MASTER_PORT", "http", "a port"),
            ("FSDP_LIFELINE_FD", "2", "a descriptor above 2"),
            ("FSDP_TERMINAL_WIDTH", "wide", "a number of columns"),
        ] {
            let mut vars = sample().vars();
            vars.iter_mut().find(|(n, _)| n == name).unwrap().1 = value.into();
            let message = parse(vars).unwrap_err().to_string();
            assert!(message.contains(&format!("{name}={value:?}")) && message.contains(expected), "{message}");
        }
        let message = parse(vars(&OPEN_MPI.replace("LOCAL_RANK=1", "LOCAL_RANK=2"))).unwrap_err().to_string();
        let expected = "OMPI_COMM_WORLD_LOCAL_RANK=\"2\" is wrong: expected less than OMPI_COMM_WORLD_LOCAL_SIZE";
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn missing_variables_are_named_with_what_to_do() {
        for name in ["WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"] {
            let vars = sample().vars().into_iter().filter(|(n, _)| n != name).collect();
            let message = parse(vars).unwrap_err().to_string();
            assert!(message.contains(&format!("{name} is not set")) && message.contains("fsdp-launch"), "{message}");
        }
        for (lines, expected) in [
            ("", "which rank this process is"),
            // A batch script, which is no step.
            ("SLURM_JOB_ID=3 SLURM_PROCID=0 SLURM_NTASKS=4", "which rank this process is"),
            (OPEN_MPI, "MASTER_ADDR is not set; give all ranks the host of rank 0"),
            (HYDRA, "MASTER_PORT is not set; this MPI tells its ranks nothing"),
            ("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE is not set"),
            (&format!("{OPEN_MPI} FSDP_PREPARED=1"), "MASTER_ADDR is not set"),
            (&format!("{SRUN} PMIX_RANK=2 FSDP_PREPARED=1 MASTER_ADDR=h"), "MASTER_PORT is not set"),
        ] {
            let message = parse(vars(lines)).unwrap_err().to_string();
            assert!(message.contains(expected), "{lines}: {message}");
        }
    }

    #[test]
    fn the_variables_of_all_starters_are_understood() {
        use StartedBy::{Launcher, Mpi, Slurm};
        // Started by, [rank, world, local rank, local world, node], store, run id.
        type Expected<'a> = (StartedBy, [usize; 5], (&'a str, u16), Option<&'a str>);
        let cases: &[(String, Expected)] = &[
            (format!("{OPEN_MPI} MASTER_ADDR=h"), (Mpi, [3, 4, 1, 2, 1], ("h", 22806), Some("mpi-1251147777"))),
            (
                OPEN_MPI.replace("LOCAL_SIZE=2", "LOCAL_SIZE=4"),
                (Mpi, [3, 4, 1, 4, 0], ("127.0.0.1", 22806), Some("mpi-1251147777")),
            ),
            // mpirun in a job: ranks of other nodes are children of an srun of mpirun's own.
            (format!("{SRUN} {OPEN_MPI}"), (Mpi, [3, 4, 1, 2, 1], ("n1", 22806), Some("mpi-1251147777"))),
            // fsdp-launch has started mpirun.
            (
                format!("{OPEN_MPI} MASTER_ADDR=127.0.0.1 MASTER_PORT=5 FSDP_PREPARED=1"),
                (Mpi, [3, 4, 1, 2, 1], ("127.0.0.1", 5), None),
            ),
            (format!("{HYDRA} MASTER_PORT=7"), (Mpi, [1, 2, 1, 2, 0], ("127.0.0.1", 7), Some("127.0.0.1:7"))),
            (SRUN.to_owned(), (Slurm, [2, 4, 2, 3, 0], ("n1", 20094), Some("slurm-3.1"))),
            // salloc, then `srun -n1 fsdp-train`.
            (
                "SLURM_JOB_ID=3 SLURM_STEP_ID=1 SLURM_JOB_NAME=interactive SLURM_PROCID=0 SLURM_NODEID=0 SLURM_LOCALID=0 \
                 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=1 \
                 SLURM_STEP_NODELIST=n1 SLURM_JOB_NODELIST=n[1-2]"
                    .to_owned(),
                (Slurm, [0, 1, 0, 1, 0], ("n1", 20094), Some("slurm-3.1")),
            ),
            (
                format!("{SRUN} PMIX_RANK=2 PMIX_NAMESPACE=slurm.pmix.3.1"),
                (Mpi, [2, 4, 2, 3, 0], ("n1", 20094), Some("slurm-3.1")),
            ),
            (format!("{SRUN} PMI_RANK=2 PMI_SIZE=4"), (Mpi, [2, 4, 2, 3, 0], ("n1", 20094), Some("slurm-3.1"))),
            // A batch script may export the store's place for all kinds of starters.
            (
                format!("{SRUN} MASTER_ADDR=head MASTER_PORT=29500 WORLD_SIZE=4"),
                (Slurm, [2, 4, 2, 3, 0], ("head", 29500), Some("slurm-3.1")),
            ),
            // One launcher a node under srun starts ranks of its own.
            (
                format!(
                    "{SRUN} RANK=7 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 MASTER_ADDR=n1 MASTER_PORT=9"
                ),
                (Launcher, [7, 8, 3, 4, 1], ("n1", 9), None),
            ),
        ];
        for (lines, expected) in cases {
            let env = parse(vars(lines)).unwrap_or_else(|error| panic!("{lines}: {error}"));
            let numbers = [env.rank, env.world_size, env.local_rank, env.local_world_size, env.group_rank];
            let store = (env.master_addr.as_str(), env.master_port);
            assert_eq!((env.started_by, numbers, store, env.run_id.as_deref()), *expected, "{lines}");
        }
    }

    #[test]
    fn prepared_ranks_find_their_launcher() {
        let mut vars = vars(OPEN_MPI);
        vars.extend(prepared_vars("127.0.0.1", 1234, Some(80)));
        let env = parse(vars).unwrap();
        assert_eq!((env.run_id, env.master_port, env.terminal_width), (None, 1234, Some(80)));
    }
}
