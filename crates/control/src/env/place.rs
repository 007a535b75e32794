//! Which variables give a process its rank, and where the store then is.

use super::{Lookup, StartedBy, need, number, number_in};
use crate::ControlError;
use crate::slurm::{Slurm, expand_hostlist};

/// Far above what anybody has, so that sums and products of ranks cannot overflow.
const MAX_RANKS: usize = 1 << 20;

const LAUNCHER: &str = "start ranks with fsdp-launch, mpirun or srun";
const MPI: &str = "the MPI that set the others should set it too";
const SEVERAL_HOSTS: &str = "give all ranks the host of rank 0, such as with mpirun -x MASTER_ADDR=HOST";
const NOTHING_SHARED: &str = "this MPI tells its ranks nothing that only they share: give all of them a free port of \
                              rank 0's host, such as with mpiexec -genv MASTER_PORT 29500";

/// What the variables of one kind of start say.
pub struct Place {
    pub started_by: StartedBy,
    pub rank: usize,
    pub world_size: usize,
    pub local_rank: usize,
    pub local_world_size: usize,
    pub group_rank: usize,
    /// Shared by all ranks of this start, and by nobody else; `None` where nothing is.
    pub run_id: Option<String>,
    slurm: Option<Slurm>,
}

impl Place {
    pub fn find(lookup: Lookup) -> Result<Self, ControlError> {
        let is_set = |name| lookup(name).is_some();
        if is_set("RANK") {
            let mut place = Self::read(lookup, ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])?;
            place.started_by = StartedBy::Launcher;
            place.group_rank = number("GROUP_RANK", need(lookup, "GROUP_RANK", LAUNCHER)?, "a whole number")?;
            return Ok(place);
        }
        if is_set("OMPI_COMM_WORLD_RANK") {
            let [rank, size] = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"];
            let mut place =
                Self::read(lookup, [rank, size, "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"])?;
            // Open MPI 5 and 4 have the first, older ones the second.
            let job = lookup("PMIX_NAMESPACE").or_else(|| lookup("OMPI_MCA_ess_base_jobid"));
            place.run_id = job.map(|job| format!("mpi-{job}"));
            return Ok(place);
        }
        // Hydra: MPICH, Intel MPI, MVAPICH.
        if is_set("PMI_RANK") && is_set("MPI_LOCALRANKID") {
            return Self::read(lookup, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]);
        }
        let Some(slurm) = Slurm::from_lookup(lookup)? else { return Err(ControlError::NoRank) };
        let has_mpi = is_set("PMIX_RANK") || is_set("PMI_RANK");
        Ok(Place {
            started_by: if has_mpi { StartedBy::Mpi } else { StartedBy::Slurm },
            rank: slurm.proc_id,
            world_size: slurm.num_tasks,
            local_rank: slurm.local_id,
            local_world_size: slurm.num_local_tasks,
            group_rank: slurm.node_rank,
            run_id: Some(format!("slurm-{}.{}", slurm.job_id, slurm.step_id)),
            slurm: Some(slurm),
        })
    }

    /// `names` of rank, world size, local rank and local world size.
    fn read(lookup: Lookup, names: [&'static str; 4]) -> Result<Self, ControlError> {
        let mut values = [0usize; 4];
        for (value, name) in values.iter_mut().zip(names) {
            let hint = if names[0] == "RANK" { LAUNCHER } else { MPI };
            *value = number(name, need(lookup, name, hint)?, "a whole number")?;
        }
        let [rank, world_size, local_rank, local_world_size] = values;
        let below = |name, value: usize, limit_name: &str, limit: usize| {
            if value < limit {
                return Ok(());
            }
            let expected = format!("less than {limit_name}, which is {limit}");
            Err(ControlError::BadVariable { name, value: value.to_string(), expected })
        };
        if world_size > MAX_RANKS {
            let expected = format!("at most {MAX_RANKS} ranks");
            return Err(ControlError::BadVariable { name: names[1], value: world_size.to_string(), expected });
        }
        below(names[0], rank, names[1], world_size)?;
        below(names[2], local_rank, names[3], local_world_size)?;
        below(names[3], local_world_size, &format!("{} + 1", names[1]), world_size + 1)?;
        Ok(Place {
            started_by: StartedBy::Mpi,
            rank,
            world_size,
            local_rank,
            local_world_size,
            group_rank: rank / local_world_size,
            run_id: None,
            slurm: None,
        })
    }

    /// Host and port of the store where no launcher serves it: what the variables say, else what all ranks can know.
    pub fn store(&self, lookup: Lookup) -> Result<(String, u16), ControlError> {
        let host = match (lookup("MASTER_ADDR"), &self.slurm, lookup("SLURM_JOB_NODELIST")) {
            (Some(host), _, _) => host,
            (None, Some(slurm), _) => slurm.head_host.clone(),
            (None, None, _) if self.world_size == self.local_world_size => "127.0.0.1".to_owned(),
            // mpirun in a job of several nodes: it begins on the first.
            (None, None, Some(nodes)) => expand_hostlist(&nodes)?.swap_remove(0),
            (None, None, None) => need(lookup, "MASTER_ADDR", SEVERAL_HOSTS)?,
        };
        let port = match (lookup("MASTER_PORT"), &self.slurm, &self.run_id) {
            (Some(port), _, _) => parse_port(port)?,
            (None, Some(slurm), _) => slurm.port(),
            (None, None, Some(id)) => port_of(id),
            (None, None, None) => parse_port(need(lookup, "MASTER_PORT", NOTHING_SHARED)?)?,
        };
        Ok((host, port))
    }

    /// Host and port of the launcher's store.
    pub fn launchers_store(lookup: Lookup) -> Result<(String, u16), ControlError> {
        Ok((need(lookup, "MASTER_ADDR", LAUNCHER)?, parse_port(need(lookup, "MASTER_PORT", LAUNCHER)?)?))
    }
}

fn parse_port(value: String) -> Result<u16, ControlError> {
    number_in("MASTER_PORT", value, |port| port > 0, "a port, 1 to 65535")
}

/// A port that follows from what the ranks share; below those that systems give to clients (32768 and up).
fn port_of(run_id: &str) -> u16 {
    let hash = run_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3) // FNV-1a
    });
    20000 + (hash % 10000) as u16
}
