//! Loading: nothing is handed out that does not match its digest.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use xxhash_rust::xxh3::Xxh3;

use super::manifest::{ChunkEntry, Manifest, State, hex};
use super::retention::{list, parse_dir_name};
use crate::durable;
use crate::elements::{self, BUFFER_BYTES, Dtype, numel};
use crate::error::{CheckpointError, Result, summarize};

/// A committed checkpoint, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    files: Vec<File>,
    /// Chunks of each tensor by their first element; they tile it.
    by_tensor: BTreeMap<(State, String), Vec<usize>>,
    /// Per chunk: its digest has been compared.
    verified: Vec<AtomicBool>,
}

/// What [`newest_valid`] found.
#[derive(Debug)]
pub struct Newest {
    pub checkpoint: Option<Checkpoint>,
    /// Newer than that, and unusable: say so loudly, then [`set_aside`](super::set_aside).
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that did not validate.
#[derive(Debug)]
pub struct Skipped {
    pub step: u64,
    pub path: PathBuf,
    pub reason: CheckpointError,
}

/// The newest checkpoint under `root` that validates in full (see [`Checkpoint::open`]).
///
/// # Errors
/// Only if the root cannot be listed.
pub fn newest_valid(root: &Path) -> Result<Newest> {
    let mut skipped = Vec::new();
    for (step, path) in list(root)?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
            Err(reason) => skipped.push(Skipped { step, path, reason }),
        }
    }
    Ok(Newest { checkpoint: None, skipped })
}

impl Checkpoint {
    /// Opens a checkpoint and validates it in full: the manifest is whole, every file is there with the right size
    /// and digest, the pieces cover every tensor exactly once. Reads all its bytes, so one rank does it for all.
    pub fn open(dir: &Path) -> Result<Self> {
        let checkpoint = Self::open_unread(dir)?;
        for file in 0..checkpoint.files.len() {
            checkpoint.verify_file(file)?;
        }
        Ok(checkpoint)
    }

    /// For the other ranks once one has [`open`](Self::open)ed the checkpoint: the same checks except the digests of the
    /// files. The digest of a piece is compared when it is read.
    ///
    /// # Errors
    /// Also if this is not the save that the first rank saw.
    pub fn attach(dir: &Path, save_id: &str) -> Result<Self> {
        let checkpoint = Self::open_unread(dir)?;
        if checkpoint.manifest.save_id != save_id {
            let reason = format!("{:?}, rank 0 sees {save_id:?}", checkpoint.manifest.save_id);
            return Err(checkpoint.manifest_error("save_id", reason));
        }
        Ok(checkpoint)
    }

    /// Opens a checkpoint with all checks but the digests of its files; see [`Checkpoint::verify_files`].
    pub fn open_unread(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let mut files = Vec::with_capacity(manifest.files.len());
        for entry in &manifest.files {
            let path = dir.join(&entry.name);
            let (file, got_bytes) = durable::open_regular(&path)?;
            if got_bytes != entry.len_bytes {
                return Err(CheckpointError::FileSize { path, expected_bytes: entry.len_bytes, got_bytes });
            }
            files.push(file);
        }
        let mut by_tensor: BTreeMap<(State, String), Vec<usize>> = BTreeMap::new();
        for (i, chunk) in manifest.chunks.iter().enumerate() {
            by_tensor.entry((chunk.state, chunk.name.clone())).or_default().push(i);
        }
        for chunks in by_tensor.values_mut() {
            chunks.sort_by_key(|&i| manifest.chunks[i].start);
        }
        let checkpoint = Checkpoint {
            dir: dir.to_path_buf(),
            verified: manifest.chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            manifest,
            files,
            by_tensor,
        };
        // A folder under another name is the user's own copy; under a step's name it must be that step.
        let named = dir.file_name().and_then(|name| parse_dir_name(name.to_str()?));
        match named {
            Some(step) if step != checkpoint.manifest.step => {
                let reason = format!("{}, but the folder is named for step {step}", checkpoint.manifest.step);
                Err(checkpoint.manifest_error("step", reason))
            }
            _ => Ok(checkpoint),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Checks that the tensors of `state` are exactly the wanted ones.
    ///
    /// # Errors
    /// All problems in one message (the first ten in words): missing, of another shape, not wanted.
    pub fn expect(&self, state: State, wanted: &[(String, Vec<usize>)]) -> Result<()> {
        let mut saved: BTreeMap<&str, &[usize]> = self
            .by_tensor
            .iter()
            .filter(|((of, _), _)| *of == state)
            .map(|((_, name), chunks)| (name.as_str(), self.manifest.chunks[chunks[0]].shape.as_slice()))
            .collect();
        let state = state.name();
        let mut problems = Vec::new();
        for (name, shape) in wanted {
            match saved.remove(name.as_str()) {
                None => problems.push(format!("{state} of {name} is missing, shape {shape:?} expected")),
                Some(got) if got != shape => {
                    problems.push(format!("{state} of {name} has shape {got:?}, the model has {shape:?}"));
                }
                Some(_) => {}
            }
        }
        problems.extend(saved.keys().map(|name| format!("{state} of {name} is not part of the model")));
        if problems.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Mismatch { path: self.dir.clone(), problems: summarize(&problems) })
    }

    /// Elements `start..start + out.len()` of a flattened tensor, from whichever files hold them. A piece that is
    /// touched for the first time is read in full and compared with its digest.
    pub fn read_f32(&self, state: State, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let Some(chunks) = self.by_tensor.get(&(state, name.to_string())) else {
            let problems = format!("{} of {name} is missing", state.name());
            return Err(CheckpointError::Mismatch { path: self.dir.clone(), problems });
        };
        let numel = numel(&self.manifest.chunks[chunks[0]].shape).expect("checked on opening");
        let end = start.saturating_add(out.len());
        if end > numel {
            let (path, tensor) = (self.dir.clone(), format!("{} of {name}", state.name()));
            return Err(CheckpointError::Range { path, tensor, start, end, numel });
        }
        let first = chunks.partition_point(|&i| self.manifest.chunks[i].end() <= start);
        for &i in &chunks[first..] {
            let chunk = &self.manifest.chunks[i];
            if chunk.start >= end {
                break;
            }
            let (from, to) = (chunk.start.max(start), chunk.end().min(end));
            let part = &mut out[from - start..to - start];
            let inside = from - chunk.start..to - chunk.start;
            if self.verified[i].load(Relaxed) {
                let offset_bytes = chunk.offset_bytes + (inside.start * Dtype::F32.size_bytes()) as u64;
                elements::read_f32(&self.files[chunk.file], Dtype::F32, offset_bytes, part)
                    .map_err(CheckpointError::io("read", &self.file_path(chunk.file)))?;
            } else {
                self.read_verified(chunk, inside, part)?;
                self.verified[i].store(true, Relaxed);
            }
        }
        Ok(())
    }

    /// Streams a whole piece through its digest and keeps the elements `wanted` of it.
    fn read_verified(&self, chunk: &ChunkEntry, wanted: Range<usize>, out: &mut [f32]) -> Result<()> {
        let size = Dtype::F32.size_bytes() as u64;
        let bytes = chunk.offset_bytes..chunk.offset_bytes + chunk.len_bytes();
        let got = self.stream(chunk.file, bytes.clone(), |offset_bytes, piece| {
            let first = ((offset_bytes - chunk.offset_bytes) / size) as usize;
            let from = first.max(wanted.start);
            let to = (first + piece.len() / size as usize).min(wanted.end);
            if from < to {
                let piece = &piece[(from - first) * size as usize..(to - first) * size as usize];
                elements::decode(Dtype::F32, piece, &mut out[from - wanted.start..to - wanted.start]);
            }
        })?;
        if got == chunk.digest {
            return Ok(());
        }
        let (state, name) = (chunk.state.name(), &chunk.name);
        let what = format!("{state} of {name}, elements {}..{}", chunk.start, chunk.end());
        Err(self.digest_error(chunk.file, what, bytes, &chunk.digest, got))
    }

    /// Compares the digests of these files, by their index in the manifest.
    pub fn verify_files(&self, files: impl Iterator<Item = usize>) -> Result<()> {
        for file in files {
            self.verify_file(file)?;
        }
        Ok(())
    }

    fn verify_file(&self, file: usize) -> Result<()> {
        let entry = &self.manifest.files[file];
        let got = self.stream(file, 0..entry.len_bytes, |_, _| ())?;
        if got == entry.digest {
            return Ok(());
        }
        // Say which tensor it is, if it is one.
        for chunk in self.manifest.chunks.iter().filter(|chunk| chunk.file == file) {
            self.read_verified(chunk, 0..0, &mut [])?;
        }
        Err(self.digest_error(file, "the header".into(), 0..entry.len_bytes, &entry.digest, got))
    }

    /// Passes a range of a file to `visit` in pieces, each with its offset, and returns the range's digest.
    fn stream(&self, file: usize, bytes: Range<u64>, mut visit: impl FnMut(u64, &[u8])) -> Result<String> {
        let mut buffer = vec![0; (bytes.end - bytes.start).min(BUFFER_BYTES as u64) as usize];
        let mut digest = Xxh3::new();
        let mut offset_bytes = bytes.start;
        while offset_bytes < bytes.end {
            let num = (bytes.end - offset_bytes).min(BUFFER_BYTES as u64) as usize;
            let piece = &mut buffer[..num];
            self.files[file]
                .read_exact_at(piece, offset_bytes)
                .map_err(CheckpointError::io("read", &self.file_path(file)))?;
            digest.update(piece);
            visit(offset_bytes, piece);
            offset_bytes += num as u64;
        }
        Ok(hex(digest.digest128()))
    }

    fn file_path(&self, file: usize) -> PathBuf {
        self.dir.join(&self.manifest.files[file].name)
    }

    fn digest_error(
        &self,
        file: usize,
        what: String,
        bytes: Range<u64>,
        expected: &str,
        got: String,
    ) -> CheckpointError {
        CheckpointError::Digest { path: self.file_path(file), what, bytes, expected: expected.to_string(), got }
    }

    fn manifest_error(&self, field: &str, reason: String) -> CheckpointError {
        CheckpointError::Manifest { path: self.dir.join(super::manifest::MANIFEST), field: field.to_string(), reason }
    }
}
