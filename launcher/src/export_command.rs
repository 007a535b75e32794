//! `fsdp-launch export`: a checkpoint's weights as a Hugging Face model folder, the same bytes that the run exports.
//!
//! One process, no ranks, no libtorch: weights pass through in pieces, so memory does not grow with the model.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use fsdp_checkpoint::export::{Export, ExportLayout};
use fsdp_checkpoint::hf_folder::ModelFolder;
use fsdp_checkpoint::sharded::{Checkpoint, State};
use fsdp_checkpoint::{CheckpointError, Dtype};
use fsdp_config::{Init, JobConfig, OutputDtype};
use fsdp_control::ExitStatus;
use fsdp_data::tokenizer_digest;
use fsdp_plan::plan::format_bytes;
use fsdp_plan::{Architecture, units};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cli::{DtypeArg, ExportArgs};
use crate::failure::Failure;
use crate::live_line::LiveLine;
use crate::saved;

/// Largest file of an exported model, as transformers writes them and as a run's own export has it.
const MAX_FILE_BYTES: u64 = 5_000_000_000;
/// Elements in memory at a time: 16 MiB.
const PIECE_ELEMS: usize = 4 << 20;

type Tensors = Vec<(String, Vec<usize>)>;

pub fn export(args: &ExportArgs) -> Result<ExitStatus, Failure> {
    let final_dir = target(&args.dir)?;
    let checkpoint = saved::open_verified(&args.checkpoint)?;

    let (from, step) = (checkpoint.dir().display(), checkpoint.manifest().step);
    let origin = format!("{from} (saved config)");
    let config = JobConfig::parse(&origin, &checkpoint.manifest().meta.config).map_err(Failure::bad_input)?;
    let folder = args.model.clone().unwrap_or_else(|| PathBuf::from(&config.model.path));
    let tensors = check_source(&folder, &checkpoint)?;
    let dtype = dtype(args, &config, &folder)?;
    let layout = ExportLayout::new(&tensors, dtype, MAX_FILE_BYTES);
    write(&layout, &final_dir, &folder, &checkpoint, &tensors, dtype)?;
    crate::print(&format!(
        "exported {from}, the weights after step {step}, to {}: {} tensors, {dtype}, {}",
        args.dir.display(),
        tensors.len(),
        format_bytes(layout.len_bytes())
    ));
    Ok(ExitStatus::Done)
}

/// The folder to write, without links and dots where it exists: it is replaced by rename.
fn target(dir: &Path) -> Result<PathBuf, Failure> {
    let refused = |reason: String| {
        Failure::bad_input(format!(
            "{}: expected a folder that does not exist yet or is empty, got {reason}; choose another one",
            dir.display()
        ))
    };
    let absolute = match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            Some(_) => return Err(refused("one with files in it".to_owned())),
            None => dir.canonicalize(),
        },
        Err(_) if dir.is_symlink() => return Err(refused("a link to no folder".to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => std::path::absolute(dir),
        Err(error) => Err(error),
    };
    match absolute {
        Ok(absolute) if absolute.file_name().is_some() => Ok(absolute),
        Ok(_) => Err(refused("a path without a name at its end".to_owned())),
        Err(error) => Err(refused(error.to_string())),
    }
}

/// The tensors to export, in order. The folder is the one that the run had, as far as the checkpoint can tell.
fn check_source(folder: &Path, checkpoint: &Checkpoint) -> Result<Tensors, Failure> {
    let refused = |reason: String| {
        Failure::bad_input(format!(
            "cannot export {}: {reason}; give a folder with the config.json and tokenizer files of the model that was \
             trained, such as an earlier export: --model FOLDER",
            checkpoint.dir().display()
        ))
    };
    if !folder.is_dir() {
        let place = match folder.is_relative() {
            true => " (a path relative to the folder from which the run was started)",
            false => "",
        };
        return Err(refused(format!("the model's folder {}{place} is not there", folder.display())));
    }
    let arch = Architecture::from_config_json(&folder.join("config.json")).map_err(|e| refused(e.to_string()))?;
    let units = units::units(&arch);
    let tensors: Tensors = units.into_iter().flat_map(|unit| unit.params).map(|p| (p.name, p.shape)).collect();
    checkpoint
        .expect(State::Param, &tensors)
        .map_err(|error| refused(format!("it is not of the model in {}: {error}", folder.display())))?;

    let path = folder.join("tokenizer.json");
    let now = tokenizer_digest(folder).map_err(|error| refused(error.to_string()))?;
    let then = &checkpoint.manifest().meta.tokenizer_digest;
    if now != *then {
        return Err(refused(format!(
            "{} is not the tokenizer of the run (digest {then} then, {now} now)",
            path.display()
        )));
    }
    Ok(tensors)
}

/// The dtype to write. "auto" is that of the source's files, or, where the run had none, of its `config.json`.
fn dtype(args: &ExportArgs, config: &JobConfig, folder: &Path) -> Result<Dtype, Failure> {
    let wanted = match args.dtype {
        Some(DtypeArg::Auto) => OutputDtype::Auto,
        Some(DtypeArg::Fp32) => OutputDtype::Fp32,
        Some(DtypeArg::Bf16) => OutputDtype::Bf16,
        None => config.output.dtype,
    };
    match (wanted, config.model.init) {
        (OutputDtype::Fp32, _) => Ok(Dtype::F32),
        (OutputDtype::Bf16, _) => Ok(Dtype::BF16),
        (OutputDtype::Auto, Init::Pretrained) => match ModelFolder::open(folder) {
            Ok(files) => Ok(files.dominant_dtype()),
            Err(error) => Err(Failure::bad_input(format!(
                "{error}; the type of its weights is the one to write, so without them say which: --dtype bf16 or fp32"
            ))),
        },
        (OutputDtype::Auto, Init::Random) => {
            let path = folder.join("config.json");
            let text = fs::read_to_string(&path)
                .map_err(|error| Failure::bad_input(format!("{}: cannot be read: {error}", path.display())))?;
            let keys: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            Ok(match keys["dtype"].as_str().or(keys["torch_dtype"].as_str()) {
                Some("bfloat16") => Dtype::BF16,
                Some("float16") => Dtype::F16,
                _ => Dtype::F32,
            })
        }
    }
}

/// Writes the folder; nothing of it stays where that fails or a signal ends it.
fn write(
    layout: &ExportLayout,
    final_dir: &Path,
    folder: &Path,
    checkpoint: &Checkpoint,
    tensors: &Tensors,
    dtype: Dtype,
) -> Result<(), Failure> {
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stopped.clone()).map_err(Failure::failed)?;
    }
    let mut export = Export::create(layout, final_dir, folder).map_err(write_failure)?;
    let mut line = LiveLine::new("exporting".to_owned(), layout.len_bytes());
    let mut copy = || -> Result<(), Failure> {
        let mut values = Vec::new();
        for (name, shape) in tensors {
            let numel: usize = shape.iter().product();
            for start in (0..numel).step_by(PIECE_ELEMS) {
                values.resize(PIECE_ELEMS.min(numel - start), 0.0);
                checkpoint.read_f32(State::Param, name, start, &mut values).map_err(Failure::bad_input)?;
                export.write_f32(name, start, &values).map_err(write_failure)?;
                line.add((values.len() * dtype.size_bytes()) as u64);
                if stopped.load(Relaxed) {
                    return Err(Failure::stopped("stopped by a signal; nothing was exported"));
                }
            }
        }
        Ok(())
    };
    let result = copy().and_then(|()| export.commit().map_err(write_failure));
    if result.is_err() {
        remove_unfinished(final_dir);
    }
    result
}

/// Removes what [`Export`] writes before its commit.
fn remove_unfinished(final_dir: &Path) {
    let name = final_dir.file_name().expect("checked in target").to_string_lossy();
    // The failure itself is what is reported.
    let _ = fs::remove_dir_all(final_dir.with_file_name(format!(".{name}.tmp")));
}

/// A wrong path or dtype is the input's fault, a full or broken disk is not.
fn write_failure(error: CheckpointError) -> Failure {
    use ErrorKind::{NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem};
    let is_machine = match &error {
        CheckpointError::Io { error, .. } => {
            !matches!(error.kind(), NotADirectory | NotFound | PermissionDenied | ReadOnlyFilesystem)
        }
        CheckpointError::NoSpace { .. } => true,
        _ => false,
    };
    if is_machine { Failure::failed(error) } else { Failure::bad_input(error) }
}

#[cfg(test)]
#[path = "../tests/saved/mod.rs"]
mod saved_run;

#[cfg(test)]
mod tests {
    use super::saved_run::{Run, SMALL, contents};
    use super::*;

    #[test]
    fn several_files_are_those_of_a_runs_own_export() {
        let run = Run::new(SMALL);
        let layout = ExportLayout::new(&run.tensors, Dtype::BF16, 1000);
        run.export(&layout, 7, &run.path("model"), "expected");
        let expected = contents(&run.path("expected"));
        assert!(expected.keys().filter(|name| name.starts_with("model-0000")).count() > 3, "{:?}", expected.keys());
        let index: serde_json::Value = serde_json::from_slice(&expected["model.safetensors.index.json"]).unwrap();
        let numel: usize = run.tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(index["metadata"]["total_size"], 2 * numel);

        for world_size in 1..=4 {
            let checkpoint = Checkpoint::open(&run.save(7, world_size)).unwrap();
            let hf = run.path(&format!("hf-{world_size}"));
            write(&layout, &hf, &run.path("model"), &checkpoint, &run.tensors, Dtype::BF16).unwrap();
            assert!(contents(&hf) == expected, "{world_size} ranks");
            fs::remove_dir_all(checkpoint.dir()).unwrap();
        }
    }
}
