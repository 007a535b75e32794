//! The header of a safetensors file: 8 bytes of length, a JSON object, then the data.
//!
//! Reading trusts nothing: lengths are compared with the real file before anything is allocated. Dtypes are those of
//! the `safetensors` crate.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::{CheckpointError, Result};
use crate::shape::{self, numel};
use crate::unique_map::UniqueMap;

const LENGTH_BYTES: u64 = 8;
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// One tensor's description; bounds the number of dimensions too.
const MAX_ENTRY_BYTES: usize = 4096;

/// What a safetensors file says of itself.
#[derive(Debug)]
pub struct Header {
    /// In file order; together they cover the data without gap or overlap.
    pub tensors: Vec<HeaderTensor>,
    /// The JSON text of `__metadata__`, not looked into.
    pub metadata: Option<String>,
    /// With the 8 bytes of length.
    pub len_bytes: u64,
}

#[derive(Debug)]
pub struct HeaderTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset_bytes: u64,
    pub len_bytes: u64,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    #[serde(deserialize_with = "shape::deserialize")]
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Reads and checks the header of `file`, which has `file_bytes` bytes.
pub(crate) fn read(file: &File, file_bytes: u64, path: &Path) -> Result<Header> {
    let mut length = [0; LENGTH_BYTES as usize];
    if file_bytes >= LENGTH_BYTES {
        file.read_exact_at(&mut length, 0).map_err(CheckpointError::io("read", path))?;
    }
    let len_bytes = LENGTH_BYTES + json_bytes(length, file_bytes, path)?;
    let mut start = vec![0; len_bytes as usize];
    file.read_exact_at(&mut start, 0).map_err(CheckpointError::io("read", path))?;
    parse(&start, file_bytes, path)
}

/// Checks the length of the JSON text before anything of it is read.
fn json_bytes(length: [u8; LENGTH_BYTES as usize], file_bytes: u64, path: &Path) -> Result<u64> {
    if file_bytes < LENGTH_BYTES {
        return Err(bad(path, "file", format!("only {file_bytes} bytes long")));
    }
    if &length == b"version " {
        let reason = "this is a Git LFS pointer, not the file; run `git lfs pull`";
        return Err(bad(path, "file", reason.to_string()));
    }
    let json_bytes = u64::from_le_bytes(length);
    if json_bytes > MAX_HEADER_BYTES {
        let reason = format!("{json_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed");
        return Err(bad(path, "header length", reason));
    }
    if json_bytes > file_bytes - LENGTH_BYTES {
        let reason = format!("{json_bytes} bytes, but the file has only {file_bytes}; truncated?");
        return Err(bad(path, "header length", reason));
    }
    Ok(json_bytes)
}

fn bad(path: &Path, field: &str, reason: String) -> CheckpointError {
    CheckpointError::Safetensors { path: path.to_path_buf(), field: field.to_string(), reason }
}

/// Checks a header without its file: `start` is how the file starts, at least with all of its header, `file_bytes` how
/// long it is. `path` is for the messages.
///
/// # Errors
/// Whatever is not exactly right. Memory is bounded by that of `start` and 64 MiB, whatever it says.
pub fn parse(start: &[u8], file_bytes: u64, path: &Path) -> Result<Header> {
    let bad = |field: &str, reason: String| bad(path, field, reason);
    let length = start.first_chunk().copied().unwrap_or_default();
    let json_bytes = json_bytes(length, file_bytes.min(start.len() as u64), path)?;
    let json = &start[LENGTH_BYTES as usize..][..json_bytes as usize];
    let json = std::str::from_utf8(json).map_err(|e| bad("header", format!("not UTF-8: {e}")))?;
    let UniqueMap(entries) = serde_json::from_str::<UniqueMap<&RawValue>>(json)
        .map_err(|e| bad("header", format!("not a JSON object of tensors: {e}")))?;

    let data_start = LENGTH_BYTES + json_bytes;
    let data_bytes = file_bytes - data_start;
    let mut metadata = None;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, raw) in entries {
        if name == "__metadata__" {
            metadata = Some(raw.get().to_string());
            continue;
        }
        let field = format!("tensor {name:?}");
        let bad = |reason| bad(&field, reason);
        if raw.get().len() > MAX_ENTRY_BYTES {
            let reason = format!("described by more than {MAX_ENTRY_BYTES} bytes");
            return Err(bad(reason));
        }
        let raw: RawTensor = serde_json::from_str(raw.get()).map_err(|e| bad(e.to_string()))?;
        let (start, end) = raw.data_offsets;
        if start > end || end > data_bytes {
            let reason =
                format!("data_offsets {start}..{end}, but the file holds {data_bytes} bytes of data; truncated?");
            return Err(bad(reason));
        }
        let len_bytes = numel(&raw.shape)
            .and_then(|n| n.checked_mul(raw.dtype.bitsize()))
            .filter(|bits| bits % 8 == 0)
            .map(|bits| bits as u64 / 8);
        if len_bytes != Some(end - start) {
            let (dtype, shape) = (raw.dtype, &raw.shape);
            let needs = len_bytes.map_or("an impossible number of".into(), |n| n.to_string());
            let reason = format!(
                "shape {shape:?} of {dtype:?} needs {needs} bytes, data_offsets {start}..{end} give {}",
                end - start
            );
            return Err(bad(reason));
        }
        tensors.push(HeaderTensor {
            name,
            dtype: raw.dtype,
            shape: raw.shape,
            offset_bytes: data_start + start,
            len_bytes: end - start,
        });
    }

    tensors.sort_by_key(|tensor| (tensor.offset_bytes, tensor.len_bytes));
    let mut expected = data_start;
    for tensor in &tensors {
        if tensor.offset_bytes != expected {
            let what = if tensor.offset_bytes < expected {
                "overlaps the tensor before it"
            } else {
                "leaves a hole before it"
            };
            let reason = format!(
                "starts at byte {} of the data, expected {}: it {what}",
                tensor.offset_bytes - data_start,
                expected - data_start
            );
            return Err(bad(&format!("tensor {:?}", tensor.name), reason));
        }
        expected += tensor.len_bytes;
    }
    if expected != file_bytes {
        let reason = format!("{} bytes follow the last tensor", file_bytes - expected);
        return Err(bad("file", reason));
    }
    Ok(Header { tensors, metadata, len_bytes: data_start })
}

/// A header for tensors that follow each other, in the order given, padded to a multiple of 8 bytes.
/// The bytes depend on the arguments only.
pub(crate) fn encode(
    metadata: &BTreeMap<&str, String>,
    tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    object.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut start = 0;
    for (name, dtype, shape) in tensors {
        let bits = numel(&shape).and_then(|n| n.checked_mul(dtype.bitsize()));
        let end = start + bits.expect("a tensor that fits a file") / 8;
        let info = TensorInfo { dtype, shape, data_offsets: (start, end) };
        let info = serde_json::to_value(info).expect("plain data is JSON");
        let old = object.insert(name, info);
        assert!(old.is_none(), "two tensors of one name in a header");
        start = end;
    }
    let mut json = serde_json::to_vec(&object).expect("a map with text keys is JSON");
    json.resize(json.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}
