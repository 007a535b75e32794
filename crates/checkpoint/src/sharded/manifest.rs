//! `manifest.json`: everything about a checkpoint except its tensors' values.
//!
//! The text starts with a digest of all that follows, so that a changed step or position in the data is noticed
//! like a changed weight.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

use crate::durable;
use crate::elements::{Dtype, numel};
use crate::error::{CheckpointError, Result};

pub(super) const MANIFEST: &str = "manifest.json";
const FORMAT_VERSION: u32 = 1;
const MAX_MANIFEST_BYTES: u64 = 1 << 30;
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    pub(super) fn len_bytes(&self) -> u64 {
        (self.len * Dtype::F32.size_bytes()) as u64
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

    pub(super) fn to_sealed_text(&self) -> String {
        let body = serde_json::to_string_pretty(self).expect("plain data is JSON");
        let body = body.strip_prefix("{\n").expect("pretty JSON opens with a brace and a line");
        format!("{SEAL_START}{}{SEAL_END}{body}", hex(xxh3_128(body.as_bytes())))
    }

    /// Reads, verifies and checks the manifest of a checkpoint folder.
    pub(super) fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        let bad = |(field, reason): (String, String)| CheckpointError::Manifest { path: path.clone(), field, reason };
        let text = durable::read_text(&path, MAX_MANIFEST_BYTES)?;
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
                path,
            });
        }

        // Before the rest, which another version may spell differently.
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let version: Version =
            serde_json::from_str(&text).map_err(|e| bad(("format_version".into(), e.to_string())))?;
        if version.format_version != FORMAT_VERSION {
            let reason = format!("{}, but this program reads version {FORMAT_VERSION}", version.format_version);
            return Err(bad(("format_version".into(), reason)));
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| bad(("content".into(), e.to_string())))?;
        manifest.check().map_err(bad)?;
        Ok(manifest)
    }

    /// Every file is named as it must be, every chunk lies inside its file and its tensor, and the chunks of each
    /// tensor cover it exactly once. After this no arithmetic on a chunk can overflow.
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
            if chunk.dtype != Dtype::F32.to_string() {
                return bad(format!("dtype {:?}, expected \"F32\"", chunk.dtype));
            }
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

        for ((state, name), mut chunks) in pieces {
            let bad = |reason: String| Err((format!("chunks of {} {name}", state.name()), reason));
            let shapes: BTreeSet<&[usize]> = chunks.iter().map(|chunk| chunk.shape.as_slice()).collect();
            if shapes.len() > 1 {
                return bad(format!("several shapes: {shapes:?}"));
            }
            let numel = numel(&chunks[0].shape).expect("checked above");
            chunks.sort_by_key(|chunk| chunk.start);
            let mut covered = 0;
            for chunk in chunks {
                if chunk.start != covered {
                    let what = if chunk.start < covered { "overlap" } else { "leave a hole" };
                    return bad(format!("they {what} at element {}", chunk.start.min(covered)));
                }
                covered = chunk.end();
            }
            if covered != numel {
                return bad(format!("they cover {covered} of {numel} elements"));
            }
        }
        Ok(())
    }
}
