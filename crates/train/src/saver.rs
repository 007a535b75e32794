//! Saving the sharded state, behind the next steps or while they wait.
//!
//! Training stands still only while the state is copied. One thread a rank then writes the copy; rank 0's commits once
//! every rank has reported its file through the store. No process group is used, so that nothing of a save can meet the
//! collectives of the steps. At most one save is in flight.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fsdp::{Engine, Snapshot};
use fsdp_checkpoint::sharded::{self, Chunk, ManifestMeta, ShardReport, ShardWriter};
use fsdp_config::JobConfig;
use fsdp_control::ControlError;
use fsdp_control::env::WorkerEnv;
use fsdp_control::store::Store;

use crate::checkpoints::{self, Inputs, STATES, TrainerState};
use crate::error::TrainError;

/// Writes the checkpoints of one run, on one rank.
#[derive(Debug)]
pub struct Saver {
    writer: Writer,
    is_async: bool,
    in_flight: Option<JoinHandle<Result<(Snapshot, Store), TrainError>>>,
    /// Of the last save, whose memory the next copy takes.
    spare: Option<Snapshot>,
    /// For the saves alone; with the save in flight while there is one.
    store: Option<Store>,
    /// The step of the newest save that this run has begun, or that it began from.
    last_step: Option<u64>,
}

/// What a save needs, on any thread.
#[derive(Debug, Clone)]
struct Writer {
    root: PathBuf,
    keep: usize,
    keep_every: u64,
    config_text: String,
    inputs: Inputs,
    rank: usize,
    num_shards: usize,
    /// Of all ranks together.
    total_bytes: u64,
    /// Unique for this start of the job; the same on all ranks.
    run_key: String,
    timeout: Duration,
}

impl Saver {
    /// `resumed_step` is that of the checkpoint from which the run goes on. Collective, through the store.
    pub fn new(
        config: &JobConfig,
        inputs: Inputs,
        env: &WorkerEnv,
        engine: &Engine,
        resumed_step: Option<u64>,
    ) -> Result<Self, TrainError> {
        let timeout = Duration::from_secs(config.fsdp.timeout_secs);
        let mut store = Store::connect((&env.master_addr, env.master_port), timeout)?;
        let plan = engine.plan();
        Ok(Saver {
            writer: Writer {
                root: checkpoints::root(config),
                keep: config.checkpoint.keep as usize,
                keep_every: config.checkpoint.keep_every,
                config_text: config.to_toml(),
                inputs,
                rank: env.rank,
                num_shards: plan.num_shards,
                total_bytes: (STATES.len() * size_of::<f32>() * plan.num_params()) as u64,
                run_key: agree_on_run_key(env.rank, &mut store, timeout)?,
                timeout,
            },
            is_async: config.checkpoint.async_save,
            in_flight: None,
            spare: None,
            store: Some(store),
            last_step: resumed_step,
        })
    }

    /// The text of the model's `config.json`.
    pub fn model_config(&self) -> &str {
        &self.writer.inputs.model_config
    }

    /// Saves the state after `state.step`, unless it is saved already. Waits for the save before it, and then only for a
    /// copy of the state, or, where saving is not asynchronous, until the checkpoint is committed. All ranks call it.
    pub fn save(&mut self, engine: &mut Engine, state: TrainerState) -> Result<(), TrainError> {
        if !self.is_async {
            return self.save_now(engine, state);
        }
        self.wait()?;
        if self.last_step == Some(state.step) {
            return Ok(());
        }
        self.last_step = Some(state.step);
        // Ranks of the first replica come first, and have all shards.
        if self.writer.rank < self.writer.num_shards {
            let start = Instant::now();
            let snapshot = engine.snapshot(self.spare.take())?;
            tracing::debug!("copied the state after step {} in {:.3} s", state.step, start.elapsed().as_secs_f64());
            let (writer, mut store) = (self.writer.clone(), self.take_store());
            let write = move || {
                writer.write(&snapshot, &state, &mut store)?;
                Ok((snapshot, store))
            };
            let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
            self.in_flight = Some(thread.map_err(|source| TrainError::Io { path: self.writer.root.clone(), source })?);
        }
        Ok(())
    }

    /// The same, and returns when that checkpoint and any before it is committed.
    pub fn save_now(&mut self, engine: &mut Engine, state: TrainerState) -> Result<(), TrainError> {
        self.wait()?;
        if self.last_step != Some(state.step) {
            self.last_step = Some(state.step);
            if self.writer.rank < self.writer.num_shards {
                let mut store = self.take_store();
                self.writer.write(&engine.live_state()?, &state, &mut store)?;
                self.store = Some(store);
            }
        }
        Ok(engine.barrier()?)
    }

    /// Takes notice of a save that has ended meanwhile.
    ///
    /// # Errors
    /// It has failed.
    pub fn poll(&mut self) -> Result<(), TrainError> {
        match &self.in_flight {
            Some(thread) if thread.is_finished() => self.wait(),
            _ => Ok(()),
        }
    }

    /// Returns when the save in flight, if there is one, is committed. All ranks call it.
    pub fn finish(&mut self, engine: &mut Engine) -> Result<(), TrainError> {
        self.wait()?;
        Ok(engine.barrier()?)
    }

    /// Waits for this rank's part of the save in flight; on rank 0 that is until it is committed.
    pub fn wait(&mut self) -> Result<(), TrainError> {
        if let Some(thread) = self.in_flight.take() {
            // A panic of that thread goes on in this one.
            let (snapshot, store) = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            (self.spare, self.store) = (Some(snapshot), Some(store));
        }
        Ok(())
    }

    fn take_store(&mut self) -> Store {
        self.store.take().expect("no save is in flight, and one that failed is the last")
    }
}

impl Writer {
    /// Writes this rank's file; rank 0 then commits.
    fn write(&self, snapshot: &Snapshot, state: &TrainerState, store: &mut Store) -> Result<(), TrainError> {
        let start = Instant::now();
        let step = state.step;
        let save_id = format!("{}-{step}", self.run_key);
        let result = self.write_as(snapshot, state, &save_id, store);
        match &result {
            Ok(()) => tracing::info!("saved step {step} in {:.2} s", start.elapsed().as_secs_f64()),
            // Where another rank has failed, the launcher, or the next start, removes what is left. The failure itself is
            // what is reported.
            Err(_) if self.rank == 0 => drop(sharded::abort(&self.root, step, &save_id)),
            Err(_) => {}
        }
        result
    }

    fn write_as(
        &self,
        snapshot: &Snapshot,
        state: &TrainerState,
        save_id: &str,
        store: &mut Store,
    ) -> Result<(), TrainError> {
        let step = state.step;
        // No rank takes any space before rank 0 has found enough for all.
        let has_space = format!("space/{save_id}");
        if self.rank == 0 {
            sharded::check_space(&self.root, self.total_bytes)?;
            store.set(&has_space, &[])?;
        } else {
            store.get(&has_space, self.timeout)?;
        }
        let pieces = snapshot.pieces();
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
        let mut writer = ShardWriter::create(&self.root, step, save_id, self.rank, self.num_shards, &chunks)?;
        for (_, kind) in STATES {
            snapshot.read(kind, |_, values| -> Result<(), TrainError> { Ok(writer.write_f32(values)?) })?;
        }
        let report = writer.finish()?;
        let key = |rank: usize| format!("shard/{save_id}/{rank}");
        if self.rank > 0 {
            return Ok(store.set(&key(self.rank), &serde_json::to_vec(&report).expect("a report is plain data"))?);
        }
        let mut reports = vec![report];
        for rank in 1..self.num_shards {
            let bytes = store.get(&key(rank), self.timeout).map_err(|error| match error {
                ControlError::KeyTimeout { .. } => ControlError::BarrierTimeout {
                    name: format!("save of step {step}"),
                    world_size: self.num_shards,
                    missing: vec![rank],
                    timeout: self.timeout,
                },
                error => error,
            })?;
            // The store lives as long as the run: what was read is replaced by nothing.
            store.set(&key(rank), &[])?;
            let report: ShardReport = serde_json::from_slice(&bytes).map_err(|source| TrainError::Message {
                rank,
                what: "a shard report",
                source,
            })?;
            reports.push(report);
        }
        sharded::commit(&self.root, step, save_id, &reports, self.meta(state))?;
        // The new one is safe: an old one that cannot be deleted costs space, not the run.
        if let Err(error) = sharded::retain(&self.root, self.keep, self.keep_every) {
            tracing::warn!("an old checkpoint stays: {error}");
        }
        Ok(())
    }

    fn meta(&self, state: &TrainerState) -> ManifestMeta {
        ManifestMeta {
            config: self.config_text.clone(),
            data_digest: self.inputs.data_digest.clone(),
            tokenizer_digest: self.inputs.tokenizer_digest.clone(),
            trainer: serde_json::to_value(state).expect("plain fields are always representable as JSON"),
            versions: BTreeMap::from([
                ("fsdp-launch".to_string(), env!("CARGO_PKG_VERSION").to_string()),
                ("libtorch".to_string(), "2.11.0".to_string()),
            ]),
        }
    }
}

/// What tells the saves of this start of the job from those of others: rank 0 makes it.
fn agree_on_run_key(rank: usize, store: &mut Store, timeout: Duration) -> Result<String, TrainError> {
    const KEY: &str = "run-key";
    if rank == 0 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let run_key = format!("{:x}-{:x}", now.as_nanos(), std::process::id());
        store.set(KEY, run_key.as_bytes())?;
        return Ok(run_key);
    }
    Ok(String::from_utf8_lossy(&store.get(KEY, timeout)?).into_owned())
}
