//! Saving: every rank streams its pieces, rank 0 commits.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::manifest::{ChunkEntry, FileEntry, MANIFEST, Manifest, ManifestMeta, State, file_name, hex};
use super::retention::{dir_name, temp_name};
use crate::elements::{self, BUFFER_BYTES, Dtype};
use crate::error::{CheckpointError, Result};
use crate::fs::{Disk, FileSystem, FileToWrite};
use crate::shape::numel;
use crate::{durable, header};

/// A piece that this rank saves: elements `start..start + len` of a flattened logical tensor.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    pub state: State,
    pub name: &'a str,
    /// Of the whole tensor.
    pub shape: &'a [usize],
    pub start: usize,
    pub len: usize,
}

/// What a rank tells rank 0 about its finished file. Travels as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReport {
    pub save_id: String,
    pub step: u64,
    pub rank: usize,
    pub world_size: usize,
    pub file: FileEntry,
    pub chunks: Vec<ChunkEntry>,
}

/// Streams one rank's pieces into its file, taking digests on the way. May do so on a thread of its own.
pub struct ShardWriter<F: FileSystem = Disk> {
    fs: F,
    file: F::File,
    path: PathBuf,
    offset_bytes: u64,
    report: ShardReport,
    /// The piece being written and how many of its elements are.
    current: usize,
    written: usize,
    chunk_digest: Box<Xxh3>,
    file_digest: Box<Xxh3>,
    buffer: Vec<u8>,
}

impl<F: FileSystem> fmt::Debug for ShardWriter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardWriter")
            .field("path", &self.path)
            .field("current", &self.current)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl ShardWriter {
    /// Creates this rank's file with its whole space reserved. Empty pieces are left out.
    ///
    /// # Errors
    /// The step is already committed, the space is not there, the folder cannot be written.
    ///
    /// # Panics
    /// If `save_id` is not made of letters, digits, `-` and `_`, or a piece lies outside its tensor.
    pub fn create(
        root: &Path,
        step: u64,
        save_id: &str,
        rank: usize,
        world_size: usize,
        chunks: &[Chunk],
    ) -> Result<Self> {
        Self::create_on(&Disk, root, step, save_id, rank, world_size, chunks)
    }
}

impl<F: FileSystem> ShardWriter<F> {
    /// See [`ShardWriter::create`].
    pub fn create_on(
        fs: &F,
        root: &Path,
        step: u64,
        save_id: &str,
        rank: usize,
        world_size: usize,
        chunks: &[Chunk],
    ) -> Result<Self> {
        let final_dir = root.join(dir_name(step));
        if durable::exists(fs, &final_dir)? {
            return Err(CheckpointError::Exists { path: final_dir });
        }
        let temp_dir = root.join(temp_name(step, save_id));
        durable::create_dir_all(fs, &temp_dir)?;

        let metadata = [
            ("save_id", save_id.to_string()),
            ("step", step.to_string()),
            ("rank", rank.to_string()),
            ("world_size", world_size.to_string()),
        ];
        let mut entries = Vec::with_capacity(chunks.len());
        for chunk in chunks.iter().filter(|chunk| chunk.len > 0) {
            let end = chunk.start + chunk.len;
            assert!(numel(chunk.shape).is_some_and(|numel| end <= numel), "{} outside its tensor", chunk.name);
            entries.push(ChunkEntry {
                state: chunk.state,
                name: chunk.name.to_string(),
                shape: chunk.shape.to_vec(),
                dtype: Dtype::F32.to_string(),
                start: chunk.start,
                len: chunk.len,
                file: rank,
                offset_bytes: 0,
                digest: String::new(),
            });
        }
        let described = entries.iter().map(|entry| (entry.key(), safetensors::Dtype::F32, vec![entry.len]));
        let header = header::encode(&metadata.into(), described);
        let mut offset_bytes = header.len() as u64;
        for entry in &mut entries {
            entry.offset_bytes = offset_bytes;
            offset_bytes += entry.len_bytes();
        }
        let name = file_name(rank, world_size);
        let path = temp_dir.join(&name);
        let file = durable::create_reserved(fs, &path, offset_bytes)?;
        let mut writer = ShardWriter {
            fs: fs.clone(),
            file,
            path,
            offset_bytes: 0,
            report: ShardReport {
                save_id: save_id.to_string(),
                step,
                rank,
                world_size,
                file: FileEntry { name, len_bytes: offset_bytes, digest: String::new(), num_nonfinite: 0 },
                chunks: entries,
            },
            current: 0,
            written: 0,
            chunk_digest: Box::new(Xxh3::new()),
            file_digest: Box::new(Xxh3::new()),
            buffer: header,
        };
        writer.write_buffer()?;
        Ok(writer)
    }

    /// The next values of the pieces, in the declared order; calls need not end where pieces do.
    ///
    /// # Panics
    /// If there are more values than declared.
    pub fn write_f32(&mut self, mut values: &[f32]) -> Result<()> {
        while !values.is_empty() {
            let chunk = self.report.chunks.get_mut(self.current).expect("no more values than declared");
            let num = (chunk.len - self.written).min(values.len()).min(BUFFER_BYTES / Dtype::F32.size_bytes());
            let (part, rest) = values.split_at(num);
            elements::encode(Dtype::F32, part, &mut self.buffer).expect("every f32 is an f32");
            self.report.file.num_nonfinite += part.iter().filter(|value| !value.is_finite()).count() as u64;
            self.chunk_digest.update(&self.buffer);
            self.written += num;
            if self.written == chunk.len {
                chunk.digest = hex(self.chunk_digest.digest128());
                self.chunk_digest.reset();
                self.current += 1;
                self.written = 0;
            }
            self.write_buffer()?;
            values = rest;
        }
        Ok(())
    }

    fn write_buffer(&mut self) -> Result<()> {
        self.file_digest.update(&self.buffer);
        self.file.write_all_at(&self.buffer, self.offset_bytes).map_err(|error| self.failed("write", error))?;
        self.offset_bytes += self.buffer.len() as u64;
        Ok(())
    }

    fn failed(&self, op: &'static str, error: io::Error) -> CheckpointError {
        durable::write_error(&self.fs, op, &self.path, self.report.file.len_bytes, error)
    }

    /// Puts the file on disk.
    ///
    /// # Panics
    /// If values are missing.
    pub fn finish(mut self) -> Result<ShardReport> {
        assert_eq!(self.current, self.report.chunks.len(), "not all declared pieces were written");
        self.file.sync().map_err(|error| self.failed("fsync", error))?;
        self.report.file.digest = hex(self.file_digest.digest128());
        Ok(self.report)
    }
}

/// See [`commit`](super::commit).
pub fn commit_on<F: FileSystem>(
    fs: &F,
    root: &Path,
    step: u64,
    save_id: &str,
    reports: &[ShardReport],
    meta: ManifestMeta,
) -> Result<PathBuf> {
    let bad = |reason: String| CheckpointError::Reports { step, reason };
    let mut sorted: Vec<&ShardReport> = reports.iter().collect();
    sorted.sort_by_key(|report| report.rank);
    let (mut files, mut chunks) = (Vec::new(), Vec::new());
    for (rank, report) in sorted.into_iter().enumerate() {
        let got = (report.step, report.save_id.as_str(), report.rank, report.world_size);
        let expected = (step, save_id, rank, reports.len());
        if got != expected {
            return Err(bad(format!("a report is of (step, save, rank, world size) {got:?}, expected {expected:?}")));
        }
        files.push(report.file.clone());
        chunks.extend(report.chunks.iter().cloned());
    }
    let manifest = Manifest::new(step, save_id, meta, files, chunks);
    manifest.check().map_err(|(field, reason)| bad(format!("{field}: {reason}")))?;

    let temp_dir = root.join(temp_name(step, save_id));
    let final_dir = root.join(dir_name(step));
    if durable::exists(fs, &final_dir)? {
        return Err(CheckpointError::Exists { path: final_dir });
    }
    // What cannot be read again is not committed.
    let text = manifest.to_sealed_text();
    Manifest::parse(&text, &temp_dir.join(MANIFEST))?;
    durable::write_new(fs, &temp_dir.join(MANIFEST), text.as_bytes())?;
    durable::sync_dir(fs, &temp_dir)?;
    if let Err(error) = durable::rename(fs, &temp_dir, &final_dir) {
        // NFS may repeat a rename that it has done, and then report that it failed.
        if !is_of_save(fs, &final_dir, save_id) {
            return Err(error);
        }
    }
    durable::sync_dirs_from(fs, root)?;
    Ok(final_dir)
}

fn is_of_save<F: FileSystem>(fs: &F, dir: &Path, save_id: &str) -> bool {
    let path = dir.join(MANIFEST);
    let text = fs.read(&path).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    text.is_some_and(|text| Manifest::parse(&text, &path).is_ok_and(|manifest| manifest.save_id == save_id))
}
