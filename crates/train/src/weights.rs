//! First weights, from the model's files or at random, and the exported model. Each rank touches only its own ranges.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fsdp::{Engine, StateKind, init};
use fsdp_checkpoint::Dtype;
use fsdp_checkpoint::export::{Export, ExportLayout};
use fsdp_checkpoint::hf_folder::ModelFolder;
use fsdp_config::{Init, JobConfig, OutputDtype};
use fsdp_plan::Plan;
use fsdp_torch_ext as ext;

use crate::error::TrainError;

/// Largest file of an exported model, as transformers writes them.
const MAX_FILE_BYTES: u64 = 5_000_000_000;

/// (name, shape) of every parameter, in model order.
pub fn tensors(plan: &Plan) -> Vec<(String, Vec<usize>)> {
    plan.units.iter().flat_map(|u| &u.params).map(|p| (p.name.clone(), p.shape.clone())).collect()
}

/// Fills this rank's shards.
pub fn load(engine: &mut Engine, config: &JobConfig) -> Result<(), TrainError> {
    let pieces = engine.pieces().to_vec();
    match config.model.init {
        Init::Random => ext::with_f32_slice_mut(engine.state_mut(StateKind::Param), |master| {
            for p in &pieces {
                init::fill(config.training.seed, &p.name, p.init, p.start, &mut master[p.flat.clone()]);
            }
        })?,
        Init::Pretrained => {
            let folder = ModelFolder::open(Path::new(&config.model.path))?;
            folder.expect(&tensors(engine.plan()))?;
            ext::with_f32_slice_mut(engine.state_mut(StateKind::Param), |master| {
                pieces.iter().try_for_each(|p| folder.read_f32(&p.name, p.start, &mut master[p.flat.clone()]))
            })??;
            tracing::info!("read {} of {} bytes of {}", folder.bytes_read(), folder.total_bytes(), config.model.path);
        }
    }
    Ok(())
}

/// Whether `<output.dir>/hf/` holds the weights after `step` in the dtype that the config asks for.
pub fn is_exported(config: &JobConfig, step: u64) -> Result<bool, TrainError> {
    let text = std::fs::read_to_string(mark_path(config)).unwrap_or_default();
    Ok(text == mark(step, output_dtype(config)?) && config.output.dir.join("hf").is_dir())
}

/// Rank 0, before weights change: what `hf/` holds is then an older state.
pub fn forget_export(config: &JobConfig) -> Result<(), TrainError> {
    let path = mark_path(config);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(TrainError::Io { path, source }),
        _ => Ok(()),
    }
}

/// The file beside `hf/` that says what it holds; the folder itself depends on weights only.
fn mark_path(config: &JobConfig) -> PathBuf {
    config.output.dir.join("hf.txt")
}

fn mark(step: u64, dtype: Dtype) -> String {
    format!("weights after step {step} in {dtype}\n")
}

/// Writes `<output.dir>/hf/`, the weights after `step`: every rank its own ranges of the same files. Collective.
pub fn export(engine: &mut Engine, config: &JobConfig, step: u64) -> Result<(), TrainError> {
    let source_dir = Path::new(&config.model.path);
    let final_dir = config.output.dir.join("hf");
    let dtype = output_dtype(config)?;
    let layout = ExportLayout::new(&tensors(engine.plan()), dtype, MAX_FILE_BYTES);
    let pg = engine.process_group();
    let mut export = if pg.rank() == 0 {
        let export = Export::create(&layout, &final_dir, source_dir)?;
        pg.barrier()?;
        export
    } else {
        pg.barrier()?;
        Export::open(&layout, &final_dir)?
    };
    let pieces = engine.pieces().to_vec();
    ext::with_f32_slice(engine.state(StateKind::Param), |master| {
        pieces.iter().try_for_each(|p| export.write_f32(&p.name, p.start, &master[p.flat.clone()]))
    })??;
    export.sync()?;
    let pg = engine.process_group();
    pg.barrier()?;
    if pg.rank() == 0 {
        export.commit()?;
        let path = mark_path(config);
        std::fs::write(&path, mark(step, dtype)).map_err(|source| TrainError::Io { path, source })?;
    }
    Ok(pg.barrier()?)
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
