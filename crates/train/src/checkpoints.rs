//! What a run goes on from: choosing a checkpoint together, and loading it.
//!
//! Rank 0 names one checkpoint after the other, the newest first. All ranks open it and verify the digests of its files,
//! each rank its share of them, so that all bytes are read once; the first that is whole is taken.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fsdp::{Engine, LossScaler, StateKind};
use fsdp_checkpoint::sharded::{self, Checkpoint, Manifest, State};
use fsdp_config::{JobConfig, Resume, compatible_for_resume};
use fsdp_control::store::Store;
use fsdp_data::{Position, tokenizer_digest};
use fsdp_plan::Architecture;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::error::TrainError;
use crate::weights;

/// How long a file system of several nodes may take to show what another node has written.
const VISIBLE_WITHIN: Duration = Duration::from_secs(90);

/// How long another rank may take to read its share of a checkpoint, which may be hundreds of gigabytes. Who dies meanwhile
/// is noticed otherwise.
const VERIFIED_WITHIN: Duration = Duration::from_secs(24 * 3600);

/// The checkpoint's names of the engine's states.
pub const STATES: [(State, StateKind); 3] =
    [(State::Param, StateKind::Param), (State::ExpAvg, StateKind::ExpAvg), (State::ExpAvgSq, StateKind::ExpAvgSq)];

/// The trainer's own state, in the manifest. There is no RNG state: random numbers are keyed by seed and position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done.
    pub step: u64,
    /// In the one order of all samples, so that it is the same for any number of ranks.
    pub position: Position,
    /// AdamW's step count.
    pub optimizer_steps: u64,
    /// fp16: scale and steps since it changed.
    pub scaler: Option<(f64, u64)>,
    /// Sequences of a step over all ranks.
    pub global_batch_size: u64,
    /// The text of the model's `config.json`.
    pub model_config: String,
}

/// The folder of a run's checkpoints.
pub fn root(config: &JobConfig) -> PathBuf {
    config.output.dir.join("checkpoints")
}

/// A checkpoint that every rank has opened, and that is whole.
#[derive(Debug)]
pub struct Resumed {
    checkpoint: Checkpoint,
    pub state: TrainerState,
}

/// What a checkpoint is of besides its config.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Inputs {
    pub data_digest: String,
    pub tokenizer_digest: String,
    /// The text of the model's `config.json`.
    pub model_config: String,
}

impl Inputs {
    pub fn of(config: &JobConfig, data_digest: String) -> Result<Self, TrainError> {
        let dir = Path::new(&config.model.path);
        let path = dir.join("config.json");
        let model_config = std::fs::read_to_string(&path).map_err(|source| TrainError::Io { path, source })?;
        Ok(Inputs { data_digest, tokenizer_digest: tokenizer_digest(dir)?, model_config })
    }
}

/// What one rank says of the files that it has verified: why they are damaged, if they are.
type Finding = Option<String>;

/// The checkpoint to go on from; `None` when training starts at the beginning. Collective, through the store.
///
/// # Errors
/// It is of another job, or there is none that is whole where one is needed.
pub fn choose(
    config: &JobConfig,
    inputs: &Inputs,
    (rank, world_size): (usize, usize),
    store: &mut Store,
) -> Result<Option<Resumed>, TrainError> {
    let mut exchange = Exchange { store, timeout: Duration::from_secs(config.fsdp.timeout_secs) };
    let mut candidates = if rank == 0 { candidates(config)? } else { Vec::new() }.into_iter();
    let mut damaged = Vec::new();
    for attempt in 0.. {
        let key = |what: &str| format!("resume/{attempt}/{what}");
        let mut own = None;
        if rank == 0 {
            own = first_openable(&mut candidates, &mut damaged)?;
            exchange.tell(&key("choice"), &own.as_ref().map(|c| (c.dir(), &c.manifest().save_id)))?;
        }
        let choice: Option<(PathBuf, String)> = exchange.hear(&key("choice"), 0)?;
        let Some((path, save_id)) = choice else { break };
        let checkpoint = match own {
            Some(own) => own,
            None => attach(&path, &save_id)?,
        };
        check_same_job(config, inputs, checkpoint.manifest(), &path)?;
        let state = trainer_state(&checkpoint)?;
        check_same_model(inputs, &state.model_config, &path)?;
        let num_files = checkpoint.manifest().files.len();
        let finding = match checkpoint.verify_files((rank..num_files).step_by(world_size)) {
            Ok(()) => None,
            Err(error) if error.is_damage() => Some(error.to_string()),
            Err(error) => return Err(error.into()),
        };
        exchange.tell(&key(&rank.to_string()), &finding)?;
        if rank == 0 {
            let mut findings: Vec<Finding> = vec![];
            for other in 0..world_size {
                findings.push(exchange.hear_within(&key(&other.to_string()), other, VERIFIED_WITHIN)?);
            }
            exchange.tell(&key("finding"), &findings.into_iter().flatten().next())?;
        }
        match exchange.hear_within::<Finding>(&key("finding"), 0, VERIFIED_WITHIN)? {
            Some(reason) => damaged.push((path, reason)),
            None => {
                if rank == 0 {
                    set_aside(&damaged)?;
                }
                return Ok(Some(Resumed { checkpoint, state }));
            }
        }
    }
    let Some((path, reason)) = damaged.first() else { return Ok(None) };
    let reason = format!("{}: {reason}", path.display());
    Err(TrainError::BadInput(match config.checkpoint.resume {
        Resume::Path(_) => format!("[checkpoint] resume: {reason}"),
        Resume::Auto | Resume::Never => format!(
            "no checkpoint under {} is whole, and training is not started over; move them away to do so. The newest, {reason}",
            root(config).display()
        ),
    }))
}

/// Rank 0: what there is to go on from, the best first.
fn candidates(config: &JobConfig) -> Result<Vec<PathBuf>, TrainError> {
    let root = root(config);
    std::fs::create_dir_all(&root).map_err(|source| TrainError::Io { path: root.clone(), source })?;
    match sharded::sweep(&root) {
        Ok(removed) => removed.iter().for_each(|path| {
            tracing::info!("removed {}, which an earlier run left unfinished", path.display());
        }),
        // It takes space, and is never taken for a checkpoint.
        Err(error) => tracing::warn!("what an earlier run left unfinished stays: {error}"),
    }
    let all = sharded::list(&root)?;
    match (&config.checkpoint.resume, all.last()) {
        (Resume::Path(path), newest) => {
            let step = Checkpoint::open_unread(path)?.manifest().step;
            // Saving never overwrites: better said now than after the steps up to there.
            match newest {
                Some((newer, newer_path)) if *newer > step => Err(TrainError::BadInput(format!(
                    "[checkpoint] resume = {:?} is of step {step}, but {} is of a later one; move it away, or choose \
                     another [output] dir",
                    path.display().to_string(),
                    newer_path.display()
                ))),
                _ => Ok(vec![path.clone()]),
            }
        }
        (Resume::Never, None) => Ok(vec![]),
        (Resume::Never, Some((_, path))) => Err(TrainError::BadInput(format!(
            "[checkpoint] resume = \"never\", but {} exists; choose another [output] dir, or remove it",
            path.display()
        ))),
        (Resume::Auto, _) => Ok(all.into_iter().rev().map(|(_, path)| path).collect()),
    }
}

/// Rank 0: the next candidate that opens.
fn first_openable(
    candidates: &mut impl Iterator<Item = PathBuf>,
    damaged: &mut Vec<(PathBuf, String)>,
) -> Result<Option<Checkpoint>, TrainError> {
    for path in candidates {
        match Checkpoint::open_unread(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) if error.is_damage() => damaged.push((path, error.to_string())),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// The other ranks: opens what rank 0 has opened, as soon as this node's view of the file system has it.
fn attach(path: &Path, save_id: &str) -> Result<Checkpoint, TrainError> {
    let start = Instant::now();
    loop {
        match Checkpoint::attach(path, save_id) {
            // What is missing or not whole here is an older view.
            Err(error) if error.is_missing() || error.is_damage() => {
                if start.elapsed() >= VISIBLE_WITHIN {
                    let waited = VISIBLE_WITHIN.as_secs();
                    let source = std::io::Error::other(format!("not as rank 0 sees it, for {waited} s: {error}"));
                    return Err(TrainError::Io { path: path.to_path_buf(), source });
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            opened => return Ok(opened?),
        }
    }
}

/// Renames damaged checkpoints, so that the run can save their steps again.
fn set_aside(damaged: &[(PathBuf, String)]) -> Result<(), TrainError> {
    for (path, reason) in damaged {
        let aside = sharded::set_aside(path)?;
        tracing::warn!("checkpoint {} is damaged and not used (now {}): {reason}", path.display(), aside.display());
    }
    Ok(())
}

fn trainer_state(checkpoint: &Checkpoint) -> Result<TrainerState, TrainError> {
    serde_json::from_value(checkpoint.manifest().meta.trainer.clone())
        .map_err(|e| TrainError::BadInput(format!("{}: trainer state: {e}", checkpoint.dir().display())))
}

impl Resumed {
    /// Fills the engine's state; each rank reads its own ranges of all files.
    pub fn load(&self, engine: &mut Engine) -> Result<(), TrainError> {
        let wanted = weights::tensors(engine.plan());
        for (name, kind) in STATES {
            self.checkpoint.expect(name, &wanted)?;
            engine.write_state(kind, |p, values| -> Result<(), TrainError> {
                Ok(self.checkpoint.read_f32(name, &p.name, p.start, values)?)
            })?;
        }
        let scaler = self.state.scaler.map(|(scale, good_steps)| LossScaler { scale, good_steps });
        engine.set_progress(self.state.optimizer_steps, scaler)?;
        tracing::info!("resuming after step {} from {}", self.state.step, self.checkpoint.dir().display());
        Ok(())
    }
}

/// Config, data and tokenizer must be those that the checkpoint was made with, but for what may differ.
fn check_same_job(config: &JobConfig, inputs: &Inputs, manifest: &Manifest, dir: &Path) -> Result<(), TrainError> {
    let saved = JobConfig::parse(&format!("config of {}", dir.display()), &manifest.meta.config)?;
    if let Err(differences) = compatible_for_resume(&saved, config) {
        let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
        return Err(TrainError::BadInput(format!("cannot resume from {}: {}", dir.display(), all.join("; "))));
    }
    for (what, saved, now) in [
        ("the training data", &manifest.meta.data_digest, &inputs.data_digest),
        ("the tokenizer", &manifest.meta.tokenizer_digest, &inputs.tokenizer_digest),
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

/// A model that computes something else has the same weights for nothing.
fn check_same_model(inputs: &Inputs, saved: &str, dir: &Path) -> Result<(), TrainError> {
    let parse = |path: &Path, text| Architecture::parse(path, text);
    if parse(&dir.join("manifest.json"), saved)? == parse(Path::new("config.json"), &inputs.model_config)? {
        return Ok(());
    }
    let fields = |text| serde_json::from_str::<serde_json::Map<String, Value>>(text).unwrap_or_default();
    let (saved, now) = (fields(saved), fields(&inputs.model_config));
    let value =
        |side: &serde_json::Map<String, Value>, key| side.get(key).map_or("nothing".to_owned(), Value::to_string);
    let added = now.keys().filter(|key| !saved.contains_key(*key));
    let different = saved.keys().chain(added).filter(|key| saved.get(*key) != now.get(*key));
    let all: Vec<String> =
        different.map(|key| format!("{key}: {} then, {} now", value(&saved, key), value(&now, key))).collect();
    Err(TrainError::BadInput(format!(
        "cannot resume from {}: the model's config.json changed since: {}; bring it back, or start in another output folder",
        dir.display(),
        all.join("; ")
    )))
}

/// Small values between ranks before there is a process group.
struct Exchange<'a> {
    store: &'a mut Store,
    timeout: Duration,
}

impl Exchange<'_> {
    fn tell(&mut self, key: &str, value: &impl Serialize) -> Result<(), TrainError> {
        let bytes = serde_json::to_vec(value).expect("text, and paths of the config, which is text");
        Ok(self.store.set(key, &bytes)?)
    }

    /// `rank` is who tells.
    fn hear<T: DeserializeOwned>(&mut self, key: &str, rank: usize) -> Result<T, TrainError> {
        self.hear_within(key, rank, self.timeout)
    }

    fn hear_within<T: DeserializeOwned>(&mut self, key: &str, rank: usize, timeout: Duration) -> Result<T, TrainError> {
        let bytes = self.store.get(key, timeout)?;
        serde_json::from_slice(&bytes).map_err(|source| TrainError::Message {
            rank,
            what: "a checkpoint to resume from",
            source,
        })
    }
}
