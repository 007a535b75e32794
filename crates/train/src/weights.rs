//! First weights, from the model's files or at random, and the exported model. Each rank touches only its own ranges.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fsdp::{Engine, StateKind, init};
use fsdp_checkpoint::Dtype;
use fsdp_checkpoint::export::{Export, ExportLayout};
use fsdp_checkpoint::hf_folder::ModelFolder;
use fsdp_config::{Init, JobConfig, OutputDtype, compatible_for_resume};
use fsdp_plan::Plan;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// Largest file of an exported model, as transformers writes them.
const MAX_FILE_BYTES: u64 = 5_000_000_000;

/// (name, shape) of every parameter, in model order.
pub fn tensors(plan: &Plan) -> Vec<(String, Vec<usize>)> {
    plan.units.iter().flat_map(|u| &u.params).map(|p| (p.name.clone(), p.shape.clone())).collect()
}

/// Fills this rank's shards.
pub fn load(engine: &mut Engine, config: &JobConfig) -> Result<(), TrainError> {
    match config.model.init {
        Init::Random => engine.write_state(StateKind::Param, |p, master| -> Result<(), TrainError> {
            init::fill(config.training.seed, &p.name, p.init, p.start, master, tch::get_num_threads() as usize);
            Ok(())
        })?,
        Init::Pretrained => {
            let folder = ModelFolder::open(Path::new(&config.model.path))?;
            folder.expect(&tensors(engine.plan()))?;
            engine.write_state(StateKind::Param, |p, master| -> Result<(), TrainError> {
                Ok(folder.read_f32(&p.name, p.start, master)?)
            })?;
            tracing::info!("read {} of {} bytes of {}", folder.bytes_read(), folder.total_bytes(), config.model.path);
        }
    }
    Ok(())
}

/// `<output.dir>/exported.json`: what `hf/` holds. The folder itself depends on weights only.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exported {
    /// Steps done.
    pub step: u64,
    pub dtype: String,
    /// The whole text of the resolved config.
    pub config: String,
}

impl Exported {
    fn path(config: &JobConfig) -> PathBuf {
        config.output.dir.join("exported.json")
    }

    fn of(config: &JobConfig, step: u64) -> Result<Self, TrainError> {
        Ok(Exported { step, dtype: output_dtype(config)?.to_string(), config: config.to_toml() })
    }

    /// The record of the export that `hf/` holds; `None` without one.
    pub fn read(config: &JobConfig) -> Option<Self> {
        let text = std::fs::read_to_string(Self::path(config)).ok()?;
        let record = serde_json::from_str(&text).ok()?;
        config.output.dir.join("hf").is_dir().then_some(record)
    }

    /// Whether it is the end of the job `config` after `step` steps.
    pub fn is_end_of(&self, config: &JobConfig, step: u64) -> Result<bool, TrainError> {
        let saved = JobConfig::parse(&Self::path(config).display().to_string(), &self.config)?;
        let is_same_job = compatible_for_resume(&saved, config).is_ok();
        Ok(self.step == step && self.dtype == output_dtype(config)?.to_string() && is_same_job)
    }

    /// Before weights change: what `hf/` holds is then an older state.
    pub fn forget(config: &JobConfig) -> Result<(), TrainError> {
        let path = Self::path(config);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(TrainError::Io { path, source }),
            _ => Ok(()),
        }
    }

    fn write(&self, config: &JobConfig) -> Result<(), TrainError> {
        let path = Self::path(config);
        let text = serde_json::to_vec_pretty(self).expect("plain fields are always representable as JSON");
        std::fs::write(&path, text).map_err(|source| TrainError::Io { path, source })
    }
}

/// Writes `<output.dir>/hf/`, the weights after `step`: every rank of the first replica its own ranges of the same files. Collective.
pub fn export(engine: &mut Engine, config: &JobConfig, step: u64) -> Result<(), TrainError> {
    let source_dir = Path::new(&config.model.path);
    let final_dir = config.output.dir.join("hf");
    let dtype = output_dtype(config)?;
    let layout = ExportLayout::new(&tensors(engine.plan()), dtype, MAX_FILE_BYTES);
    let place = engine.place();
    let first = if (place.shard, place.replica) == (0, 0) {
        Some(Export::create(&layout, &final_dir, source_dir)?)
    } else {
        None
    };
    let is_first = first.is_some();
    engine.barrier()?;
    // The other replicas hold the same weights.
    let export = match (first, place.replica) {
        (Some(export), _) => Some(export),
        (None, 0) => Some(Export::open(&layout, &final_dir)?),
        (None, _) => None,
    };
    if let Some(mut export) = export {
        engine.read_state(StateKind::Param, |p, master| -> Result<(), TrainError> {
            Ok(export.write_f32(&p.name, p.start, master)?)
        })?;
        export.sync()?;
        engine.barrier()?;
        if is_first {
            export.commit()?;
            Exported::of(config, step)?.write(config)?;
        }
    } else {
        engine.barrier()?;
    }
    Ok(engine.barrier()?)
}

/// The dtype of the exported weights: that of the source's files, or, without any, of its `config.json`.
fn output_dtype(config: &JobConfig) -> Result<Dtype, TrainError> {
    Ok(match (config.output.dtype, config.model.init) {
        (OutputDtype::Fp32, _) => Dtype::F32,
        (OutputDtype::Bf16, _) => Dtype::BF16,
        (OutputDtype::Auto, Init::Pretrained) => ModelFolder::open(Path::new(&config.model.path))?.dominant_dtype(),
        (OutputDtype::Auto, Init::Random) => {
            let path = Path::new(&config.model.path).join("config.json");
            let text = std::fs::read_to_string(&path).map_err(|source| TrainError::Io { path, source })?;
            let keys: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            match keys["dtype"].as_str().or(keys["torch_dtype"].as_str()) {
                Some("bfloat16") => Dtype::BF16,
                Some("float16") => Dtype::F16,
                _ => Dtype::F32,
            }
        }
    })
}
