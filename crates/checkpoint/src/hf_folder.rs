//! Reads a Hugging Face model folder: `model.safetensors`, or `model.safetensors.index.json` and its files.
//!
//! Opening reads headers only. After that a rank reads exactly the elements it owns.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Deserialize;

use crate::elements;
pub use crate::elements::Dtype;
use crate::error::{CheckpointError, Result, summarize};
use crate::unique_map::UniqueMap;
use crate::{durable, header};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 100_000_000;
/// More than any model has; each is kept open.
const MAX_FILES: usize = 10_000;

/// An open model folder. Its files stay open, so a folder replaced meanwhile does not mix in.
#[derive(Debug)]
pub struct ModelFolder {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Tensors of a dtype that cannot be read: refused only when asked for. Name to (file, dtype).
    unsupported: BTreeMap<String, (usize, String)>,
    header_bytes: u64,
    bytes_read: AtomicU64,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Which of the folder's files, for [`ModelFolder::file_path`].
    pub file: usize,
    /// From the start of that file.
    pub offset_bytes: u64,
    pub len_bytes: u64,
}

impl TensorInfo {
    pub fn numel(&self) -> usize {
        self.len_bytes as usize / self.dtype.size_bytes()
    }
}

impl ModelFolder {
    /// Opens the folder and reads the headers of all its files.
    ///
    /// # Errors
    /// No safetensors in it, or any header or index that is not exactly right.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut folder = ModelFolder {
            dir: dir.to_path_buf(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            unsupported: BTreeMap::new(),
            header_bytes: 0,
            bytes_read: AtomicU64::new(0),
        };
        // A dangling link counts as present: opening it then says what is wrong.
        let present = |name: &str| dir.join(name).symlink_metadata().is_ok();
        if present(SINGLE) {
            for tensor in folder.open_file(SINGLE)? {
                folder.add(0, tensor);
            }
        } else if present(INDEX) {
            folder.open_index()?;
        } else {
            return Err(why_not_a_model(dir));
        }
        if folder.tensors.is_empty() {
            let reason = match folder.unsupported.iter().next() {
                Some((name, (_, dtype))) => {
                    format!("it holds no F32, F16 or BF16 tensor ({name} is {dtype}); convert the model first")
                }
                None => "its files hold no tensors".to_string(),
            };
            let path = dir.to_path_buf();
            return Err(CheckpointError::NotAModel { path, reason });
        }
        folder.bytes_read = AtomicU64::new(folder.header_bytes);
        Ok(folder)
    }

    fn open_index(&mut self) -> Result<()> {
        let path = self.dir.join(INDEX);
        let text = durable::read_text(&path, MAX_INDEX_BYTES)?;
        self.header_bytes += text.len() as u64;
        for (number, (name, wanted)) in parse_index(&text, &path)?.into_iter().enumerate() {
            self.check_stays_inside(&name, &wanted[0], &path)?;
            let mut found: HashMap<String, header::HeaderTensor> =
                self.open_file(&name)?.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
            for tensor in wanted {
                let Some(info) = found.remove(&tensor) else {
                    let (field, reason) = (format!("weight_map[{tensor:?}]"), format!("{name} holds no such tensor"));
                    return Err(CheckpointError::Json { path, field, reason });
                };
                self.add(number, info);
            }
        }
        Ok(())
    }

    /// No folder on the way to `file`, which the index names for `tensor`, is a link that leads out of the model folder. The
    /// file itself may be one, as in the caches of model hubs.
    fn check_stays_inside(&self, file: &str, tensor: &str, index: &Path) -> Result<()> {
        let folder = self.dir.join(Path::new(file).parent().unwrap_or(Path::new("")));
        match (self.dir.canonicalize(), folder.canonicalize()) {
            (Ok(dir), Ok(folder)) if !folder.starts_with(&dir) => {
                let reason =
                    format!("names {file:?}, which is in {} by a link, not inside the folder", folder.display());
                let field = format!("weight_map[{tensor:?}]");
                Err(CheckpointError::Json { path: index.to_path_buf(), field, reason })
            }
            // What is not there is said when it is opened.
            _ => Ok(()),
        }
    }

    /// Opens the next file and returns what its header describes.
    fn open_file(&mut self, name: &str) -> Result<Vec<header::HeaderTensor>> {
        let path = self.dir.join(name);
        let (file, file_bytes) = durable::open_regular(&path)?;
        let header = header::read(&file, file_bytes, &path)?;
        self.header_bytes += header.len_bytes;
        self.files.push((path, file));
        Ok(header.tensors)
    }

    fn add(&mut self, file: usize, tensor: header::HeaderTensor) {
        let header::HeaderTensor { name, dtype, shape, offset_bytes, len_bytes } = tensor;
        let dtype = match dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::BF16,
            other => {
                self.unsupported.insert(name, (file, format!("{other:?}")));
                return;
            }
        };
        let info = TensorInfo { name: name.clone(), dtype, shape, file, offset_bytes, len_bytes };
        self.tensors.insert(name, info);
    }

    /// A tensor that can be read, by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors that can be read, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// The path behind [`TensorInfo::file`].
    pub fn file_path(&self, file: usize) -> &Path {
        &self.files[file].0
    }

    /// Checks that every wanted tensor is there with its shape. Tensors that nobody wants are ignored.
    ///
    /// # Errors
    /// All problems in one message (the first ten in words).
    pub fn expect(&self, wanted: &[(String, Vec<usize>)]) -> Result<()> {
        let mut problems = Vec::new();
        for (name, shape) in wanted {
            if let Some(info) = self.tensors.get(name) {
                if info.shape != *shape {
                    let file = self.file_path(info.file).display();
                    let got = &info.shape;
                    problems.push(format!("tensor {name} in {file}: config.json implies shape {shape:?}, got {got:?}"));
                }
            } else if let Some((file, dtype)) = self.unsupported.get(name) {
                let file = self.file_path(*file).display();
                problems.push(format!("tensor {name} in {file} is {dtype}, expected F32, F16 or BF16"));
            } else {
                problems.push(format!("tensor {name} of shape {shape:?} is missing"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Mismatch { path: self.dir.clone(), problems: summarize(&problems) })
    }

    /// Elements `start_elem..start_elem + out.len()` of the flattened tensor as f32.
    ///
    /// Reads exactly those bytes of the file.
    pub fn read_f32(&self, name: &str, start_elem: usize, out: &mut [f32]) -> Result<()> {
        let Some(info) = self.tensors.get(name) else {
            return Err(match self.unsupported.get(name) {
                Some((file, dtype)) => CheckpointError::UnsupportedDtype {
                    path: self.file_path(*file).to_path_buf(),
                    tensor: name.to_string(),
                    got: dtype.clone(),
                },
                None => {
                    CheckpointError::Mismatch { path: self.dir.clone(), problems: format!("tensor {name} is missing") }
                }
            });
        };
        let (path, file) = &self.files[info.file];
        let end = start_elem.checked_add(out.len());
        if end.is_none_or(|end| end > info.numel()) {
            return Err(CheckpointError::Range {
                path: path.clone(),
                tensor: name.to_string(),
                start: start_elem,
                end: start_elem.saturating_add(out.len()),
                numel: info.numel(),
            });
        }
        let size = info.dtype.size_bytes();
        let offset_bytes = info.offset_bytes + (start_elem * size) as u64;
        elements::read_f32(file, info.dtype, offset_bytes, out).map_err(CheckpointError::io("read", path))?;
        self.bytes_read.fetch_add((out.len() * size) as u64, Relaxed);
        Ok(())
    }

    /// Bytes read so far: headers, index, and element ranges.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Relaxed)
    }

    /// Bytes of the headers and the index alone: what every rank has to read.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Bytes of all readable tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.len_bytes).sum()
    }

    /// The dtype that most bytes have: what `output.dtype = "auto"` means.
    pub fn dominant_dtype(&self) -> Dtype {
        let bytes = |dtype| -> u64 {
            let of_dtype = self.tensors.values().filter(|info| info.dtype == dtype);
            of_dtype.map(|info| info.len_bytes).sum()
        };
        let all = [Dtype::F32, Dtype::F16, Dtype::BF16];
        all.into_iter().max_by_key(|&dtype| bytes(dtype)).expect("three dtypes")
    }
}

/// The tensors of each file, from the text of `model.safetensors.index.json`. `path` is for the messages.
///
/// # Errors
/// It is no index, or names a file that may lie outside the folder.
pub fn parse_index(text: &str, path: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let bad = |field: String, reason: String| CheckpointError::Json { path: path.to_path_buf(), field, reason };
    let Index { weight_map: UniqueMap(weight_map) } =
        serde_json::from_str(text).map_err(|e| bad("weight_map".into(), e.to_string()))?;
    let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in weight_map {
        let inside = !file.is_empty() && Path::new(&file).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || !file.ends_with(".safetensors") {
            let reason =
                format!("names {file:?}, which is not a .safetensors file inside the folder; such an index is refused");
            return Err(bad(format!("weight_map[{tensor:?}]"), reason));
        }
        by_file.entry(file).or_default().push(tensor);
        if by_file.len() > MAX_FILES {
            return Err(bad("weight_map".into(), format!("names more than {MAX_FILES} files")));
        }
    }
    Ok(by_file)
}

/// The folder has neither file that it should have: says what it has instead.
fn why_not_a_model(dir: &Path) -> CheckpointError {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return CheckpointError::io("open model folder", dir)(error),
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let with = |suffixes: &[&str]| names.iter().find(|name| suffixes.iter().any(|suffix| name.ends_with(suffix)));
    let found = if let Some(name) = with(&[".safetensors"]) {
        format!("it has {name}; rename it to {SINGLE} or add the index")
    } else if let Some(name) = with(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]) {
        format!(
            "it has only {name}; pickle files can run code and are not read, convert the model to safetensors (save_pretrained in transformers does)"
        )
    } else {
        format!("it holds {} files and none of them is safetensors", names.len())
    };
    CheckpointError::NotAModel { path: dir.to_path_buf(), reason: format!("{SINGLE} or {INDEX} expected; {found}") }
}
