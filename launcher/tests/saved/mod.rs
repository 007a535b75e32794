//! A model folder and checkpoints of it as a run of any number of ranks leaves them, with known values.

// Each test uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fsdp_checkpoint::Dtype;
use fsdp_checkpoint::export::{Export, ExportLayout};
use fsdp_checkpoint::sharded::{self, Chunk, ManifestMeta, ShardReport, ShardWriter, State};
use fsdp_plan::{Architecture, units};

pub const STATES: [State; 3] = [State::Param, State::ExpAvg, State::ExpAvgSq];

const TOKENIZER: &str = "{\"version\": \"1.0\"}\n";

/// What differs between models.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub is_tied: bool,
    /// In `config.json`.
    pub torch_dtype: Option<&'static str>,
    /// Of the source's weights; `None`: it has none, and the run began with random ones.
    pub source: Option<Dtype>,
    /// `[output] dtype`
    pub output_dtype: &'static str,
}

pub const SMALL: Model = Model {
    vocab_size: 37,
    hidden_size: 12,
    is_tied: true,
    torch_dtype: Some("float32"),
    source: Some(Dtype::BF16),
    output_dtype: "auto",
};

/// `model/` and `out/checkpoints/` in a folder of their own.
pub struct Run {
    pub dir: tempfile::TempDir,
    pub tensors: Vec<(String, Vec<usize>)>,
    output_dtype: &'static str,
    init: &'static str,
}

impl Run {
    pub fn new(model: Model) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        std::fs::create_dir(&base).unwrap();
        let Model { vocab_size, hidden_size, is_tied, .. } = model;
        let torch_dtype = model.torch_dtype.map_or(String::new(), |name| format!("\"torch_dtype\": \"{name}\","));
        let config = format!(
            r#"{{
  "architectures": ["LlamaForCausalLM"], {torch_dtype} "vocab_size": {vocab_size},
  "hidden_size": {hidden_size}, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
  "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-06, "hidden_act": "silu",
  "rope_theta": 10000.0, "tie_word_embeddings": {is_tied}
}}
"#
        );
        std::fs::write(base.join("config.json"), config).unwrap();
        std::fs::write(base.join("tokenizer.json"), TOKENIZER).unwrap();
        for name in ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"] {
            std::fs::write(base.join(name), format!("{{\"name\": \"{name}\"}}")).unwrap();
        }
        let arch = Architecture::from_config_json(&base).unwrap();
        let params = units::units(&arch).into_iter().flat_map(|unit| unit.params);
        let tensors: Vec<(String, Vec<usize>)> = params.map(|param| (param.name, param.shape)).collect();
        let init = if model.source.is_some() { "pretrained" } else { "random" };
        let run = Run { dir, tensors, output_dtype: model.output_dtype, init };
        match model.source {
            Some(dtype) => run.export(&ExportLayout::new(&run.tensors, dtype, u64::MAX), 0, &base, "model"),
            None => std::fs::rename(&base, run.path("model")).unwrap(),
        }
        run
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The launcher, run in the run's folder.
    pub fn command(&self, launcher: &str, args: &[&str]) -> Command {
        let mut command = Command::new(launcher);
        command.current_dir(self.dir.path()).args(args).stdin(Stdio::null());
        command
    }

    pub fn output(&self, launcher: &str, args: &[&str]) -> Ended {
        let Output { status, stdout, stderr } = self.command(launcher, args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ended { status: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// A committed checkpoint of `step`, saved by so many ranks; returns its folder.
    pub fn save(&self, step: u64, world_size: usize) -> PathBuf {
        self.save_states(step, world_size, &STATES, value)
    }

    pub fn save_states(
        &self,
        step: u64,
        world_size: usize,
        states: &[State],
        value: impl Fn(u64, State, usize, usize) -> f32,
    ) -> PathBuf {
        let root = self.path("out/checkpoints");
        let save_id = format!("save-{step}");
        let mut reports: Vec<ShardReport> = Vec::new();
        for rank in 0..world_size {
            let mut pieces = Vec::new();
            for &state in states {
                pieces.extend(self.shard(rank, world_size).into_iter().map(|(i, start, len)| (state, i, start, len)));
            }
            let chunks: Vec<Chunk> = pieces
                .iter()
                .map(|&(state, i, start, len)| {
                    let (name, shape) = &self.tensors[i];
                    Chunk { state, name, shape, start, len }
                })
                .collect();
            let mut writer = ShardWriter::create(&root, step, &save_id, rank, world_size, &chunks).unwrap();
            for (state, i, start, len) in pieces {
                for first in (start..start + len).step_by(1 << 20) {
                    let end = (start + len).min(first + (1 << 20));
                    let values: Vec<f32> = (first..end).map(|element| value(step, state, i, element)).collect();
                    writer.write_f32(&values).unwrap();
                }
            }
            reports.push(writer.finish().unwrap());
        }
        let meta = ManifestMeta {
            config: self.config(),
            data_digest: "7:abc".to_owned(),
            tokenizer_digest: fsdp_data::tokenizer_digest(&self.dir.path().join("model")).unwrap(),
            trainer: serde_json::json!({
                "step": step, "position": {"epoch": 3, "sample": 12}, "optimizer_steps": step, "scaler": [1024.0, 7],
                "global_batch_size": 8,
            }),
            versions: BTreeMap::from([("fsdp-launch".to_owned(), "0.1.0".to_owned())]),
        };
        sharded::commit(&root, step, &save_id, &reports, meta).unwrap()
    }

    fn config(&self) -> String {
        let (init, dtype) = (self.init, self.output_dtype);
        format!(
            "[model]\npath = \"model\"\ninit = \"{init}\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 90\nseq_len = 8\n\
             [data]\ntrain = [\"data.jsonl\"]\n[output]\ndir = \"out\"\ndtype = \"{dtype}\"\n"
        )
    }

    /// Rank `rank`'s contiguous part of all elements laid end to end: (tensor, start, len).
    fn shard(&self, rank: usize, world_size: usize) -> Vec<(usize, usize, usize)> {
        let numel = |shape: &[usize]| shape.iter().product::<usize>();
        let total: usize = self.tensors.iter().map(|(_, shape)| numel(shape)).sum();
        let per_rank = total.div_ceil(world_size);
        let (from, to) = (rank * per_rank, ((rank + 1) * per_rank).min(total));
        let (mut pieces, mut first) = (Vec::new(), 0);
        for (i, (_, shape)) in self.tensors.iter().enumerate() {
            let end = first + numel(shape);
            let (start, stop) = (first.max(from), end.min(to));
            if start < stop {
                pieces.push((i, start - first, stop - start));
            }
            first = end;
        }
        pieces
    }

    /// What a run itself exports of the parameters of `step`: all at once, from values rather than from a checkpoint.
    pub fn export(&self, layout: &ExportLayout, step: u64, source: &Path, into: &str) {
        let mut export = Export::create(layout, &self.path(into), source).unwrap();
        for (i, (name, shape)) in self.tensors.iter().enumerate() {
            let numel = shape.iter().product();
            let values: Vec<f32> = (0..numel).map(|element| value(step, State::Param, i, element)).collect();
            export.write_f32(name, 0, &values).unwrap();
        }
        export.commit().unwrap();
    }

    /// Names in the run's folder, hidden ones too.
    pub fn names(&self) -> Vec<String> {
        contents(self.dir.path()).into_keys().collect()
    }
}

/// What a command left.
#[derive(Debug)]
pub struct Ended {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A value that bf16 has to round, different for neighbours, steps and states.
pub fn value(step: u64, state: State, tensor: usize, element: usize) -> f32 {
    step as f32 * 0.37 + state as usize as f32 + ((tensor * 31 + element * 7) % 255) as f32 * 0.0123
}

/// Everything in a folder by name, folders without content.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap_or_default()))
        .collect()
}
