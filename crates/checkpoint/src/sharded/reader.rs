//! Loading: exactly the wanted bytes, of checkpoints whose every byte was compared with its digest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::manifest::{ChunkEntry, Manifest, State};
use super::retention::parse_dir_name;
use crate::durable;
use crate::elements::{self, Dtype};
use crate::error::{CheckpointError, Result, summarize};
use crate::shape::numel;

/// A committed checkpoint, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    /// Chunks of each tensor by their first element; they tile it.
    by_tensor: BTreeMap<(State, String), Vec<usize>>,
    /// Chunks of each file by their first byte.
    pub(super) by_file: Vec<Vec<usize>>,
    /// The file read last: a checkpoint may have more of them than a process may have open.
    last_file: Mutex<Option<(usize, Arc<File>)>>,
    bytes_read: AtomicU64,
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
/// What is no damage (see [`CheckpointError::is_damage`]): it may pass, and then the newest is still the newest.
pub fn newest_valid(root: &Path) -> Result<Newest> {
    let mut skipped = Vec::new();
    for (step, path) in super::list(root)?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
            Err(reason) if reason.is_damage() => skipped.push(Skipped { step, path, reason }),
            Err(error) => return Err(error),
        }
    }
    Ok(Newest { checkpoint: None, skipped })
}

impl Checkpoint {
    /// Opens a checkpoint and validates it in full, in one process: see [`verify_file`](Self::verify_file).
    pub fn open(dir: &Path) -> Result<Self> {
        let checkpoint = Self::open_unread(dir)?;
        checkpoint.verify_files(0..checkpoint.manifest.files.len())?;
        Ok(checkpoint)
    }

    /// The same checks except those of the files' content: the manifest is whole, the pieces cover every tensor exactly
    /// once, every file is there with the right size. Ranks that load together open it so, verify some files each, and
    /// use it once every rank has found its files good.
    pub fn open_unread(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let mut by_tensor: BTreeMap<(State, String), Vec<usize>> = BTreeMap::new();
        for (i, chunk) in manifest.chunks.iter().enumerate() {
            by_tensor.entry((chunk.state, chunk.name.clone())).or_default().push(i);
        }
        for chunks in by_tensor.values_mut() {
            chunks.sort_by_key(|&i| manifest.chunks[i].start);
        }
        let checkpoint = Checkpoint {
            dir: dir.to_path_buf(),
            by_file: manifest.chunks_by_file(),
            manifest,
            by_tensor,
            last_file: Mutex::new(None),
            bytes_read: AtomicU64::new(0),
        };
        for file in 0..checkpoint.manifest.files.len() {
            checkpoint.check_size(file)?;
        }
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

    /// [`open_unread`](Self::open_unread) of a certain save.
    pub fn attach(dir: &Path, save_id: &str) -> Result<Self> {
        let checkpoint = Self::open_unread(dir)?;
        if checkpoint.manifest.save_id != save_id {
            let reason = format!("{:?}, expected {save_id:?}", checkpoint.manifest.save_id);
            return Err(checkpoint.manifest_error("save_id", reason));
        }
        Ok(checkpoint)
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

    /// Elements `start..start + out.len()` of a flattened tensor, from whichever files hold them. Reads exactly these
    /// bytes. Of a piece that is wanted as a whole, the digest is compared on the way.
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
            self.read_part(chunk, from - chunk.start..to - chunk.start, &mut out[from - start..to - start])?;
        }
        Ok(())
    }

    fn read_part(&self, chunk: &ChunkEntry, wanted: Range<usize>, out: &mut [f32]) -> Result<()> {
        if wanted == (0..chunk.len) {
            let mut num_done = 0;
            return self.read_whole(chunk, |bytes| {
                let num = bytes.len() / Dtype::F32.size_bytes();
                elements::decode(Dtype::F32, bytes, &mut out[num_done..num_done + num]);
                num_done += num;
            });
        }
        let offset_bytes = chunk.offset_bytes + (wanted.start * Dtype::F32.size_bytes()) as u64;
        elements::read_f32(&*self.file(chunk.file)?, Dtype::F32, offset_bytes, out)
            .map_err(|error| self.read_error(chunk.file, error))?;
        self.bytes_read.fetch_add((out.len() * Dtype::F32.size_bytes()) as u64, Relaxed);
        Ok(())
    }

    /// Bytes read of the ranks' files so far, by whatever method.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Relaxed)
    }

    pub(super) fn add_bytes_read(&self, num: usize) {
        self.bytes_read.fetch_add(num as u64, Relaxed);
    }

    pub(super) fn file(&self, file: usize) -> Result<Arc<File>> {
        let mut last = self.last_file.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((open, handle)) if *open == file => Ok(handle.clone()),
            _ => {
                let path = self.check_size(file)?;
                let handle = Arc::new(File::open(&path).map_err(CheckpointError::io("open", &path))?);
                *last = Some((file, handle.clone()));
                Ok(handle)
            }
        }
    }

    /// Checks that a file is there with its size, and returns its path.
    fn check_size(&self, file: usize) -> Result<PathBuf> {
        let path = self.file_path(file);
        let expected_bytes = self.manifest.files[file].len_bytes;
        match durable::unless_missing(path.metadata()) {
            Err(error) => Err(CheckpointError::io("open", &path)(error)),
            Ok(Some(found)) if found.is_file() && found.len() == expected_bytes => Ok(path),
            Ok(Some(found)) if found.is_file() => {
                Err(CheckpointError::FileSize { path, expected_bytes, got_bytes: found.len() })
            }
            Ok(_) => Err(CheckpointError::Missing { path }),
        }
    }

    pub(super) fn read_error(&self, file: usize, error: io::Error) -> CheckpointError {
        // A file that became shorter meanwhile is damaged.
        match self.check_size(file) {
            Err(damage) if error.kind() == io::ErrorKind::UnexpectedEof => damage,
            _ => CheckpointError::io("read", &self.file_path(file))(error),
        }
    }

    pub(super) fn file_path(&self, file: usize) -> PathBuf {
        self.dir.join(&self.manifest.files[file].name)
    }

    pub(super) fn manifest_error(&self, field: &str, reason: String) -> CheckpointError {
        CheckpointError::Manifest { path: self.dir.join(super::manifest::MANIFEST), field: field.to_string(), reason }
    }
}
