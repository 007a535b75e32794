//! Where this launcher stands: how many nodes there are, which one this is, and where they meet. Flags come first, then
//! what `srun` says.

use fsdp_control::slurm::{self, Slurm};

use crate::cli::RunArgs;
use crate::failure::Failure;

/// torchrun's port.
const DEFAULT_PORT: u16 = 29500;

/// One launcher a node; the one of node 0 is the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub num_nodes: usize,
    pub node_rank: usize,
    /// How the other nodes reach node 0.
    pub master_addr: String,
    /// 0 = a free one, with one node only.
    pub master_port: u16,
    /// Machines that an mpirun spreads its ranks over: those of a SLURM job, else this one.
    pub num_machines: usize,
}

impl Place {
    /// # Errors
    /// Flags that contradict each other, or a job step that is none for launchers.
    pub fn find(args: &RunArgs) -> Result<Self, Failure> {
        let variable = |name: &str| std::env::var(name).ok();
        let is_step = slurm::in_step();
        let slurm = match (is_step, args.nnodes) {
            (false, _) => None,
            (true, None) => Slurm::from_env().map_err(Failure::bad_input)?,
            // The flags may be for something else than this step.
            (true, Some(_)) => Slurm::from_env().unwrap_or_default(),
        };
        let mut place = Self::of(args, slurm.as_ref(), variable("MASTER_ADDR"), variable("MASTER_PORT"))?;
        let name = if is_step { "SLURM_STEP_NUM_NODES" } else { "SLURM_JOB_NUM_NODES" };
        if let (None, Some(num)) = (args.nnodes, variable(name)) {
            place.num_machines = num.parse().ok().filter(|num| *num > 0).ok_or_else(|| {
                Failure::bad_input(format!("{name}: expected a number of nodes, got {num:?}; unset it"))
            })?;
        }
        Ok(place)
    }

    /// `addr` and `port` are variables that count under `srun`, where scripts use to export them.
    fn of(args: &RunArgs, slurm: Option<&Slurm>, addr: Option<String>, port: Option<String>) -> Result<Self, Failure> {
        let slurm = match (args.nnodes, args.node_rank) {
            (None, _) => slurm,
            (Some(num), None) => slurm.filter(|slurm| slurm.num_nodes == num),
            (Some(_), Some(_)) => None,
        };
        if let Some(slurm) = slurm
            && slurm.num_tasks > slurm.num_nodes
        {
            return Err(Failure::bad_input(format!(
                "srun: expected one task per node for fsdp-launch, got {} tasks on {} nodes; start it with \
                 --ntasks-per-node=1, or fsdp-train with one task per rank",
                slurm.num_tasks, slurm.num_nodes
            )));
        }
        let slurm = slurm.filter(|slurm| slurm.num_nodes > 1);
        let num_nodes = slurm.map(|slurm| slurm.num_nodes).or(args.nnodes).unwrap_or(1);
        let node_rank = args.node_rank.or(slurm.map(|slurm| slurm.node_rank));
        let node_rank = match (node_rank, num_nodes) {
            (Some(rank), _) if rank < num_nodes => rank,
            (Some(rank), 1) => {
                return Err(Failure::bad_input(format!(
                    "--node-rank: expected 0 (less than --nnodes), got {rank}; leave it out on one machine"
                )));
            }
            (Some(rank), _) => {
                return Err(Failure::bad_input(format!(
                    "--node-rank: expected less than --nnodes, which is {num_nodes}, got {rank}; number the machines \
                     from 0"
                )));
            }
            (None, 1) => 0,
            (None, _) => {
                return Err(Failure::bad_input(format!(
                    "--node-rank: expected 0 to {} with --nnodes {num_nodes}, got none; give each machine its own",
                    num_nodes - 1
                )));
            }
        };
        if num_nodes == 1 {
            let master_addr = args.master_addr.clone().unwrap_or_else(|| "127.0.0.1".to_owned());
            return Ok(Self {
                num_nodes,
                node_rank,
                master_addr,
                master_port: args.master_port.unwrap_or(0),
                num_machines: 1,
            });
        }
        let of_slurm = |slurm: &Slurm| addr.unwrap_or_else(|| slurm.head_host.clone());
        let Some(master_addr) = args.master_addr.clone().or(slurm.map(of_slurm)) else {
            return Err(Failure::bad_input(format!(
                "--master-addr: expected the address of node 0 with --nnodes {num_nodes}, got none; give the same on \
                 all machines"
            )));
        };
        let master_port = match (args.master_port, slurm, port) {
            (Some(port), _, _) => port,
            (None, Some(_), Some(port)) => port.parse().map_err(|_| {
                Failure::bad_input(format!("MASTER_PORT: expected a port from 1 to 65535, got {port:?}; unset it"))
            })?,
            (None, Some(slurm), None) => slurm.port(),
            (None, None, _) => DEFAULT_PORT,
        };
        if master_port == 0 {
            return Err(Failure::bad_input(
                "--master-port: expected a port from 1 to 65535 with several machines, got 0; give the same on all",
            ));
        }
        Ok(Self { num_nodes, node_rank, master_addr, master_port, num_machines: 1 })
    }

    pub fn is_head(&self) -> bool {
        self.node_rank == 0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn args(flags: &str) -> RunArgs {
        let line = format!("fsdp-launch {flags} train.toml");
        Cli::try_parse_from(line.split_whitespace()).unwrap().run.unwrap()
    }

    fn slurm(num_nodes: usize, num_tasks: usize) -> Slurm {
        Slurm {
            job_id: 7,
            step_id: 0,
            proc_id: 1,
            num_tasks,
            local_id: 0,
            num_local_tasks: num_tasks / num_nodes,
            node_rank: 1 % num_nodes,
            num_nodes,
            head_host: "n01".to_owned(),
        }
    }

    fn place(num_nodes: usize, node_rank: usize, master_addr: &str, master_port: u16) -> Place {
        Place { num_nodes, node_rank, master_addr: master_addr.to_owned(), master_port, num_machines: 1 }
    }

    #[test]
    fn flags_then_slurm_then_one_machine() {
        let step = slurm(2, 2);
        let port = step.port();
        assert!((20000..30000).contains(&port));
        for (flags, slurm, variables, expected) in [
            ("", None, None, place(1, 0, "127.0.0.1", 0)),
            ("", None, Some(("h", "7")), place(1, 0, "127.0.0.1", 0)),
            ("--nnodes 1 --node-rank 0 --master-addr ::1 --master-port 9", None, None, place(1, 0, "::1", 9)),
            ("--nnodes 2 --node-rank 1 --master-addr a", None, None, place(2, 1, "a", DEFAULT_PORT)),
            ("--nnodes 3 --node-rank 0 --master-addr a --master-port 5", None, None, place(3, 0, "a", 5)),
            ("", Some(&step), None, place(2, 1, "n01", port)),
            ("", Some(&step), Some(("h", "7")), place(2, 1, "h", 7)),
            ("--master-port 8 --master-addr b", Some(&step), Some(("h", "7")), place(2, 1, "b", 8)),
            ("--nnodes 2", Some(&step), None, place(2, 1, "n01", port)),
            ("--nnodes 2 --master-addr b --master-port 8", Some(&step), None, place(2, 1, "b", 8)),
            ("--nnodes 2 --node-rank 0 --master-addr b", Some(&step), None, place(2, 0, "b", DEFAULT_PORT)),
            (
                "--nnodes 3 --node-rank 2 --master-addr b",
                Some(&self::slurm(2, 8)),
                None,
                place(3, 2, "b", DEFAULT_PORT),
            ),
            ("", Some(&self::slurm(1, 1)), Some(("h", "7")), place(1, 0, "127.0.0.1", 0)),
        ] {
            let (addr, port) = variables.map(|(addr, port): (&str, &str)| (addr.to_owned(), port.to_owned())).unzip();
            assert_eq!(Place::of(&args(flags), slurm, addr, port).unwrap(), expected, "{flags} {slurm:?}");
        }
    }

    #[test]
    fn contradictions_are_named() {
        for (flags, slurm, says) in [
            ("--nnodes 2 --master-addr a", None, "--node-rank: expected 0 to 1"),
            ("--nnodes 2 --node-rank 2 --master-addr a", None, "--node-rank: expected less than --nnodes, which is 2"),
            ("--nnodes 3 --master-addr a", Some(slurm(2, 2)), "--node-rank: expected 0 to 2"),
            ("--node-rank 1", None, "--node-rank: expected 0"),
            ("--nnodes 2 --node-rank 0", None, "--master-addr: expected the address of node 0"),
            ("--nnodes 2 --node-rank 0 --master-addr a --master-port 0", None, "--master-port"),
            ("", Some(slurm(2, 8)), "expected one task per node for fsdp-launch, got 8 tasks on 2 nodes"),
            ("", Some(slurm(1, 4)), "expected one task per node for fsdp-launch, got 4 tasks on 1 nodes"),
        ] {
            let error = Place::of(&args(flags), slurm.as_ref(), None, None).unwrap_err();
            assert!(error.message.contains(says) && error.status.code() == 2, "{flags}: {error:?}");
        }
        let error = Place::of(&args(""), Some(&slurm(2, 2)), None, Some("http".to_owned())).unwrap_err();
        assert!(error.message.contains("MASTER_PORT"), "{error:?}");
    }
}
