//! `fsdp-launch inspect`: what a checkpoint holds and whether it is whole; of an output folder, all of them in a list.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fsdp_checkpoint::sharded::{self, Checkpoint, Manifest, State};
use fsdp_checkpoint::{CheckpointError, Dtype};
use fsdp_config::{Batch, Duration, JobConfig};
use fsdp_control::ExitStatus;
use fsdp_plan::plan::format_bytes;
use serde_json::{Value, json};

use crate::cli::InspectArgs;
use crate::failure::Failure;
use crate::saved::{self, Saved, len_bytes};

/// Elements in memory at a time: 4 MiB.
const PIECE_ELEMS: usize = 1 << 20;

pub fn inspect(args: &InspectArgs) -> Result<ExitStatus, Failure> {
    match saved::locate(&args.checkpoint)? {
        Saved::One(dir) => inspect_one(&dir, args),
        Saved::Root(root) => inspect_all(&root, args),
    }
}

fn inspect_one(dir: &Path, args: &InspectArgs) -> Result<ExitStatus, Failure> {
    let found = Found::new(dir.to_owned(), !args.no_verify);
    let tensors = match &found.checkpoint {
        Some(checkpoint) => tensors(checkpoint, found.verdict == Verdict::Verified)?,
        None => Vec::new(),
    };
    if args.json {
        crate::print(&format!("{:#}", found.as_json(&tensors)));
    } else if let Some(checkpoint) = &found.checkpoint {
        let manifest = checkpoint.manifest();
        for (what, fact) in facts(dir, manifest) {
            crate::print(&format!("{what:<15}{fact}"));
        }
        crate::print(&format!("\n{}", tensor_table(&tensors)));
        crate::print(&format!("\n{}\n", file_table(manifest)));
        match &found.verdict {
            Verdict::Verified => crate::print(&format!("verified: {}", extent(manifest))),
            Verdict::NotVerified => crate::print(&format!("not verified: {}", extent(manifest))),
            Verdict::Damaged(_) => {}
        }
    }
    match found.verdict {
        Verdict::Damaged(error) => Err(Failure::bad_input(error)),
        Verdict::Verified | Verdict::NotVerified => Ok(ExitStatus::Done),
    }
}

fn inspect_all(root: &Path, args: &InspectArgs) -> Result<ExitStatus, Failure> {
    let list = sharded::list(root).map_err(Failure::bad_input)?;
    let mut rows = vec![["step", "written (UTC)", "ranks", "size", "verdict"].map(str::to_owned).to_vec()];
    let (mut values, mut num_damaged) = (Vec::new(), 0);
    for (step, dir) in &list {
        let found = Found::new(dir.clone(), !args.no_verify);
        let manifest = found.checkpoint.as_ref().map(Checkpoint::manifest);
        let verdict = match &found.verdict {
            Verdict::Verified => "verified".to_owned(),
            Verdict::NotVerified => "not verified".to_owned(),
            Verdict::Damaged(error) => {
                num_damaged += 1;
                error.clone()
            }
        };
        let poison = match manifest.map_or(0, num_nonfinite) {
            0 => String::new(),
            num => format!(", {num} values are not finite"),
        };
        rows.push(vec![
            step.to_string(),
            written(dir),
            manifest.map_or_else(|| "?".to_owned(), |manifest| manifest.world_size.to_string()),
            manifest.map_or_else(|| "?".to_owned(), |manifest| format_bytes(len_bytes(manifest))),
            verdict + &poison,
        ]);
        values.push(found.as_json(&[]));
    }
    if args.json {
        crate::print(&format!("{:#}", json!({ "checkpoints": values })));
    } else {
        crate::print(&table(&rows, &[0, 2, 3]));
    }
    match num_damaged {
        0 => Ok(ExitStatus::Done),
        num => {
            Err(Failure::bad_input(format!("damaged: {num} of {} checkpoints under {}", list.len(), root.display())))
        }
    }
}

/// A checkpoint as far as it can be read.
#[derive(Debug)]
struct Found {
    dir: PathBuf,
    /// `None` if not even the manifest is whole, or files are missing or of another size.
    checkpoint: Option<Checkpoint>,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Verified,
    NotVerified,
    /// Which file, tensor and bytes.
    Damaged(String),
}

impl Found {
    fn new(dir: PathBuf, verify: bool) -> Self {
        let opened = Checkpoint::open_unread(&dir);
        let verdict = match &opened {
            Err(error) => Verdict::Damaged(error.to_string()),
            Ok(_) if !verify => Verdict::NotVerified,
            Ok(checkpoint) => match saved::verify(checkpoint) {
                Ok(()) => Verdict::Verified,
                Err(error) => Verdict::Damaged(error.to_string()),
            },
        };
        Found { dir, checkpoint: opened.ok(), verdict }
    }

    fn as_json(&self, tensors: &[Tensor]) -> Value {
        let (verified, damage) = match &self.verdict {
            Verdict::Verified => (Some(true), None),
            Verdict::NotVerified => (None, None),
            Verdict::Damaged(error) => (Some(false), Some(error)),
        };
        let mut value = json!({ "path": self.dir.display().to_string(), "verified": verified, "damage": damage, "written": written(&self.dir) });
        let Some(checkpoint) = &self.checkpoint else { return value };
        let manifest = checkpoint.manifest();
        let known = json!({
            "step": manifest.step,
            "save_id": manifest.save_id,
            "format_version": manifest.format_version,
            "world_size": manifest.world_size,
            "versions": manifest.meta.versions,
            "trainer": manifest.meta.trainer,
            "data_digest": manifest.meta.data_digest,
            "tokenizer_digest": manifest.meta.tokenizer_digest,
            "config": manifest.meta.config,
            "num_nonfinite": num_nonfinite(manifest),
            "num_chunks": manifest.chunks.len(),
            "len_bytes": len_bytes(manifest),
            "files": manifest.files,
        });
        let (Value::Object(all), Value::Object(known)) = (&mut value, known) else { unreachable!("both are objects") };
        all.extend(known);
        if !tensors.is_empty() {
            all.insert("tensors".to_owned(), tensors.iter().map(Tensor::as_json).collect());
        }
        value
    }
}

/// A logical tensor with all that is saved of it.
#[derive(Debug)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    states: Vec<State>,
    /// In all its states; `None` if they were not looked at.
    num_nonfinite: Option<u64>,
}

impl Tensor {
    fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    fn len_bytes(&self) -> u64 {
        (self.numel() * self.states.len() * Dtype::F32.size_bytes()) as u64
    }

    fn as_json(&self) -> Value {
        let states: Vec<&str> = self.states.iter().map(|state| state.name()).collect();
        json!({
            "name": self.name, "shape": self.shape, "dtype": Dtype::F32.to_string(), "len_bytes": self.len_bytes(),
            "states": states, "num_nonfinite": self.num_nonfinite,
        })
    }
}

/// The tensors by name, `layers.2` before `layers.10`. Values are read only to find those that the manifest counts as not
/// finite.
fn tensors(checkpoint: &Checkpoint, is_verified: bool) -> Result<Vec<Tensor>, Failure> {
    let manifest = checkpoint.manifest();
    let mut by_name: BTreeMap<&str, Tensor> = BTreeMap::new();
    for chunk in &manifest.chunks {
        let tensor = by_name.entry(&chunk.name).or_insert_with(|| Tensor {
            name: chunk.name.clone(),
            shape: chunk.shape.clone(),
            states: Vec::new(),
            num_nonfinite: None,
        });
        if !tensor.states.contains(&chunk.state) {
            tensor.states.push(chunk.state);
        }
    }
    let mut tensors: Vec<Tensor> = by_name.into_values().collect();
    tensors.sort_by_cached_key(|tensor| {
        let parts = tensor.name.split('.').map(|part| (part.parse().unwrap_or(u64::MAX), part.to_owned()));
        parts.collect::<Vec<(u64, String)>>()
    });
    for tensor in &mut tensors {
        tensor.states.sort();
        if num_nonfinite(manifest) == 0 {
            tensor.num_nonfinite = Some(0);
        } else if is_verified {
            tensor.num_nonfinite = Some(count_nonfinite(checkpoint, tensor).map_err(Failure::bad_input)?);
        }
    }
    Ok(tensors)
}

fn count_nonfinite(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<u64, CheckpointError> {
    let (mut values, mut num) = (Vec::new(), 0);
    for &state in &tensor.states {
        for start in (0..tensor.numel()).step_by(PIECE_ELEMS) {
            values.resize(PIECE_ELEMS.min(tensor.numel() - start), 0.0);
            checkpoint.read_f32(state, &tensor.name, start, &mut values)?;
            num += values.iter().filter(|value| !value.is_finite()).count() as u64;
        }
    }
    Ok(num)
}

fn num_nonfinite(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|file| file.num_nonfinite).sum()
}

fn extent(manifest: &Manifest) -> String {
    let (num_files, num_chunks) = (manifest.files.len(), manifest.chunks.len());
    format!("{num_files} files, {num_chunks} chunks, {}", format_bytes(len_bytes(manifest)))
}

/// When the manifest was written, in UTC.
fn written(dir: &Path) -> String {
    const YEAR_10000_SECS: u64 = 253_402_300_800;
    let modified = fs::metadata(dir.join("manifest.json")).and_then(|metadata| metadata.modified());
    let is_plain = |time: &std::time::SystemTime| {
        time.duration_since(std::time::UNIX_EPOCH).is_ok_and(|since| since.as_secs() < YEAR_10000_SECS)
    };
    match modified.ok().filter(is_plain) {
        Some(time) => humantime::format_rfc3339_seconds(time).to_string(),
        None => "?".to_owned(),
    }
}

/// (What, what is known of it), for a person.
fn facts(dir: &Path, manifest: &Manifest) -> Vec<(&'static str, String)> {
    let meta = &manifest.meta;
    let versions: Vec<String> = meta.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let mut facts = vec![
        ("checkpoint", dir.display().to_string()),
        ("step", manifest.step.to_string()),
        ("save id", manifest.save_id.clone()),
        ("written", written(dir)),
        ("world size", format!("{} shards, one a rank", manifest.world_size)),
        ("format", format!("version {}; by {}", manifest.format_version, versions.join(", "))),
        ("data position", leaves(&meta.trainer["position"])),
    ];
    if let Some(global_batch_size) = meta.trainer["global_batch_size"].as_u64() {
        facts.push(("seen", format!("{} sequences", manifest.step.saturating_mul(global_batch_size))));
    }
    let mut trainer = meta.trainer.clone();
    if let Some(fields) = trainer.as_object_mut() {
        // Both are said already.
        fields.retain(|name, _| name != "position" && name != "step");
    }
    facts.push(("trainer", leaves(&trainer)));
    facts.extend(config_facts(&format!("{} (saved config)", dir.display()), &meta.config));
    facts.push(("tokenizer", format!("digest {}", meta.tokenizer_digest)));
    facts.push(("training data", format!("digest {}", meta.data_digest)));
    facts.push((
        "values",
        match num_nonfinite(manifest) {
            0 => "all finite".to_owned(),
            num => format!("POISONED: {num} are NaN or infinite"),
        },
    ));
    facts
}

fn config_facts(origin: &str, text: &str) -> Vec<(&'static str, String)> {
    let config = match JobConfig::parse(origin, text) {
        Ok(config) => config,
        Err(error) => return vec![("config", format!("not one of this version: {error}"))],
    };
    let training = &config.training;
    let duration = match training.duration {
        Duration::Steps(steps) => format!("{steps} steps"),
        Duration::Epochs(epochs) => format!("{epochs} epochs"),
    };
    let batch = match training.batch {
        Batch::Accumulation(num) => format!("grad_accumulation {num}"),
        Batch::GlobalBatch(num) => format!("global_batch_size {num}"),
    };
    let files: Vec<String> = config.data.train.iter().map(|path| path.display().to_string()).collect();
    vec![
        ("model", format!("{}, {}", config.model.path, config.model.init.name())),
        (
            "training",
            format!(
                "{duration} on {}, seq_len {}, micro_batch_size {}, {batch}, seed {}",
                files.join(", "),
                training.seq_len,
                training.micro_batch_size,
                training.seed
            ),
        ),
        (
            "optimizer",
            format!(
                "AdamW, lr {}, {}; param {}, reduce {}",
                config.optimizer.lr,
                config.lr_scheduler.kind.name(),
                config.precision.param.name(),
                config.precision.reduce.name()
            ),
        ),
    ]
}

/// `epoch 3, sample 12`, with names such as `a.b` for what lies deeper.
fn leaves(value: &Value) -> String {
    fn collect(prefix: &str, value: &Value, into: &mut Vec<String>) {
        let Value::Object(fields) = value else {
            into.push(format!("{prefix} {value}").trim_start().to_owned());
            return;
        };
        for (name, field) in fields {
            let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            collect(&name, field, into);
        }
    }
    let mut all = Vec::new();
    collect("", value, &mut all);
    all.join(", ")
}

fn tensor_table(tensors: &[Tensor]) -> String {
    let mut rows = vec![["tensor", "shape", "dtype", "size", "not finite", "states"].map(str::to_owned).to_vec()];
    for tensor in tensors {
        let states: Vec<&str> = tensor.states.iter().map(|state| state.name()).collect();
        rows.push(vec![
            tensor.name.clone(),
            format!("{:?}", tensor.shape),
            Dtype::F32.to_string(),
            format_bytes(tensor.len_bytes()),
            tensor.num_nonfinite.map_or_else(|| "?".to_owned(), |num| num.to_string()),
            states.join(", "),
        ]);
    }
    table(&rows, &[3, 4])
}

fn file_table(manifest: &Manifest) -> String {
    let mut rows = vec![["file", "size", "not finite", "digest"].map(str::to_owned).to_vec()];
    for file in &manifest.files {
        rows.push(vec![
            file.name.clone(),
            format_bytes(file.len_bytes),
            file.num_nonfinite.to_string(),
            file.digest.clone(),
        ]);
    }
    table(&rows, &[1, 2])
}

/// Rows of equally many cells, the columns two spaces apart; those of `right` end at the same place, the others begin there.
fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<String>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<String>>().join("\n")
}
