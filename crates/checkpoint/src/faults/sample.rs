//! Small checkpoints whose every value follows from step, state, tensor and element.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::fs::FileSystem;
use crate::sharded::{Checkpoint, Chunk, ManifestMeta, ShardReport, ShardWriter, State, commit_on};

const STATES: [State; 3] = [State::Param, State::ExpAvg, State::ExpAvgSq];

/// Name, shape. Their parts on two ranks meet inside the first.
const TENSORS: [(&str, [usize; 2]); 3] = [("embed", [19, 7]), ("norm", [1, 7]), ("head", [5, 7])];

/// What a checkpoint of `step` holds at an element of a tensor, by its number.
pub fn value(step: u64, state: State, tensor: usize, element: usize) -> f32 {
    step as f32 * 1000.0 + state as usize as f32 * 0.25 + ((tensor * 31 + element * 7) % 255) as f32
}

/// Rank `rank`'s contiguous part of all elements laid end to end: (tensor, start, end).
fn shard(rank: usize, world_size: usize) -> Vec<(usize, usize, usize)> {
    let numels = TENSORS.map(|(_, shape)| shape[0] * shape[1]);
    let per_rank = numels.iter().sum::<usize>().div_ceil(world_size);
    let (from, to) = (rank * per_rank, (rank + 1) * per_rank);
    let mut pieces = Vec::new();
    let mut first = 0;
    for (tensor, numel) in numels.into_iter().enumerate() {
        let (start, end) = (from.max(first), to.min(first + numel));
        if start < end {
            pieces.push((tensor, start - first, end - first));
        }
        first += numel;
    }
    pieces
}

/// As if the rank were killed amid [`save_rank`].
pub fn begin_rank<F: FileSystem>(
    fs: &F,
    root: &Path,
    step: u64,
    save_id: &str,
    rank: usize,
    world_size: usize,
) -> Result<()> {
    let mut writer = create(fs, root, step, save_id, rank, world_size)?;
    let (tensor, start, end) = shard(rank, world_size)[0];
    let values: Vec<f32> = (start..end).map(|element| value(step, State::Param, tensor, element)).collect();
    writer.write_f32(&values)
}

fn create<F: FileSystem>(
    fs: &F,
    root: &Path,
    step: u64,
    save_id: &str,
    rank: usize,
    world_size: usize,
) -> Result<ShardWriter<F>> {
    let pieces = shard(rank, world_size);
    let mut chunks = Vec::new();
    for state in STATES {
        for &(tensor, start, end) in &pieces {
            let (name, shape) = &TENSORS[tensor];
            chunks.push(Chunk { state, name, shape, start, len: end - start });
        }
    }
    ShardWriter::create_on(fs, root, step, save_id, rank, world_size, &chunks)
}

/// Writes one rank's file of the checkpoint of `step`.
pub fn save_rank<F: FileSystem>(
    fs: &F,
    root: &Path,
    step: u64,
    save_id: &str,
    rank: usize,
    world_size: usize,
) -> Result<ShardReport> {
    let mut writer = create(fs, root, step, save_id, rank, world_size)?;
    for state in STATES {
        for (tensor, start, end) in shard(rank, world_size) {
            let values: Vec<f32> = (start..end).map(|element| value(step, state, tensor, element)).collect();
            writer.write_f32(&values)?;
        }
    }
    writer.finish()
}

/// Writes the files of all ranks, one after the other, and commits.
pub fn save<F: FileSystem>(fs: &F, root: &Path, step: u64, save_id: &str, world_size: usize) -> Result<PathBuf> {
    let mut reports = Vec::new();
    for rank in 0..world_size {
        reports.push(save_rank(fs, root, step, save_id, rank, world_size)?);
    }
    commit_on(fs, root, step, save_id, &reports, meta(step))
}

pub fn meta(step: u64) -> ManifestMeta {
    ManifestMeta {
        config: "[training]\nsteps = 10\n".into(),
        data_digest: "of the data".into(),
        tokenizer_digest: "of the tokenizer".into(),
        trainer: serde_json::json!({"position": step * 8, "scale": 0.1 + 0.2, "rng": u64::MAX}),
        versions: BTreeMap::from([("fsdp-launch".into(), "0.1.0".into())]),
    }
}

/// Opens a checkpoint, verifies it, and compares every value; returns its step.
///
/// # Errors
/// What is wrong, in words.
pub fn check(dir: &Path) -> std::result::Result<u64, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|error| error.to_string())?;
    let step = checkpoint.manifest().step;
    if checkpoint.manifest().meta != meta(step) {
        return Err(format!("{}: not the manifest of step {step}", dir.display()));
    }
    for state in STATES {
        for (tensor, (name, shape)) in TENSORS.iter().enumerate() {
            let mut values = vec![f32::NAN; shape[0] * shape[1]];
            checkpoint.read_f32(state, name, 0, &mut values).map_err(|error| error.to_string())?;
            let wrong = (0..values.len()).find(|&i| values[i].to_bits() != value(step, state, tensor, i).to_bits());
            if let Some(i) = wrong {
                let state = state.name();
                return Err(format!("{}: {state} of {name}: element {i} is {}", dir.display(), values[i]));
            }
        }
    }
    Ok(step)
}
