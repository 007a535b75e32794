//! The tensors of an exported Hugging Face folder, and its bytes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use safetensors::{Dtype, SafeTensors};

/// A tensor in fp32.
#[derive(Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    /// In row-major order.
    pub values: Vec<f32>,
}

/// All tensors of the safetensors files in `folder`, which must be fp32.
pub fn read_tensors(folder: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (file, bytes) in read_files(folder)?.iter().filter(|(file, _)| file.ends_with(".safetensors")) {
        let parsed = SafeTensors::deserialize(bytes).with_context(|| file.clone())?;
        for (name, view) in parsed.tensors() {
            ensure!(view.dtype() == Dtype::F32, "{file}: {name} is {:?}, expected F32", view.dtype());
            let (values, _) = view.data().as_chunks::<4>();
            let values = values.iter().map(|&v| f32::from_le_bytes(v)).collect();
            let previous = tensors.insert(name.clone(), Tensor { shape: view.shape().to_vec(), values });
            ensure!(previous.is_none(), "{file}: {name} is in two files");
        }
    }
    Ok(tensors)
}

/// Name and bytes of all files in `folder`.
pub fn read_files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
    }
    Ok(files)
}
