//! `manifest.json`: everything about a checkpoint except its tensors' values.
//!
//! The text starts with a digest of all that follows, so that a changed step or position in the data is noticed
//! like a changed weight.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_128;

use crate::durable;
use crate::elements::Dtype;
use crate::error::{CheckpointError, Result};
use crate::shape::{self, numel};

pub(super) const MANIFEST: &str = "manifest.json";
const FORMAT_VERSION: u32 = 1;
const MAX_MANIFEST_BYTES: u64 = 1 << 30;
/// Of the trainer's state: bounds the memory that its values take.
const MAX_TRAINER_BYTES: usize = 8 << 20;
const SEAL_START: &str = "{\n  \"digest\": \"";
const SEAL_END: &str = "\",\n";

/// Which of a parameter's three fp32 values a piece belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Param,
    ExpAvg,
    ExpAvgSq,
}

impl State {
    /// As the manifest and the shards spell it.
    pub const fn name(self) -> &'static str {
        match self {
            State::Param => "param",
            State::ExpAvg => "exp_avg",
            State::ExpAvgSq => "exp_avg_sq",
        }
    }
}

/// What the trainer adds to a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ManifestMeta {
    /// The whole text of the resolved config.
    pub config: String,
    pub data_digest: String,
    pub tokenizer_digest: String,
    /// Position in the data, scheduler, scaler, RNG: the trainer's own affair. Numbers come back bit for bit.
    pub trainer: Value,
    /// Of this program, libtorch, the CUDA runtime...
    pub versions: BTreeMap<String, String>,
}

/// A committed checkpoint's description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields")]
pub struct Manifest {
    pub format_version: u32,
    pub save_id: String,
    pub step: u64,
    pub world_size: usize,
    #[serde(flatten)]
    pub meta: ManifestMeta,
    /// One per rank of the world that saved, in order.
    pub files: Vec<FileEntry>,
    pub chunks: Vec<ChunkEntry>,
}

/// A manifest as it is spelled. Not read with `flatten`, which would hold all of it in memory a second time.
#[derive(Deserialize)]
struct Fields {
    format_version: u32,
    save_id: String,
    step: u64,
    world_size: usize,
    config: String,
    data_digest: String,
    tokenizer_digest: String,
    trainer: Box<RawValue>,
    versions: BTreeMap<String, String>,
    files: Vec<FileEntry>,
    chunks: Vec<ChunkEntry>,
}

impl TryFrom<Fields> for Manifest {
    type Error = String;

    fn try_from(fields: Fields) -> std::result::Result<Self, String> {
        let trainer = fields.trainer.get();
        if trainer.len() > MAX_TRAINER_BYTES {
            return Err(format!("trainer: {} bytes, at most {MAX_TRAINER_BYTES} are allowed", trainer.len()));
        }
        Ok(Manifest {
            format_version: fields.format_version,
            save_id: fields.save_id,
            step: fields.step,
            world_size: fields.world_size,
            meta: ManifestMeta {
                config: fields.config,
                data_digest: fields.data_digest,
                tokenizer_digest: fields.tokenizer_digest,
                trainer: serde_json::from_str(trainer).map_err(|e| format!("trainer: {e}"))?,
                versions: fields.versions,
            },
            files: fields.files,
            chunks: fields.chunks,
        })
    }
}

/// A rank's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub len_bytes: u64,
    /// xxh3-128 of the whole file, as 32 hexadecimal digits.
    pub digest: String,
    /// NaN and infinite values in it: more than 0 means a poisoned checkpoint.
    pub num_nonfinite: u64,
}

/// Elements `start..start + len` of a flattened logical tensor, and where they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkEntry {
    pub state: State,
    pub name: String,
    /// Of the whole tensor.
    #[serde(deserialize_with = "shape::deserialize")]
    pub shape: Vec<usize>,
    pub dtype: String,
    pub start: usize,
    pub len: usize,
    /// Index into [`Manifest::files`].
    pub file: usize,
    /// From the start of that file.
    pub offset_bytes: u64,
    /// xxh3-128 of the piece's bytes, as 32 hexadecimal digits.
    pub digest: String,
}

impl ChunkEntry {
    /// The piece's name in the header of its file.
    pub(super) fn key(&self) -> String {
        format!("{}:{}[{}..{}]", self.state.name(), self.name, self.start, self.end())
    }

    pub(super) fn len_bytes(&self) -> u64 {
        (self.len * Dtype::F32.size_bytes()) as u64
    }

    /// In its file: first, and one after the last.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.offset_bytes, self.offset_bytes + self.len_bytes())
    }

    pub(super) fn end(&self) -> usize {
        self.start + self.len
    }
}

pub(super) fn file_name(rank: usize, world_size: usize) -> String {
    format!("rank-{rank:05}-of-{world_size:05}.safetensors")
}

pub(super) fn hex(digest: u128) -> String {
    format!("{digest:032x}")
}

impl Manifest {
    pub(super) fn new(
        step: u64,
        save_id: &str,
        meta: ManifestMeta,
        files: Vec<FileEntry>,
        chunks: Vec<ChunkEntry>,
    ) -> Self {
        Manifest {
            format_version: FORMAT_VERSION,
            save_id: save_id.to_string(),
            step,
            world_size: files.len(),
            meta,
            files,
            chunks,
        }
    }

    /// The text of `manifest.json`, with its digest in front. No check is made.
    pub fn to_sealed_text(&self) -> String {
        let body = serde_json::to_string_pretty(self).expect("plain data is JSON");
        seal(body.strip_prefix("{\n").expect("pretty JSON opens with a brace and a line"))
    }

    /// Reads, verifies and checks the manifest of a checkpoint folder.
    pub(super) fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        // A folder that cannot be looked into is not one that lacks its manifest.
        let found = durable::unless_missing(path.metadata()).map_err(CheckpointError::io("open", &path))?;
        if found.is_none_or(|found| !found.is_file()) && dir.is_dir() {
            return Err(CheckpointError::Missing { path });
        }
        match durable::read_text(&path, MAX_MANIFEST_BYTES) {
            Ok(text) => Self::parse(&text, &path),
            // Of the content: not UTF-8, too long.
            Err(CheckpointError::Io { error, .. }) if error.raw_os_error().is_none() => {
                Err(CheckpointError::Manifest { path, field: "file".into(), reason: error.to_string() })
            }
            Err(error) => Err(error),
        }
    }

    /// Verifies and checks the text of a manifest. `path` is for the messages.
    ///
    /// # Errors
    /// It is not as it was written, of another version, contradicts itself, or its tensors are not of F32.
    pub fn parse(text: &str, path: &Path) -> Result<Manifest> {
        let bad =
            |(field, reason): (String, String)| CheckpointError::Manifest { path: path.to_path_buf(), field, reason };
        let sealed = text
            .strip_prefix(SEAL_START)
            .and_then(|rest| rest.split_once(SEAL_END))
            .filter(|(digest, _)| digest.len() == 32);
        let Some((expected, body)) = sealed else {
            return Err(bad(("digest".into(), "the file does not start with its digest".into())));
        };
        let got = hex(xxh3_128(body.as_bytes()));
        if got != expected {
            let end = text.len() as u64;
            return Err(CheckpointError::Digest {
                what: "the manifest".into(),
                bytes: end - body.len() as u64..end,
                expected: expected.to_string(),
                got,
                path: path.to_path_buf(),
            });
        }

        // Before the rest, which another version may spell differently.
        #[derive(Deserialize)]
        struct Version {
            format_version: u64,
        }
        let version: Version = serde_json::from_str(text).map_err(|e| bad(("format_version".into(), e.to_string())))?;
        if version.format_version != u64::from(FORMAT_VERSION) {
            let (got, supported) = (version.format_version, FORMAT_VERSION);
            return Err(CheckpointError::Version { path: path.to_path_buf(), got, supported });
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| bad(("content".into(), e.to_string())))?;
        let f32 = Dtype::F32.to_string();
        if let Some(chunk) = manifest.chunks.iter().find(|chunk| chunk.dtype != f32) {
            let (state, name, dtype) = (chunk.state.name(), &chunk.name, &chunk.dtype);
            let problems = format!("{state} of {name} has dtype {dtype:?}, expected {f32:?}, and none is converted");
            return Err(CheckpointError::Mismatch { path: path.to_path_buf(), problems });
        }
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    /// Every file is named as it must be, every chunk lies inside its file and its tensor, and the chunks of each
    /// tensor cover it exactly once, as do those of a file its bytes after the header. After this no arithmetic on a
    /// chunk can overflow.
    ///
    /// # Errors
    /// (field, reason)
    pub(super) fn check(&self) -> std::result::Result<(), (String, String)> {
        if self.world_size == 0 || self.files.len() != self.world_size {
            let reason = format!("{}, but {} files are listed", self.world_size, self.files.len());
            return Err(("world_size".into(), reason));
        }
        for (rank, file) in self.files.iter().enumerate() {
            let expected = file_name(rank, self.world_size);
            if file.name != expected {
                return Err((format!("files[{rank}].name"), format!("{:?}, expected {expected:?}", file.name)));
            }
        }

        let mut pieces: BTreeMap<(State, &str), Vec<&ChunkEntry>> = BTreeMap::new();
        for (i, chunk) in self.chunks.iter().enumerate() {
            let bad = |reason: String| Err((format!("chunks[{i}] ({} {})", chunk.state.name(), chunk.name), reason));
            let Some(file) = self.files.get(chunk.file) else {
                return bad(format!("file {} of {}", chunk.file, self.files.len()));
            };
            let Some(numel) = numel(&chunk.shape) else {
                return bad(format!("impossible shape {:?}", chunk.shape));
            };
            if chunk.len == 0 || chunk.start.checked_add(chunk.len).is_none_or(|end| end > numel) {
                return bad(format!("{} elements from {} on, of {numel}", chunk.len, chunk.start));
            }
            let len_bytes = (chunk.len as u64).checked_mul(Dtype::F32.size_bytes() as u64);
            let end_bytes = len_bytes.and_then(|len| len.checked_add(chunk.offset_bytes));
            if end_bytes.is_none_or(|end| end > file.len_bytes) {
                return bad(format!(
                    "from byte {} on does not fit {} of {} bytes",
                    chunk.offset_bytes, file.name, file.len_bytes
                ));
            }
            pieces.entry((chunk.state, &chunk.name)).or_default().push(chunk);
        }

        for ((state, name), chunks) in pieces {
            let bad = |reason: String| Err((format!("chunks of {} {name}", state.name()), reason));
            let shapes: BTreeSet<&[usize]> = chunks.iter().map(|chunk| chunk.shape.as_slice()).collect();
            if shapes.len() > 1 {
                return bad(format!("several shapes: {shapes:?}"));
            }
            let numel = numel(&chunks[0].shape).expect("checked above") as u64;
            let ranges = chunks.iter().map(|chunk| (chunk.start as u64, chunk.end() as u64)).collect();
            covers(ranges, 0, numel, "element").or_else(bad)?;
        }
        for (file, chunks) in self.chunks_by_file().into_iter().enumerate() {
            let FileEntry { name, len_bytes, .. } = &self.files[file];
            let ranges: Vec<(u64, u64)> = chunks.iter().map(|&i| self.chunks[i].bytes()).collect();
            let first = ranges.first().map_or(*len_bytes, |range| range.0);
            covers(ranges, first, *len_bytes, "byte").map_err(|reason| (format!("chunks of {name}"), reason))?;
        }
        Ok(())
    }

    /// The chunks of each file, in the order of their bytes.
    pub(super) fn chunks_by_file(&self) -> Vec<Vec<usize>> {
        let mut by_file = vec![Vec::new(); self.files.len()];
        for (i, chunk) in self.chunks.iter().enumerate() {
            by_file[chunk.file].push(i);
        }
        for chunks in &mut by_file {
            chunks.sort_by_key(|&i| self.chunks[i].offset_bytes);
        }
        by_file
    }
}

/// Whether `start..end` is covered by the ranges exactly once.
fn covers(mut ranges: Vec<(u64, u64)>, start: u64, end: u64, unit: &str) -> std::result::Result<(), String> {
    ranges.sort();
    let mut covered = start;
    for (from, to) in ranges {
        if from != covered {
            let what = if from < covered { "overlap" } else { "leave a hole" };
            return Err(format!("they {what} at {unit} {}", from.min(covered)));
        }
        covered = to;
    }
    match covered == end {
        true => Ok(()),
        false => Err(format!("they cover {} of {} {unit}s", covered - start, end - start)),
    }
}

/// Puts its digest in front of what follows the opening brace.
fn seal(body: &str) -> String {
    format!("{SEAL_START}{}{SEAL_END}{body}", hex(xxh3_128(body.as_bytes())))
}
