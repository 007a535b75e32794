//! What SLURM tells a process of a job step (`srun`) about its place in it.

use std::collections::HashSet;
use std::str::FromStr;

use crate::ControlError;
use crate::env::Lookup;

mod node_list;

pub use node_list::expand_hostlist;

/// Most hosts that a node list may name, and most tasks of a step.
const MAX_HOSTS: usize = 1 << 16;

/// A process's place in a job step, from the variables that `srun` sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slurm {
    pub job_id: u64,
    pub step_id: u64,
    /// `SLURM_PROCID`: this task among all of the step, `0..num_tasks`.
    pub proc_id: usize,
    pub num_tasks: usize,
    /// `SLURM_LOCALID`: this task among those of its node.
    pub local_id: usize,
    /// Tasks on this node.
    pub num_local_tasks: usize,
    /// `SLURM_NODEID`: this node among those of the step, `0..num_nodes`.
    pub node_rank: usize,
    pub num_nodes: usize,
    /// The first node of the step, where task 0 runs.
    pub head_host: String,
}

impl Slurm {
    /// The place of a launcher; `None` outside of job steps, and in interactive shells (a step of one task whose job is
    /// called `bash` or `interactive`), which are where people start launchers.
    ///
    /// # Errors
    /// A variable is missing, is no number, or contradicts another one.
    pub fn from_env() -> Result<Option<Self>, ControlError> {
        let lookup: Lookup = &crate::env::process_variable;
        Ok(Self::from_lookup(lookup)?.filter(|slurm| !slurm.is_shell(lookup)))
    }

    fn is_shell(&self, lookup: Lookup) -> bool {
        self.num_tasks == 1 && lookup("SLURM_JOB_NAME").is_some_and(|name| name == "bash" || name == "interactive")
    }

    /// The place of a task; `None` outside of job steps.
    pub(crate) fn from_lookup(lookup: Lookup) -> Result<Option<Self>, ControlError> {
        // The step's own figures come first: with --preserve-env, the others are the job's.
        let first = |names: &[&'static str]| -> Result<(&'static str, String), ControlError> {
            let found = names.iter().find_map(|name| Some((*name, lookup(name)?)));
            found.ok_or(ControlError::MissingVariable { name: names[0], hint: "srun sets it in each task" })
        };
        if !is_step(lookup) {
            return Ok(None);
        }
        let num_tasks = positive(first(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])?)?;
        let node_names = ["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"];
        let num_nodes = positive(first(&node_names)?)?;
        let proc_id = below(first(&["SLURM_PROCID"])?, "the number of tasks", num_tasks)?;
        let node_rank = below(first(&["SLURM_NODEID"])?, "the number of nodes", num_nodes)?;
        let (tasks_name, tasks) = first(&["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"])?;
        let bad_tasks =
            |expected: String| ControlError::BadVariable { name: tasks_name, value: tasks.clone(), expected };
        let per_node = expand_tasks_per_node(&tasks)
            .ok_or_else(|| bad_tasks("tasks of each node, such as 4(x2) or 3,1".to_owned()))?;
        if per_node.len() != num_nodes || per_node.iter().sum::<usize>() != num_tasks {
            return Err(bad_tasks(format!("{num_nodes} nodes with {num_tasks} tasks in all")));
        }
        let num_local_tasks = per_node[node_rank];
        let local_id = below(first(&["SLURM_LOCALID"])?, "the number of this node's tasks", num_local_tasks)?;
        let (_, nodes) = first(&["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"])?;
        Ok(Some(Slurm {
            job_id: number(first(&["SLURM_JOB_ID", "SLURM_JOBID"])?)?,
            step_id: number(first(&["SLURM_STEP_ID"])?)?,
            proc_id,
            num_tasks,
            local_id,
            num_local_tasks,
            node_rank,
            num_nodes,
            head_host: expand_hostlist(&nodes)?.swap_remove(0),
        }))
    }

    /// The port of this step's store: the same in all of its tasks, another one for other steps and for jobs whose ids
    /// are near. Below those that systems give to clients (32768 and up).
    pub fn port(&self) -> u16 {
        let spread = self.job_id.wrapping_mul(31).wrapping_add(self.step_id);
        20000 + (spread % 10000) as u16
    }
}

/// Whether this process is a task of a step, as SLURM's variables say.
pub fn in_step() -> bool {
    is_step(&crate::env::process_variable)
}

/// Whether the variables of the step are this process's own. A batch script has most of them too: SLURM sets some, and where
/// `sbatch` ran inside another step, that one's are inherited. Those give themselves away by a layout or by nodes that are
/// not this job's, since `srun` tells its tasks the step's layout under the job's names as well. (An inherited step with
/// the same layout on the same nodes does not.)
fn is_step(lookup: Lookup) -> bool {
    if lookup("SLURM_STEP_ID").is_none() || lookup("SLURM_PROCID").is_none() {
        return false;
    }
    let pair = |step, job| lookup(step).zip(lookup(job));
    let same_layout = [
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    ];
    if !same_layout.iter().all(|(step, job)| pair(step, job).is_none_or(|(step, job)| step == job)) {
        return false;
    }
    match pair("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
        .map(|(step, job)| (expand_hostlist(&step), expand_hostlist(&job)))
    {
        Some((Ok(step), Ok(job))) => {
            let job: HashSet<String> = job.into_iter().collect();
            step.iter().all(|host| job.contains(host))
        }
        // What is no list is said later.
        _ => true,
    }
}

fn number<T: FromStr>((name, value): (&'static str, String)) -> Result<T, ControlError> {
    value.parse().map_err(|_| ControlError::BadVariable { name, value, expected: "a whole number".to_owned() })
}

fn positive((name, value): (&'static str, String)) -> Result<usize, ControlError> {
    match value.parse() {
        Ok(parsed @ 1..) => Ok(parsed),
        _ => Err(ControlError::BadVariable { name, value, expected: "a whole number from 1".to_owned() }),
    }
}

fn below((name, value): (&'static str, String), limit_name: &str, limit: usize) -> Result<usize, ControlError> {
    match value.parse() {
        Ok(parsed) if parsed < limit => Ok(parsed),
        _ => {
            let expected = format!("a whole number less than {limit_name}, which is {limit}");
            Err(ControlError::BadVariable { name, value, expected })
        }
    }
}

/// `4(x2),1` -> 4, 4, 1. `None` for what is not of that form, or has a number of 0, or more than [`MAX_HOSTS`] tasks.
fn expand_tasks_per_node(text: &str) -> Option<Vec<usize>> {
    let mut per_node = Vec::new();
    let mut num_tasks = 0usize;
    for part in text.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?),
            None => (part, "1"),
        };
        let (tasks, times) = (tasks.parse::<usize>().ok()?, times.parse::<usize>().ok()?);
        num_tasks = tasks.checked_mul(times)?.checked_add(num_tasks)?;
        if tasks == 0 || times == 0 || num_tasks > MAX_HOSTS {
            return None;
        }
        per_node.extend(std::iter::repeat_n(tasks, times));
    }
    Some(per_node)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Task 5 of `srun -n 6` over three nodes, in a job of four.
    fn step() -> HashMap<&'static str, &'static str> {
        HashMap::from([
            ("SLURM_JOB_ID", "4711"),
            ("SLURM_JOB_NAME", "finetune"),
            ("SLURM_JOB_NUM_NODES", "4"),
            ("SLURM_JOB_NODELIST", "n[01-04]"),
            ("SLURM_STEP_ID", "2"),
            ("SLURM_STEP_NUM_NODES", "3"),
            ("SLURM_STEP_NUM_TASKS", "6"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,1,3"),
            ("SLURM_STEP_NODELIST", "n[02-04]"),
            ("SLURM_NODEID", "2"),
            ("SLURM_PROCID", "5"),
            ("SLURM_LOCALID", "2"),
        ])
    }

    fn parse(vars: &HashMap<&str, &str>) -> Result<Option<Slurm>, ControlError> {
        Slurm::from_lookup(&|name| vars.get(name).map(|v| v.to_string()))
    }

    #[test]
    fn a_task_knows_its_place_in_the_step_rather_than_in_the_job() {
        let expected = Slurm {
            job_id: 4711,
            step_id: 2,
            proc_id: 5,
            num_tasks: 6,
            local_id: 2,
            num_local_tasks: 3,
            node_rank: 2,
            num_nodes: 3,
            head_host: "n02".into(),
        };
        assert_eq!(parse(&step()).unwrap().unwrap(), expected);
    }

    #[test]
    fn a_step_counts_and_a_shell_is_one_for_tasks_alone() {
        for (change, expected) in [
            (&[("SLURM_JOB_NAME", "bash")][..], true),
            (&[("SLURM_STEP_ID", "")], false),
            (&[("SLURM_PROCID", "")], false),
        ] {
            let mut vars = step();
            vars.extend(change.iter().copied());
            vars.retain(|_, value| !value.is_empty());
            assert_eq!(parse(&vars).unwrap().is_some(), expected, "{change:?}");
        }
        let mut shell = step();
        shell.extend([
            ("SLURM_STEP_NUM_TASKS", "1"),
            ("SLURM_STEP_NUM_NODES", "1"),
            ("SLURM_STEP_TASKS_PER_NODE", "1"),
        ]);
        shell.extend([("SLURM_NODEID", "0"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")]);
        for (name, expected) in [("finetune", false), ("bash", true), ("interactive", true)] {
            shell.insert("SLURM_JOB_NAME", name);
            // A task all the same: `salloc`, then `srun -n1 fsdp-train`.
            let slurm = parse(&shell).unwrap().unwrap();
            assert_eq!((slurm.num_tasks, slurm.is_shell(&|_| Some(name.to_owned()))), (1, expected), "{name}");
        }
        assert_eq!(parse(&HashMap::new()).unwrap(), None);
    }

    #[test]
    fn the_variables_of_another_step_in_a_batch_script_do_not_count() {
        // What srun of SLURM 22.05 sets in a task of `-n 3` in a job of four, and what a batch script has that was
        // submitted from such a task.
        let of_step = [("SLURM_NTASKS", "6"), ("SLURM_NNODES", "3"), ("SLURM_TASKS_PER_NODE", "2,1,3")];
        let of_script = [("SLURM_NODEID", "0"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")];
        for (change, expected) in [
            (&[][..], true),
            (&[("SLURM_NTASKS", "8")], false),
            (&[("SLURM_NNODES", "1")], false),
            // Without --ntasks, the inherited number stays.
            (&[("SLURM_TASKS_PER_NODE", "1")], false),
            (&[("SLURM_JOB_NODELIST", "n[02-03],m04")], false),
            (&[("SLURM_JOB_NODELIST", "n[02-04]")], true),
        ] {
            let mut vars = step();
            vars.extend(of_step);
            vars.extend(of_script);
            vars.extend(change.iter().copied());
            assert_eq!(parse(&vars).unwrap().is_some(), expected, "{change:?}");
        }
    }

    #[test]
    fn contradictions_and_gaps_name_the_variable() {
        for (name, value, expected) in [
            ("SLURM_PROCID", "6", "less than the number of tasks, which is 6"),
            ("SLURM_NODEID", "3", "less than the number of nodes, which is 3"),
            ("SLURM_LOCALID", "3", "less than the number of this node's tasks, which is 3"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,1", "3 nodes with 6 tasks in all"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1", "3 nodes with 6 tasks in all"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x", "such as 4(x2) or 3,1"),
            ("SLURM_STEP_TASKS_PER_NODE", "2,0,4", "such as 4(x2) or 3,1"),
            ("SLURM_STEP_TASKS_PER_NODE", "1(x99999999999)", "such as 4(x2) or 3,1"),
            ("SLURM_STEP_ID", "x", "a whole number"),
            ("SLURM_STEP_NUM_NODES", "x", "a whole number from 1"),
            ("SLURM_STEP_NUM_NODES", "0", "a whole number from 1"),
            ("SLURM_STEP_NUM_TASKS", "0", "a whole number from 1"),
            ("SLURM_JOB_ID", "-1", "a whole number"),
        ] {
            let mut vars = step();
            vars.insert(name, value);
            let message = parse(&vars).unwrap_err().to_string();
            assert!(message.contains(&format!("{name}={value:?}")) && message.contains(expected), "{message}");
        }
        for name in ["SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_TASKS_PER_NODE"] {
            let mut vars = step();
            vars.remove(name);
            assert!(parse(&vars).unwrap_err().to_string().contains(&format!("{name} is not set")));
        }
        let mut vars = step();
        vars.insert("SLURM_STEP_NODELIST", "n[02-");
        assert!(parse(&vars).unwrap_err().to_string().contains("\"n[02-\", position 2"));
    }

    #[test]
    fn tasks_per_node_expand() {
        assert_eq!(expand_tasks_per_node("4(x2),1"), Some(vec![4, 4, 1]));
        assert_eq!(expand_tasks_per_node("3"), Some(vec![3]));
    }

    #[test]
    fn steps_and_neighbouring_jobs_have_ports_of_their_own() {
        let slurm = parse(&step()).unwrap().unwrap();
        let port = |job_id, step_id| Slurm { job_id, step_id, ..slurm.clone() }.port();
        let mut ports: Vec<u16> =
            (1000..1300).flat_map(|job| (0..31).map(move |step| (job, step))).map(|(j, s)| port(j, s)).collect();
        assert!(ports.iter().all(|port| (20000..30000).contains(port)));
        ports.sort();
        ports.dedup();
        assert_eq!(ports.len(), 300 * 31);
        port(u64::MAX, u64::MAX);
    }
}
