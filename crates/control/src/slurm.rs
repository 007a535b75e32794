//! What SLURM tells a process of a job step (`srun`) about its place in it.

use std::str::FromStr;

use crate::ControlError;
use crate::env::Lookup;

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
    /// The place of this process; `None` outside of job steps (SLURM sets most variables in batch scripts too) and in
    /// interactive shells (a step of one task whose job is called `bash` or `interactive`).
    ///
    /// # Errors
    /// A variable is missing, is no number, or contradicts another one.
    pub fn from_env() -> Result<Option<Self>, ControlError> {
        Self::from_lookup(&crate::env::process_variable)
    }

    pub(crate) fn from_lookup(lookup: Lookup) -> Result<Option<Self>, ControlError> {
        // The step's own figures come first: where a step is smaller than its job, the others may be the job's.
        let first = |names: &[&'static str]| -> Result<(&'static str, String), ControlError> {
            let found = names.iter().find_map(|name| Some((*name, lookup(name)?)));
            found.ok_or(ControlError::MissingVariable { name: names[0], hint: "srun sets it in each task" })
        };
        if lookup("SLURM_STEP_ID").is_none() || lookup("SLURM_PROCID").is_none() {
            return Ok(None);
        }
        let num_tasks: usize = number(first(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])?)?;
        let is_shell = lookup("SLURM_JOB_NAME").is_some_and(|name| name == "bash" || name == "interactive");
        if num_tasks == 1 && is_shell {
            return Ok(None);
        }
        let node_names = ["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"];
        let num_nodes: usize = number(first(&node_names)?)?;
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

fn number<T: FromStr>((name, value): (&'static str, String)) -> Result<T, ControlError> {
    value.parse().map_err(|_| ControlError::BadVariable { name, value, expected: "a whole number".to_owned() })
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

/// The hosts of a SLURM node list, in order: `n[01-02,7],login` -> `n01`, `n02`, `n7`, `login`. Several brackets of one
/// name combine, the last one fastest: `a[1-2]b[3-4]` -> `a1b3`, `a1b4`, `a2b3`, `a2b4`. At least one host.
///
/// # Errors
/// [`ControlError::NodeList`] gives the position of what is no node list, or of what would make it too long.
pub fn expand_hostlist(list: &str) -> Result<Vec<String>, ControlError> {
    let failed = |at: usize, reason: &str| {
        Err(ControlError::NodeList { list: list.to_owned(), position: at + 1, reason: reason.to_owned() })
    };
    let bytes = list.as_bytes();
    let mut hosts: Vec<String> = Vec::new();
    // The names so far of the item at hand, which brackets multiply.
    let mut names = vec![String::new()];
    let mut at = 0;
    loop {
        match bytes.get(at) {
            None | Some(b',') => {
                if names[0].is_empty() {
                    return failed(at, "expected the name of a host");
                }
                if hosts.len() + names.len() > MAX_HOSTS {
                    return failed(at, "expected at most 65536 hosts");
                }
                hosts.append(&mut names);
                names.push(String::new());
                if at == bytes.len() {
                    return Ok(hosts);
                }
                at += 1;
            }
            Some(b'[') => {
                let Some(len) = list[at..].find(']') else { return failed(at, "this bracket is not closed") };
                let mut numbers = Vec::new();
                let mut start = at + 1;
                for range in list[start..at + len].split(',') {
                    match expand_range(range) {
                        Some(range) if numbers.len() + range.len() <= MAX_HOSTS => numbers.extend(range),
                        Some(_) => return failed(start, "expected at most 65536 hosts"),
                        None => return failed(start, "expected a number or a range such as 01-04"),
                    }
                    start += range.len() + 1;
                }
                if names.len() * numbers.len() > MAX_HOSTS {
                    return failed(at, "expected at most 65536 hosts");
                }
                names = names.iter().flat_map(|name| numbers.iter().map(move |n| format!("{name}{n}"))).collect();
                at += len + 1;
            }
            Some(byte) if byte.is_ascii_alphanumeric() || b"-_.".contains(byte) => {
                names.iter_mut().for_each(|name| name.push(char::from(*byte)));
                at += 1;
            }
            Some(_) => return failed(at, "expected a letter, a digit, or one of - _ . [ ,"),
        }
    }
}

/// `01-03` -> `01`, `02`, `03`; `7` -> `7`. `None` for what is no range, runs down, or is longer than [`MAX_HOSTS`].
fn expand_range(range: &str) -> Option<Vec<String>> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let (from, to) = (number(first)?, number(last)?);
    if to.checked_sub(from)? >= MAX_HOSTS as u64 || first.len() > 20 {
        return None;
    }
    Some((from..=to).map(|n| format!("{n:0width$}", width = first.len())).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::process::Command;

    use super::*;

    /// (List, its hosts separated by blanks).
    const LISTS: &[(&str, &str)] = &[
        ("login", "login"),
        ("n[01-04,7],login", "n01 n02 n03 n04 n7 login"),
        ("gpu[1-2]-ib[0-1]", "gpu1-ib0 gpu1-ib1 gpu2-ib0 gpu2-ib1"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[098-101],m[3]", "n098 n099 n100 n101 m3"),
        ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
        ("b,a,c10,c9", "b a c10 c9"),
        ("host-a.example,host_b", "host-a.example host_b"),
        ("x[5,1-2,1]", "x5 x1 x2 x1"),
    ];

    #[test]
    fn node_lists_expand_in_order() {
        for (list, hosts) in LISTS {
            assert_eq!(expand_hostlist(list).unwrap().join(" "), *hosts, "{list}");
        }
    }

    #[test]
    fn node_lists_expand_as_scontrol_expands_them() {
        // It wants a config, though it asks nobody.
        let conf = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(conf.path(), "ClusterName=test\nSlurmctldHost=localhost\n").unwrap();
        for (list, _) in LISTS {
            let mut command = Command::new("scontrol");
            command.args(["show", "hostnames", list]).env("SLURM_CONF", conf.path());
            let output = match command.output() {
                Ok(output) if output.status.success() => String::from_utf8(output.stdout).unwrap(),
                Ok(output) => return eprintln!("skipped: scontrol: {}", String::from_utf8_lossy(&output.stderr)),
                Err(error) => return eprintln!("skipped: scontrol (Debian: slurm-client): {error}"),
            };
            let expected: Vec<&str> = output.lines().collect();
            assert_eq!(expand_hostlist(list).unwrap(), expected, "{list}");
        }
    }

    #[test]
    fn what_is_no_node_list_is_refused_with_its_position() {
        for (list, position, reason) in [
            ("", 1, "the name of a host"),
            ("a,,b", 3, "the name of a host"),
            ("a,b,", 5, "the name of a host"),
            ("n[1-2", 2, "not closed"),
            ("n1]", 3, "a letter"),
            ("n[1 2]", 3, "a number or a range"),
            ("n[1,]", 5, "a number or a range"),
            ("n[]", 3, "a number or a range"),
            ("n[1,4-3]", 5, "a number or a range"),
            ("n[1-2-3]", 3, "a number or a range"),
            ("n[-1]", 3, "a number or a range"),
            ("n[+1-2]", 3, "a number or a range"),
            ("n[a-b]", 3, "a number or a range"),
            ("n[[1]]", 3, "a number or a range"),
            ("n[0-99999999999999999999]", 3, "a number or a range"),
            ("n[0-65536]", 3, "a number or a range"),
            ("n[1-60000,1-60000]", 11, "at most 65536 hosts"),
            ("n[1-60000],m[1-60000]", 22, "at most 65536 hosts"),
            ("a[1-300]b[1-300]", 10, "at most 65536 hosts"),
            ("n;rm", 2, "a letter"),
            ("né", 2, "a letter"),
        ] {
            let error = expand_hostlist(list).unwrap_err();
            let ControlError::NodeList { position: got, .. } = &error else { panic!("{list}: {error}") };
            assert_eq!(*got, position, "{list}: {error}");
            assert!(error.to_string().contains(reason), "{list}: {error}");
        }
    }

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
    fn only_steps_that_are_no_shell_count() {
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
        assert_eq!(parse(&shell).unwrap().unwrap().num_tasks, 1);
        for name in ["bash", "interactive"] {
            shell.insert("SLURM_JOB_NAME", name);
            assert_eq!(parse(&shell).unwrap(), None, "{name}");
        }
        assert_eq!(parse(&HashMap::new()).unwrap(), None);
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
