//! What ranks find out about each other before they set anything up: that all compute alike, that their numbers go with
//! the sharding, and that all nodes have the same output folder.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fsdp_config::{JobConfig, Strategy};
use fsdp_control::env::{StartedBy, WorkerEnv};
use fsdp_control::store::Store;
use fsdp_control::{ControlError, host_name};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_128;

use crate::checkpoints::Inputs;
use crate::device::ComputeDevice;
use crate::error::TrainError;

/// How long a file that another node has written may take to show: NFS keeps what it knows of a folder for a while.
const SHOWS_WITHIN: Duration = Duration::from_secs(90);

const POLL_EVERY: Duration = Duration::from_millis(100);

/// How much longer the others wait than rank 0, which knows who did not come.
const RANK_0_SAYS_WITHIN: Duration = Duration::from_secs(5);

/// What a rank tells rank 0.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Facts {
    host: String,
    /// Of the rank's node, and of no other one.
    node: String,
    num_local_ranks: usize,
    /// `cuda`, or `cpu` with the reason.
    device: (String, Option<String>),
    backend: String,
    /// The digest of the program, where no launcher has compared it.
    program: Option<String>,
    /// A file that rank 0 has written to the output folder, if this rank looked for it in vain.
    unseen: Option<PathBuf>,
}

/// Compares what the ranks are and see, which rank 0 does. `config` has device and back end chosen. Collective.
///
/// # Errors
/// [`TrainError::BadInput`], the same on all ranks: they do not go together. Or one did not come in time.
pub fn agree(
    store: &mut Store,
    config: &JobConfig,
    env: &WorkerEnv,
    compute: &ComputeDevice,
) -> Result<(), TrainError> {
    let timeout = Duration::from_secs(config.fsdp.timeout_secs);
    let shows_within = timeout.min(SHOWS_WITHIN);
    let has_several_nodes = env.world_size > env.local_world_size;
    let log_dir = config.output.dir.join("logs");
    let log_dir = std::path::absolute(&log_dir).unwrap_or(log_dir);
    let mut mark = None;
    let mut unseen = None;
    if has_several_nodes && env.rank == 0 {
        let new = Mark::leave(&log_dir)?;
        store.set("nodes/mark", new.name.as_bytes())?;
        mark = Some(new);
    } else if has_several_nodes && env.local_rank == 0 {
        let name = store.get("nodes/mark", timeout)?;
        let path = log_dir.join(String::from_utf8_lossy(&name).as_ref());
        if !shows(&path, shows_within) {
            unseen = Some(path);
        }
    }
    let own = Facts {
        host: host_name(),
        node: match env.started_by {
            // It does not number nodes.
            StartedBy::Mpi => host_name(),
            StartedBy::Launcher | StartedBy::Slurm => env.group_rank.to_string(),
        },
        num_local_ranks: env.local_world_size,
        device: (config.fsdp.device.name().to_owned(), compute.why_cpu.clone()),
        backend: config.fsdp.backend.name().to_owned(),
        program: if env.started_by == StartedBy::Launcher { None } else { Some(program_digest()?) },
        unseen,
    };
    compare(store, env, "nodes", &own, timeout + shows_within, |all| {
        drop(mark.take());
        let refusal = refuse(all, config);
        if refusal.is_none()
            && let Some(warning) = scattered_group(all, config)
        {
            tracing::warn!("{warning}");
        }
        refusal
    })
}

/// Compares what the ranks read: a file system of each node may hold another version. Collective.
///
/// # Errors
/// [`TrainError::BadInput`], the same on all ranks: they differ. Or one did not come in time.
pub fn agree_on_inputs(
    store: &mut Store,
    env: &WorkerEnv,
    inputs: &Inputs,
    timeout: Duration,
) -> Result<(), TrainError> {
    let own = (host_name(), inputs.clone());
    compare(store, env, "inputs", &own, timeout, |all: &[(String, Inputs)]| {
        let (host, first) = &all[0];
        all.iter().enumerate().find_map(|(rank, (other_host, other))| {
            let (what, first, other) = [
                ("the training data", &first.data_digest, &other.data_digest),
                ("the tokenizer", &first.tokenizer_digest, &other.tokenizer_digest),
                ("the model's config.json", &text_digest(&first.model_config), &text_digest(&other.model_config)),
            ]
            .into_iter()
            .find_map(|(what, first, other)| (first != other).then(|| (what, first.clone(), other.clone())))?;
            Some(format!(
                "{what}: expected the same on all ranks, got digest {first} on rank 0 (host {host}) and {other} on rank {rank} \
                 (host {other_host}); give all nodes the same files"
            ))
        })
    })
}

fn text_digest(text: &str) -> String {
    format!("{:032x}", xxh3_128(text.as_bytes()))
}

/// Rank 0 hears what all ranks have to say of themselves, and says whether they go together.
fn compare<T: Serialize + DeserializeOwned>(
    store: &mut Store,
    env: &WorkerEnv,
    name: &str,
    own: &T,
    timeout: Duration,
    refuse: impl FnOnce(&[T]) -> Option<String>,
) -> Result<(), TrainError> {
    let json = "plain fields are always representable as JSON";
    let (key, verdict) = (|rank: usize| format!("{name}/rank-{rank}"), format!("{name}/refusal"));
    store.set(&key(env.rank), &serde_json::to_vec(own).expect(json))?;
    let refusal = if env.rank == 0 {
        let refusal = refuse(&gather(store, env.world_size, key, timeout)?);
        store.set(&verdict, &serde_json::to_vec(&refusal).expect(json))?;
        refusal
    } else {
        let bytes = store.get(&verdict, timeout + RANK_0_SAYS_WITHIN)?;
        let what = "what it makes of the ranks";
        serde_json::from_slice(&bytes).map_err(|source| TrainError::Message { rank: 0, what, source })?
    };
    refusal.map_or(Ok(()), |refusal| Err(TrainError::BadInput(refusal)))
}

/// Of this program's file.
fn program_digest() -> Result<String, TrainError> {
    let path = PathBuf::from("/proc/self/exe");
    match std::fs::read(&path) {
        Ok(bytes) => Ok(format!("{:032x}", xxh3_128(&bytes))),
        Err(source) => Err(TrainError::Io { path, source }),
    }
}

/// A file in the output folder, for as long as other nodes look for it.
struct Mark {
    path: PathBuf,
    name: String,
}

impl Mark {
    /// Of a name that no node can remember as missing.
    fn leave(log_dir: &Path) -> Result<Self, TrainError> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let name = format!("shared-{:x}-{:x}", now.as_nanos(), std::process::id());
        let path = log_dir.join(&name);
        std::fs::create_dir_all(log_dir)
            .and_then(|()| std::fs::write(&path, host_name()))
            .map_err(|source| TrainError::Io { path: path.clone(), source })?;
        Ok(Mark { path, name })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // An empty file more in the logs does no harm.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn shows(path: &Path, within: Duration) -> bool {
    let start = Instant::now();
    loop {
        // Opened, not only looked up: then NFS asks the server.
        if std::fs::File::open(path).is_ok() {
            return true;
        }
        if start.elapsed() >= within {
            return false;
        }
        std::thread::sleep(POLL_EVERY);
    }
}

/// What all ranks say, by rank.
fn gather<T: DeserializeOwned>(
    store: &mut Store,
    world_size: usize,
    key: impl Fn(usize) -> String,
    timeout: Duration,
) -> Result<Vec<T>, TrainError> {
    let start = Instant::now();
    let (mut all, mut missing) = (Vec::new(), Vec::new());
    for rank in 0..world_size {
        match store.get(&key(rank), timeout.saturating_sub(start.elapsed())) {
            Ok(bytes) => all.push(serde_json::from_slice(&bytes).map_err(|source| TrainError::Message {
                rank,
                what: "what it runs on",
                source,
            })?),
            Err(ControlError::KeyTimeout { .. }) => missing.push(rank),
            Err(error) => return Err(error.into()),
        }
    }
    if missing.is_empty() {
        return Ok(all);
    }
    Err(ControlError::BarrierTimeout { name: "start".to_owned(), world_size, missing, timeout }.into())
}

/// Why these ranks cannot train together.
fn refuse(all: &[Facts], config: &JobConfig) -> Option<String> {
    let first = &all[0];
    for (rank, one) in all.iter().enumerate() {
        let who = format!("rank {rank} (host {})", one.host);
        if let Some(path) = &one.unseen {
            return Some(format!(
                "[output] dir: expected one folder on all nodes, but {who} does not see {}, which rank 0 (host {}) has \
                 written; the output folder must be on a file system that all nodes share",
                path.display(),
                first.host
            ));
        }
        if one.device.0 != first.device.0 {
            let why_cpu =
                one.device.1.as_ref().or(first.device.1.as_ref()).map_or(String::new(), |w| format!(" ({w})"));
            return Some(format!(
                "[fsdp] device: expected the same on all ranks, got {} on rank 0 (host {}) and {} on {who}{why_cpu}; \
                 repair that host, or set device",
                first.device.0, first.host, one.device.0
            ));
        }
        if let (Some(own), Some(other)) = (&first.program, &one.program)
            && own != other
        {
            return Some(format!(
                "expected the same fsdp-train on all ranks, got digest {own} on rank 0 (host {}) and {other} on {who}; use \
                 one build on all nodes",
                first.host
            ));
        }
        if one.backend != first.backend {
            return Some(format!(
                "[fsdp] backend: expected the same on all ranks, got {} on rank 0 (host {}) and {} on {who}; set backend, \
                 and use one build on all nodes",
                first.backend, first.host, one.backend
            ));
        }
    }
    let is_uneven = all.iter().any(|one| one.num_local_ranks != first.num_local_ranks);
    if is_uneven && config.fsdp.strategy == Strategy::HybridShard && config.fsdp.shard_size.is_none() {
        let mut nodes: Vec<(&str, &str, usize)> = Vec::new();
        for one in all {
            match nodes.iter_mut().find(|(node, ..)| *node == one.node) {
                Some((.., count)) => *count += 1,
                None => nodes.push((&one.node, &one.host, 1)),
            }
        }
        let counts: Vec<String> = nodes.iter().map(|(_, host, count)| format!("{count} on {host}")).collect();
        return Some(format!(
            "[fsdp] shard_size: expected as many ranks on each node, which is the default, got {}; set it to a divisor \
             of the {} ranks",
            counts.join(", "),
            all.len()
        ));
    }
    None
}

/// A warning where ranks that share shards are on several nodes although one had room for them.
fn scattered_group(all: &[Facts], config: &JobConfig) -> Option<String> {
    let num_local_ranks = all.iter().map(|one| one.num_local_ranks).min()?;
    let num_shards = config.num_shards(all.len() as u64, num_local_ranks as u64).ok()? as usize;
    if num_shards > num_local_ranks {
        return None;
    }
    let mut groups = all.chunks(num_shards).enumerate();
    let (index, group, other) = groups.find_map(|(index, group)| {
        let other = group.iter().position(|one| one.node != group[0].node)?;
        Some((index, group, other))
    })?;
    let rank = index * num_shards;
    Some(format!(
        "rank {rank} (host {}) and rank {} (host {}) share the shards of each unit, but not a node, although {num_shards} \
         ranks fit on one: parameters cross nodes at each use; number the ranks node by node (srun --distribution=block, \
         mpirun --map-by slot), and let shard_size divide the ranks of a node",
        group[0].host,
        rank + other,
        group[other].host
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(fsdp: &str) -> JobConfig {
        let text = format!(
            "[model]\npath = \"model\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 10\nseq_len = 8\n[data]\n\
             train = [\"a.jsonl\"]\n[fsdp]\n{fsdp}\n"
        );
        JobConfig::parse("test", &text).unwrap()
    }

    /// One rank for each letter, which names its node.
    fn ranks(nodes: &str) -> Vec<Facts> {
        let facts = |node: char| Facts {
            host: format!("host-{node}"),
            node: node.to_string(),
            num_local_ranks: nodes.chars().filter(|other| *other == node).count(),
            device: ("cuda".into(), None),
            backend: "nccl".into(),
            program: None,
            unseen: None,
        };
        nodes.chars().map(facts).collect()
    }

    #[test]
    fn ranks_that_differ_are_named() {
        let config = config("");
        assert_eq!(refuse(&ranks("aabb"), &config), None);
        let cpu = || ("cpu".to_owned(), Some("no driver".to_owned()));
        type Change = fn(&mut Vec<Facts>, (String, Option<String>));
        for (change, expected) in [
            ((|all, cpu| all[3].device = cpu) as Change, "cpu on rank 3 (host host-b) (no driver)"),
            (
                |all, cpu| all[0].device = cpu,
                "got cpu on rank 0 (host host-a) and cuda on rank 1 (host host-a) (no driver)",
            ),
            (
                |all, _| all[2].backend = "shm".into(),
                "got nccl on rank 0 (host host-a) and shm on rank 2 (host host-b)",
            ),
            (|all, _| all[2].unseen = Some("/out/logs/x".into()), "rank 2 (host host-b) does not see /out/logs/x"),
        ] {
            let mut all = ranks("aabb");
            change(&mut all, cpu());
            let refusal = refuse(&all, &config).unwrap_or_default();
            assert!(refusal.contains(expected), "{refusal}");
        }
    }

    #[test]
    fn the_ranks_of_uneven_nodes_are_no_default() {
        let hybrid = "strategy = \"hybrid_shard\"";
        for (fsdp, nodes, expected) in [
            (hybrid, "aabb", None),
            (hybrid, "aaab", Some("got 3 on host-a, 1 on host-b; set it to a divisor of the 4 ranks")),
            ("strategy = \"hybrid_shard\"\nshard_size = 2", "aaab", None),
            ("", "aaab", None),
        ] {
            let got = refuse(&ranks(nodes), &config(fsdp));
            assert!(
                match (&got, expected) {
                    (Some(got), Some(expected)) => got.contains(expected),
                    (got, expected) => got.is_none() && expected.is_none(),
                },
                "{fsdp}, {nodes}: {got:?}"
            );
        }
    }

    #[test]
    fn shard_groups_across_nodes_are_told_where_a_node_had_room() {
        for (shard_size, nodes, expected) in [
            (2, "aabb", None),
            (2, "abab", Some("rank 0 (host host-a) and rank 1 (host host-b)")),
            (2, "aaabbb", Some("rank 2 (host host-a) and rank 3 (host host-b)")),
            (4, "aabbaabb", Some("rank 0 (host host-a) and rank 2 (host host-b)")),
            // They have to.
            (2, "abcd", None),
            (4, "aabbccdd", None),
        ] {
            let config = config(&format!("strategy = \"hybrid_shard\"\nshard_size = {shard_size}"));
            let got = scattered_group(&ranks(nodes), &config);
            assert_eq!(got.is_some(), expected.is_some(), "{shard_size}, {nodes}: {got:?}");
            assert!(got.unwrap_or_default().contains(expected.unwrap_or_default()), "{shard_size}, {nodes}");
        }
        assert_eq!(scattered_group(&ranks("abab"), &config("")), None);
    }

    #[test]
    fn a_mark_shows_until_it_is_dropped() {
        let dir = std::env::temp_dir().join(format!("fsdp-mark-{}", std::process::id()));
        let mark = Mark::leave(&dir).unwrap();
        let path = dir.join(&mark.name);
        assert!(shows(&path, Duration::ZERO));
        drop(mark);
        assert!(!shows(&path, Duration::ZERO));
        std::fs::remove_dir(&dir).unwrap();
    }
}
