//! What the parsers of input promise of *any* bytes, as one function a parser. It panics where a promise is broken.
//!
//! `cargo fuzz` looks for such bytes (the package `fuzz/`, one line a target); `tests/replay.rs` runs each target over its
//! corpus and over mutations of it, on a stable toolchain.
//!
//! - [`TARGETS`]: all of them, by the names of their corpora.
//! - [`mutation`]: deterministic mutations of an input.
//! - `within`: the promise that all share: memory is bounded by the input.
//! - `safetensors`: a model folder's weights and its index.
//! - `manifest`: a checkpoint's manifest.
//! - `model_config`: `config.json`.
//! - `job_config`: the TOML file of a job.
//! - `lines`: JSON lines of each format.
//! - `tokenizer`: `tokenizer.json`, and a text for it.
//! - `node_list`: SLURM's lists of hosts.

#![forbid(unsafe_code)]

pub mod mutation;

mod job_config;
mod lines;
mod manifest;
mod model_config;
mod node_list;
mod safetensors;
mod tokenizer;
mod within;

pub use job_config::job_config;
pub use lines::json_lines;
pub use manifest::manifest;
pub use model_config::model_config;
pub use node_list::node_list;
pub use safetensors::{safetensors_header, safetensors_index};
pub use tokenizer::tokenizer;

/// A parser's promises.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Of the target in `fuzz/fuzz_targets/`, and of its corpus in `fuzz/corpus/`.
    pub name: &'static str,
    /// Panics where a promise is broken.
    pub run: fn(&[u8]),
}

pub const TARGETS: &[Target] = &[
    Target { name: "job_config", run: job_config },
    Target { name: "json_lines", run: json_lines },
    Target { name: "manifest", run: manifest },
    Target { name: "model_config", run: model_config },
    Target { name: "node_list", run: node_list },
    Target { name: "safetensors_header", run: safetensors_header },
    Target { name: "safetensors_index", run: safetensors_index },
    Target { name: "tokenizer", run: tokenizer },
];
