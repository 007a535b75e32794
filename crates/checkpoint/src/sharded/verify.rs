//! Comparing what is on disk with the digests, and each file with what it says of itself.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::Xxh3;

use super::manifest::{ChunkEntry, hex};
use super::reader::Checkpoint;
use crate::elements::BUFFER_BYTES;
use crate::error::{CheckpointError, Result};
use crate::header::{self, HeaderTensor};

impl Checkpoint {
    /// Compares a file, by its number in the manifest, with its digest, its pieces with theirs, and its header with the
    /// manifest. Reads all its bytes once.
    ///
    /// # Errors
    /// Which tensor and bytes are damaged.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn verify_file(&self, file: usize) -> Result<()> {
        let entry = &self.manifest().files[file];
        let mut file_digest = Xxh3::new();
        let chunks = || self.by_file[file].iter().map(|&i| &self.manifest().chunks[i]);
        let header_bytes = chunks().next().map_or(entry.len_bytes, |chunk| chunk.offset_bytes);
        let mut start = Vec::new();
        self.stream(file, 0, header_bytes, |bytes| {
            file_digest.update(bytes);
            start.extend_from_slice(bytes);
        })?;
        for chunk in chunks() {
            self.read_whole(chunk, |bytes| file_digest.update(bytes))?;
        }
        let got = hex(file_digest.digest128());
        if got != entry.digest {
            // Every piece is good.
            let (path, what, expected) = (self.file_path(file), "the header".to_string(), entry.digest.clone());
            return Err(CheckpointError::Digest { path, what, bytes: 0..header_bytes, expected, got });
        }
        self.check_header(file, &start).map_err(|reason| {
            let field = format!("files[{file}]");
            self.manifest_error(&field, format!("{} has that digest, but {reason}", entry.name))
        })
    }

    /// [`verify_file`](Self::verify_file) of each.
    pub fn verify_files(&self, files: impl IntoIterator<Item = usize>) -> Result<()> {
        files.into_iter().try_for_each(|file| self.verify_file(file))
    }

    /// Passes a piece to `visit` bit by bit, and compares its digest.
    pub(super) fn read_whole(&self, chunk: &ChunkEntry, visit: impl FnMut(&[u8])) -> Result<()> {
        let (start, end) = chunk.bytes();
        let got = self.stream(chunk.file, start, end, visit)?;
        if got == chunk.digest {
            return Ok(());
        }
        let (state, name) = (chunk.state.name(), &chunk.name);
        let what = format!("{state} of {name}, elements {}..{}", chunk.start, chunk.end());
        let (path, expected) = (self.file_path(chunk.file), chunk.digest.clone());
        Err(CheckpointError::Digest { path, what, bytes: start..end, expected, got })
    }

    /// Passes a range of a file to `visit` in order and returns its digest.
    fn stream(&self, file: usize, start: u64, end: u64, mut visit: impl FnMut(&[u8])) -> Result<String> {
        let handle = self.file(file)?;
        let mut buffer = vec![0; (end - start).min(BUFFER_BYTES as u64) as usize];
        let mut digest = Xxh3::new();
        let mut offset_bytes = start;
        while offset_bytes < end {
            let num = (end - offset_bytes).min(BUFFER_BYTES as u64) as usize;
            let bytes = &mut buffer[..num];
            handle.read_exact_at(bytes, offset_bytes).map_err(|error| self.read_error(file, error))?;
            self.add_bytes_read(num);
            digest.update(bytes);
            visit(bytes);
            offset_bytes += num as u64;
        }
        Ok(hex(digest.digest128()))
    }

    /// Compares what a file says of itself with the manifest, which could be of another save, or wrong about where
    /// pieces lie.
    fn check_header(&self, file: usize, start: &[u8]) -> std::result::Result<(), String> {
        let manifest = self.manifest();
        let path = self.file_path(file);
        let header = header::parse(start, manifest.files[file].len_bytes, &path).map_err(|error| error.to_string())?;
        let metadata: BTreeMap<String, String> = serde_json::from_str(header.metadata.as_deref().unwrap_or("{}"))
            .map_err(|e| format!("its metadata: {e}"))?;
        let expected = BTreeMap::from([
            ("save_id".to_string(), manifest.save_id.clone()),
            ("step".to_string(), manifest.step.to_string()),
            ("rank".to_string(), file.to_string()),
            ("world_size".to_string(), manifest.world_size.to_string()),
        ]);
        for (key, wanted) in &expected {
            let got = metadata.get(key).map_or("none", |value| value);
            if got != wanted {
                return Err(format!("its {key} is {got}, expected {wanted}"));
            }
        }
        let chunks = &self.by_file[file];
        if header.tensors.len() != chunks.len() {
            return Err(format!("it has {} pieces, expected {}", header.tensors.len(), chunks.len()));
        }
        for (tensor, &i) in header.tensors.iter().zip(chunks) {
            let chunk = &manifest.chunks[i];
            let HeaderTensor { name, dtype, shape, offset_bytes, len_bytes } = tensor;
            let wanted = chunk.key();
            if (name, *dtype, shape.as_slice()) != (&wanted, safetensors::Dtype::F32, &[chunk.len]) {
                return Err(format!("it has {name} of {dtype:?} {shape:?}, expected {wanted} of F32 [{}]", chunk.len));
            }
            if (*offset_bytes, offset_bytes + len_bytes) != chunk.bytes() {
                return Err(format!("its {name} is at byte {offset_bytes}, expected {}", chunk.offset_bytes));
            }
        }
        Ok(())
    }
}
