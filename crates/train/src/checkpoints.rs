//! Saving the sharded state, and choosing what to resume from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp::{Engine, LossScaler, StateKind};
use fsdp_checkpoint::sharded::{
    self, Checkpoint, Chunk, Manifest, ManifestMeta, ShardReport, ShardWriter, State, newest_valid,
};
use fsdp_config::{JobConfig, Resume, compatible_for_resume};
use fsdp_control::store::Store;
use fsdp_data::Position;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::weights;

const STATES: [(State, StateKind); 3] =
    [(State::Param, StateKind::Param), (State::ExpAvg, StateKind::ExpAvg), (State::ExpAvgSq, StateKind::ExpAvgSq)];

/// The trainer's own state, in the manifest. There is no RNG state: random numbers are keyed by seed and position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    pub position: Position,
    /// AdamW's step count.
    pub optimizer_steps: u64,
    /// fp16: scale and steps since it changed.
    pub scaler: Option<(f64, u64)>,
}

/// Checkpoints of one run, on one rank.
#[derive(Debug)]
pub struct Checkpoints {
    root: PathBuf,
    keep: usize,
    config_text: String,
    data_digest: String,
    tokenizer_digest: String,
    rank: usize,
    num_shards: usize,
    timeout: Duration,
}

impl Checkpoints {
    pub fn new(config: &JobConfig, data_digest: String, rank: usize, num_shards: usize) -> Self {
        Checkpoints {
            root: config.output.dir.join("checkpoints"),
            keep: config.checkpoint.keep as usize,
            config_text: config.to_toml(),
            data_digest,
            tokenizer_digest: tokenizer_digest(Path::new(&config.model.path)),
            rank,
            num_shards,
            timeout: Duration::from_secs(config.fsdp.timeout_secs),
        }
    }

    /// Loads the state to resume from into the engine; `None` when training starts at the beginning. Collective.
    pub fn resume(
        &self,
        config: &JobConfig,
        engine: &mut Engine,
        store: &mut Store,
    ) -> Result<Option<TrainerState>, TrainError> {
        // Rank 0 chooses and checks every byte; the others take the same one.
        let key = "resume";
        let (checkpoint, choice) = if self.rank == 0 {
            let found = self.find(config)?;
            let choice = found.as_ref().map(|c| (c.dir().to_path_buf(), c.manifest().save_id.clone()));
            store.set(key, &serde_json::to_vec(&choice).expect("a path of the config is text"))?;
            (found, choice)
        } else {
            let bytes = store.get(key, self.timeout)?;
            let choice: Option<(PathBuf, String)> = serde_json::from_slice(&bytes)
                .map_err(|source| TrainError::Message { rank: 0, what: "the checkpoint to resume from", source })?;
            let attached = choice.as_ref().map(|(dir, save_id)| Checkpoint::attach(dir, save_id)).transpose()?;
            (attached, choice)
        };
        let (Some(checkpoint), Some((dir, _))) = (checkpoint, choice) else { return Ok(None) };
        let state = self.load(config, engine, &checkpoint)?;
        tracing::info!("resuming after step {} from {}", state.step, dir.display());
        Ok(Some(state))
    }

    /// Rank 0: what to resume from.
    fn find(&self, config: &JobConfig) -> Result<Option<Checkpoint>, TrainError> {
        let io = |source| TrainError::Io { path: self.root.clone(), source };
        std::fs::create_dir_all(&self.root).map_err(io)?;
        for path in sharded::sweep(&self.root)? {
            tracing::info!("removed {}, which an earlier run left unfinished", path.display());
        }
        match &config.checkpoint.resume {
            Resume::Path(path) => {
                let checkpoint = Checkpoint::open(path)?;
                let step = checkpoint.manifest().step;
                // Saving never overwrites: better said now than after the steps up to there.
                match sharded::list(&self.root)?.last() {
                    Some((newer, newer_path)) if *newer > step => Err(TrainError::BadInput(format!(
                        "[checkpoint] resume = {:?} is of step {step}, but {} is of a later one; move it away, or choose \
                         another [output] dir",
                        path.display().to_string(),
                        newer_path.display()
                    ))),
                    _ => Ok(Some(checkpoint)),
                }
            }
            Resume::Never => match sharded::list(&self.root)?.last() {
                None => Ok(None),
                Some((_, path)) => Err(TrainError::BadInput(format!(
                    "[checkpoint] resume = \"never\", but {} exists; choose another [output] dir, or remove it",
                    path.display()
                ))),
            },
            Resume::Auto => {
                let newest = newest_valid(&self.root)?;
                if let (None, Some(last)) = (&newest.checkpoint, newest.skipped.first()) {
                    return Err(TrainError::BadInput(format!(
                        "no checkpoint under {} is whole, and training is not started over; move them away to do so. \
                         The newest, {}: {}",
                        self.root.display(),
                        last.path.display(),
                        last.reason
                    )));
                }
                for skipped in &newest.skipped {
                    let aside = sharded::set_aside(&skipped.path)?;
                    tracing::warn!(
                        "checkpoint {} is damaged and not used (now {}): {}",
                        skipped.path.display(),
                        aside.display(),
                        skipped.reason
                    );
                }
                Ok(newest.checkpoint)
            }
        }
    }

    fn load(&self, config: &JobConfig, engine: &mut Engine, from: &Checkpoint) -> Result<TrainerState, TrainError> {
        let manifest = from.manifest();
        self.check_same_job(config, manifest, from.dir())?;
        let state: TrainerState = serde_json::from_value(manifest.meta.trainer.clone())
            .map_err(|e| TrainError::BadInput(format!("{}: trainer state: {e}", from.dir().display())))?;
        let wanted = weights::tensors(engine.plan());
        for (name, kind) in STATES {
            from.expect(name, &wanted)?;
            engine.write_state(kind, |p, values| -> Result<(), TrainError> {
                Ok(from.read_f32(name, &p.name, p.start, values)?)
            })?;
        }
        let scaler = state.scaler.map(|(scale, good_steps)| LossScaler { scale, good_steps });
        engine.set_progress(state.optimizer_steps, scaler)?;
        Ok(state)
    }

    /// Config, data and tokenizer must be those that the checkpoint was made with, but for what may differ.
    fn check_same_job(&self, config: &JobConfig, manifest: &Manifest, dir: &Path) -> Result<(), TrainError> {
        let saved = JobConfig::parse(&format!("config of {}", dir.display()), &manifest.meta.config)?;
        if let Err(differences) = compatible_for_resume(&saved, config) {
            let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
            return Err(TrainError::BadInput(format!("cannot resume from {}: {}", dir.display(), all.join("; "))));
        }
        if manifest.world_size != self.num_shards {
            return Err(TrainError::BadInput(format!(
                "cannot resume from {}: it was saved in {} shards, one a rank, this run has {}; another number is not built yet",
                dir.display(),
                manifest.world_size,
                self.num_shards
            )));
        }
        for (what, saved, now) in [
            ("the training data", &manifest.meta.data_digest, &self.data_digest),
            ("the tokenizer", &manifest.meta.tokenizer_digest, &self.tokenizer_digest),
        ] {
            if saved != now {
                return Err(TrainError::BadInput(format!(
                    "cannot resume from {}: {what} changed since (digest {saved} then, {now} now); \
                     bring it back, or start in another output folder",
                    dir.display()
                )));
            }
        }
        Ok(())
    }

    /// Saves the state after `state.step`; returns when it is committed. Collective.
    pub fn save(&self, engine: &mut Engine, store: &mut Store, state: &TrainerState) -> Result<(), TrainError> {
        let save_id = self.new_save_id(store, state.step)?;
        // Ranks of the first replica come first, and have all shards.
        let result = if self.rank < self.num_shards { self.save_as(engine, store, state, &save_id) } else { Ok(()) };
        if result.is_err() && self.rank == 0 {
            // The failure itself is what is reported.
            let _ = sharded::abort(&self.root, state.step, &save_id);
        }
        result?;
        Ok(engine.barrier()?)
    }

    fn save_as(
        &self,
        engine: &mut Engine,
        store: &mut Store,
        state: &TrainerState,
        save_id: &str,
    ) -> Result<(), TrainError> {
        let pieces = engine.pieces().to_vec();
        let chunks: Vec<Chunk<'_>> = STATES
            .iter()
            .flat_map(|&(state, _)| {
                pieces.iter().map(move |p| Chunk {
                    state,
                    name: &p.name,
                    shape: &p.shape,
                    start: p.start,
                    len: p.flat.len(),
                })
            })
            .collect();
        let num_shards = self.num_shards;
        let mut writer = ShardWriter::create(&self.root, state.step, save_id, self.rank, num_shards, &chunks)?;
        for (_, kind) in STATES {
            engine.read_state(kind, |_, values| -> Result<(), TrainError> { Ok(writer.write_f32(values)?) })?;
        }
        let report = writer.finish()?;
        let key = |rank: usize| format!("shard/{save_id}/{rank}");
        if self.rank == 0 {
            let mut reports = vec![report];
            for rank in 1..num_shards {
                let bytes = store.get(&key(rank), self.timeout)?;
                let report: ShardReport = serde_json::from_slice(&bytes).map_err(|source| TrainError::Message {
                    rank,
                    what: "a shard report",
                    source,
                })?;
                reports.push(report);
            }
            sharded::commit(&self.root, state.step, save_id, &reports, self.meta(state))?;
            // The new one is safe: an old one that cannot be deleted costs space, not the run.
            if let Err(error) = sharded::keep_newest(&self.root, self.keep) {
                tracing::warn!("an old checkpoint stays: {error}");
            }
        } else {
            store.set(&key(self.rank), &serde_json::to_vec(&report).expect("a report is plain data"))?;
        }
        Ok(())
    }

    fn meta(&self, state: &TrainerState) -> ManifestMeta {
        ManifestMeta {
            config: self.config_text.clone(),
            data_digest: self.data_digest.clone(),
            tokenizer_digest: self.tokenizer_digest.clone(),
            trainer: serde_json::to_value(state).expect("plain fields are always representable as JSON"),
            versions: BTreeMap::from([
                ("fsdp-launch".to_string(), env!("CARGO_PKG_VERSION").to_string()),
                ("libtorch".to_string(), "2.11.0".to_string()),
            ]),
        }
    }

    /// An id for one save, the same on all ranks: rank 0 makes it.
    fn new_save_id(&self, store: &mut Store, step: u64) -> Result<String, TrainError> {
        let key = format!("save/{step}");
        if self.rank == 0 {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let id = format!("{:x}-{:x}", now.as_nanos(), std::process::id());
            store.set(&key, id.as_bytes())?;
            return Ok(id);
        }
        Ok(String::from_utf8_lossy(&store.get(&key, self.timeout)?).into_owned())
    }
}

/// Digest of the tokenizer's file; of nothing if the model has none.
fn tokenizer_digest(model_dir: &Path) -> String {
    let bytes = std::fs::read(model_dir.join("tokenizer.json")).unwrap_or_default();
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes))
}
