//! Writes a Hugging Face model folder from all ranks at once.
//!
//! Rank 0 [`create`](Export::create)s a temporary folder with every file at its full size; after a barrier the
//! others [`open`](Export::open) it; each rank writes its own element ranges and [`sync`](Export::sync)s; after
//! another barrier rank 0 [`commit`](Export::commit)s by rename. The bytes depend on the weights only, not on
//! the number of ranks.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde_json::value::RawValue;

use crate::durable;
use crate::elements::{self, BUFFER_BYTES, Dtype};
use crate::error::{CheckpointError, Result};
use crate::fs::{Disk, FileSystem, FileToWrite};
use crate::header;
use crate::shape::numel;
use crate::unique_map::UniqueMap;

const CONFIG: &str = "config.json";
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// See [`is_side_file`].
const SIDE_FILES: [&str; 12] = [
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// The file belongs to a model folder besides its config and weights: tokenizer, generation settings, chat templates.
pub fn is_side_file(name: &str) -> bool {
    SIDE_FILES.contains(&name) || (name.starts_with("chat_template.") && !name.contains('/'))
}

/// Which tensor goes where: a pure function of names, shapes and dtype, the same on every rank.
#[derive(Debug, Clone)]
pub struct ExportLayout {
    dtype: Dtype,
    files: Vec<LayoutFile>,
    places: HashMap<String, Place>,
    /// The text of `model.safetensors.index.json`, if there is more than one file.
    index: Option<String>,
}

#[derive(Debug, Clone)]
struct LayoutFile {
    name: String,
    header: Vec<u8>,
    len_bytes: u64,
}

#[derive(Debug, Clone)]
struct Place {
    file: usize,
    /// From the start of the file.
    offset_bytes: u64,
    numel: usize,
}

impl ExportLayout {
    /// Tensors (name, shape) in model order, all written as `dtype`; a file holds at most `max_file_bytes` of
    /// data unless a single tensor is larger. One file is `model.safetensors`, several get an index.
    ///
    /// # Panics
    /// If a name occurs twice or there are no tensors.
    pub fn new(tensors: &[(String, Vec<usize>)], dtype: Dtype, max_file_bytes: u64) -> Self {
        assert!(!tensors.is_empty(), "nothing to export");
        let len_bytes = |shape: &[usize]| (numel(shape).expect("a shape that fits memory") * dtype.size_bytes()) as u64;
        let mut groups: Vec<&[(String, Vec<usize>)]> = Vec::new();
        let (mut first, mut group_bytes, mut total_bytes) = (0, 0, 0);
        for (i, (_, shape)) in tensors.iter().enumerate() {
            if i > first && group_bytes + len_bytes(shape) > max_file_bytes {
                groups.push(&tensors[first..i]);
                (first, group_bytes) = (i, 0);
            }
            group_bytes += len_bytes(shape);
            total_bytes += len_bytes(shape);
        }
        groups.push(&tensors[first..]);

        let header_dtype = match dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
        };
        // transformers refuses files without this mark.
        let metadata = BTreeMap::from([("format", "pt".to_string())]);
        let (mut files, mut places) = (Vec::new(), HashMap::new());
        for (file, group) in groups.iter().enumerate() {
            let name = match groups.len() {
                1 => "model.safetensors".to_string(),
                n => format!("model-{:05}-of-{n:05}.safetensors", file + 1),
            };
            let described = group.iter().map(|(name, shape)| (name.clone(), header_dtype, shape.clone()));
            let header = header::encode(&metadata, described);
            let mut offset_bytes = header.len() as u64;
            for (tensor, shape) in *group {
                let numel = numel(shape).expect("counted above");
                let old = places.insert(tensor.clone(), Place { file, offset_bytes, numel });
                assert!(old.is_none(), "{tensor} occurs twice in the export");
                offset_bytes += len_bytes(shape);
            }
            files.push(LayoutFile { name, header, len_bytes: offset_bytes });
        }

        let index = (files.len() > 1).then(|| {
            let weight_map: BTreeMap<&str, &str> =
                places.iter().map(|(tensor, place)| (tensor.as_str(), files[place.file].name.as_str())).collect();
            let index = serde_json::json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
            serde_json::to_string_pretty(&index).expect("plain data is JSON") + "\n"
        });
        ExportLayout { dtype, files, places, index }
    }

    /// Bytes of all safetensors files.
    pub fn len_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len_bytes).sum()
    }
}

/// A model folder being written, under a temporary name beside its final one.
#[derive(Debug)]
pub struct Export<F: FileSystem = Disk> {
    fs: F,
    layout: ExportLayout,
    final_dir: PathBuf,
    temp_dir: PathBuf,
    files: Vec<F::File>,
    buffer: Vec<u8>,
}

impl Export {
    /// Rank 0, first: the temporary folder with headers, reserved space, index, `config.json` (its dtype set to
    /// the one written, the rest kept byte for byte) and the tokenizer and generation files of `source_dir`.
    /// What an earlier export left unfinished is removed.
    ///
    /// # Errors
    /// Too little space, an unreadable source or an unwritable target; the temporary folder is then removed.
    pub fn create(layout: &ExportLayout, final_dir: &Path, source_dir: &Path) -> Result<Export> {
        Self::create_on(&Disk, layout, final_dir, source_dir)
    }

    /// Every other rank, after rank 0's [`Export::create`] and a barrier.
    pub fn open(layout: &ExportLayout, final_dir: &Path) -> Result<Export> {
        Self::open_on(&Disk, layout, final_dir)
    }
}

impl<F: FileSystem> Export<F> {
    /// See [`Export::create`]. The source is read from the disk.
    pub fn create_on(fs: &F, layout: &ExportLayout, final_dir: &Path, source_dir: &Path) -> Result<Self> {
        let temp_dir = beside(final_dir, "tmp");
        durable::create_dir_all(fs, &durable::parent(final_dir))?;
        let trash = beside(final_dir, "trash");
        if !durable::exists(fs, final_dir)? && durable::exists(fs, &trash)? {
            // A commit was interrupted where two folders cannot change places at once: the older export is still whole.
            durable::rename(fs, &trash, final_dir)?;
        }
        durable::remove_dir_all(fs, &trash)?;
        durable::remove_dir_all(fs, &temp_dir)?;
        durable::create_dir_all(fs, &temp_dir)?;
        match fill(fs, layout, &temp_dir, source_dir) {
            Ok(files) => Ok(Self::with_files(fs, layout, final_dir, temp_dir, files)),
            Err(error) => {
                let _ = durable::remove_dir_all(fs, &temp_dir);
                Err(error)
            }
        }
    }

    /// See [`Export::open`].
    pub fn open_on(fs: &F, layout: &ExportLayout, final_dir: &Path) -> Result<Self> {
        let temp_dir = beside(final_dir, "tmp");
        let mut files = Vec::new();
        for file in &layout.files {
            let path = temp_dir.join(&file.name);
            files.push(fs.open_to_write(&path).map_err(CheckpointError::io("open for writing", &path))?);
        }
        Ok(Self::with_files(fs, layout, final_dir, temp_dir, files))
    }

    fn with_files(fs: &F, layout: &ExportLayout, final_dir: &Path, temp_dir: PathBuf, files: Vec<F::File>) -> Self {
        let (layout, final_dir) = (layout.clone(), final_dir.to_path_buf());
        Export { fs: fs.clone(), layout, final_dir, temp_dir, files, buffer: Vec::new() }
    }

    /// Writes elements `start_elem..start_elem + values.len()` of the flattened tensor, rounded to nearest even.
    ///
    /// # Errors
    /// A failed write, or a finite value that the dtype cannot hold.
    ///
    /// # Panics
    /// If the layout has no such tensor or elements.
    pub fn write_f32(&mut self, name: &str, start_elem: usize, values: &[f32]) -> Result<()> {
        let place = self.layout.places.get(name).expect("a tensor of the layout");
        assert!(start_elem + values.len() <= place.numel, "{name} has {} elements", place.numel);
        let dtype = self.layout.dtype;
        let size = dtype.size_bytes();
        let path = || self.temp_dir.join(&self.layout.files[place.file].name);
        let mut element = start_elem;
        for part in values.chunks(BUFFER_BYTES / size) {
            elements::encode(dtype, part, &mut self.buffer).map_err(|i| CheckpointError::Overflow {
                path: path(),
                tensor: name.to_string(),
                element: element + i,
                value: part[i],
                dtype,
            })?;
            let offset_bytes = place.offset_bytes + (element * size) as u64;
            let needed_bytes = self.layout.files[place.file].len_bytes;
            self.files[place.file]
                .write_all_at(&self.buffer, offset_bytes)
                .map_err(|error| durable::write_error(&self.fs, "write", &path(), needed_bytes, error))?;
            element += part.len();
        }
        Ok(())
    }

    /// Puts on disk what this rank wrote: every rank, before the barrier that precedes the commit.
    pub fn sync(&self) -> Result<()> {
        for (file, described) in self.files.iter().zip(&self.layout.files) {
            let path = self.temp_dir.join(&described.name);
            let failed = |error| durable::write_error(&self.fs, "fsync", &path, described.len_bytes, error);
            file.sync().map_err(failed)?;
        }
        Ok(())
    }

    /// Rank 0, after every rank's [`Export::sync`] and a barrier: gives the folder its final name. An older folder of
    /// that name is there until then, and removed afterwards; at no moment is there none.
    pub fn commit(self) -> Result<()> {
        self.sync()?;
        let fs = &self.fs;
        durable::sync_dir(fs, &self.temp_dir)?;
        let parent = durable::parent(&self.final_dir);
        if !durable::exists(fs, &self.final_dir)? {
            durable::rename(fs, &self.temp_dir, &self.final_dir)?;
            return durable::sync_dirs_from(fs, &parent);
        }
        let old = match fs.exchange(&self.temp_dir, &self.final_dir) {
            Ok(()) => self.temp_dir,
            Err(error) if is_unsupported(&error) => {
                let trash = beside(&self.final_dir, "trash");
                durable::rename(fs, &self.final_dir, &trash)?;
                durable::rename(fs, &self.temp_dir, &self.final_dir)?;
                trash
            }
            Err(error) => return Err(CheckpointError::io("exchange", &self.final_dir)(error)),
        };
        durable::sync_dirs_from(fs, &parent)?;
        // Committed: an old folder that cannot be removed now goes with the next export.
        let _ = durable::remove_dir_all(fs, &old);
        Ok(())
    }
}

/// Network file systems have no exchange, nor have old kernels.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP))
}

/// `out/hf` -> `out/.hf.<suffix>`
fn beside(final_dir: &Path, suffix: &str) -> PathBuf {
    let name = final_dir.file_name().expect("the export folder has a name");
    final_dir.with_file_name(format!(".{}.{suffix}", name.to_string_lossy()))
}

fn fill<F: FileSystem>(fs: &F, layout: &ExportLayout, temp_dir: &Path, source_dir: &Path) -> Result<Vec<F::File>> {
    let source_config = source_dir.join(CONFIG);
    let config = durable::read_text(&source_config, MAX_CONFIG_BYTES)?;
    let config = with_dtype(&config, &source_config, layout.dtype)?;
    durable::write_new(fs, &temp_dir.join(CONFIG), config.as_bytes())?;
    if let Some(index) = &layout.index {
        durable::write_new(fs, &temp_dir.join("model.safetensors.index.json"), index.as_bytes())?;
    }

    let entries = std::fs::read_dir(source_dir).map_err(CheckpointError::io("list", source_dir))?;
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", source_dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if is_side_file(&name) {
            let content = std::fs::read(entry.path()).map_err(CheckpointError::io("read", &entry.path()))?;
            durable::write_new(fs, &temp_dir.join(&*name), &content)?;
        }
    }

    let mut files = Vec::new();
    for described in &layout.files {
        let path = temp_dir.join(&described.name);
        let file = durable::create_reserved(fs, &path, described.len_bytes)?;
        let failed = |error| durable::write_error(fs, "write", &path, described.len_bytes, error);
        file.write_all_at(&described.header, 0).map_err(failed)?;
        files.push(file);
    }
    Ok(files)
}

/// The text of a `config.json` with its dtype replaced, every other byte as it was. transformers 5 says `dtype`,
/// earlier ones `torch_dtype` (which 5 still reads, so that is what a config with neither gets).
fn with_dtype(text: &str, path: &Path, dtype: Dtype) -> Result<String> {
    let UniqueMap(entries) = serde_json::from_str::<UniqueMap<&RawValue>>(text).map_err(|e| CheckpointError::Json {
        path: path.to_path_buf(),
        field: "config".into(),
        reason: e.to_string(),
    })?;
    let quoted = format!("\"{}\"", dtype.torch_name());
    let mut edited = text.to_string();
    // From the back, so that earlier positions stay right.
    for (_, value) in entries.iter().rev().filter(|(key, _)| key == "dtype" || key == "torch_dtype") {
        let start = value.get().as_ptr().addr() - text.as_ptr().addr();
        edited.replace_range(start..start + value.get().len(), &quoted);
    }
    if !entries.iter().any(|(key, _)| key == "dtype" || key == "torch_dtype") {
        let comma = if entries.is_empty() { "" } else { "," };
        let brace = text.find('{').expect("a JSON object has a brace");
        edited.insert_str(brace + 1, &format!("\n  \"torch_dtype\": {quoted}{comma}"));
    }
    Ok(edited)
}
