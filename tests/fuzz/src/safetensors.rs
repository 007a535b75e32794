//! A model folder's weights and its index.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fsdp_checkpoint::header::{self, Header};
use fsdp_checkpoint::hf_folder::{ModelFolder, parse_index};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use crate::within::memory_bound;

const LENGTH_BYTES: usize = 8;
/// Longer files are not compared with the format's own library, which wants them in memory.
const MAX_COMPARED_BYTES: u64 = 1 << 20;

/// A folder in memory that goes when this value does.
pub(crate) fn scratch_folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let builder = tempfile::Builder::new().prefix("fsdp-fuzz-").to_owned();
    if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() }.expect("a temporary folder")
}

/// The beginning of a safetensors file, taken for all of it, and then for that of a file as long as its header says.
///
/// The tensors of an accepted file cover its data without overlap, each as long as its shape and data type say. The format's
/// own library accepts that file as well, unless for what is in `__metadata__`, and finds the same.
pub fn safetensors_header(data: &[u8]) {
    check_header(data, data.len() as u64);
    if let Some(num_bytes) = described_bytes(data).filter(|num_bytes| *num_bytes > data.len() as u64) {
        check_header(data, num_bytes);
    }
}

/// How long the file should be by its header, if that can be read at all.
fn described_bytes(data: &[u8]) -> Option<u64> {
    let (length, rest) = data.split_first_chunk::<LENGTH_BYTES>()?;
    let header_bytes = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let header: BTreeMap<String, Value> = serde_json::from_slice(rest.get(..header_bytes)?).ok()?;
    let end = header.values().filter_map(|tensor| tensor["data_offsets"].get(1)?.as_u64()).max()?;
    end.checked_add((LENGTH_BYTES + header_bytes) as u64)
}

fn check_header(data: &[u8], num_bytes: u64) {
    let path = Path::new("model/model.safetensors");
    match memory_bound(data.len(), || header::parse(data, num_bytes, path)) {
        Ok(header) => {
            let mut end = header.len_bytes;
            for tensor in &header.tensors {
                let numel: usize = tensor.shape.iter().product();
                let num_bits = numel.checked_mul(tensor.dtype.bitsize()).expect("bits of a file");
                assert_eq!(
                    (tensor.offset_bytes, Some(tensor.len_bytes * 8)),
                    (end, (num_bits as u64).into()),
                    "{tensor:?}"
                );
                end += tensor.len_bytes;
            }
            assert_eq!(end, num_bytes);
            if num_bytes <= MAX_COMPARED_BYTES {
                let mut whole = data.to_vec();
                whole.resize(num_bytes as usize, 0);
                compare_with_the_library(&whole, &header);
            }
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains("model/model.safetensors"), "no path in {message:?}");
        }
    }
}

fn compare_with_the_library(file: &[u8], header: &Header) {
    let metadata = header.metadata.as_deref().map(serde_json::from_str::<Option<BTreeMap<String, String>>>);
    if metadata.is_some_and(|metadata| metadata.is_err()) {
        return;
    }
    let (json_bytes, metadata) = SafeTensors::read_metadata(file).expect("what is accepted is a safetensors file");
    assert_eq!((LENGTH_BYTES + json_bytes) as u64, header.len_bytes);
    assert_eq!(metadata.tensors().len(), header.tensors.len());
    for tensor in &header.tensors {
        let info = metadata.info(&tensor.name).expect("a tensor of the file");
        let start = (tensor.offset_bytes - header.len_bytes) as usize;
        let expected = (tensor.dtype, &tensor.shape, (start, start + tensor.len_bytes as usize));
        assert_eq!((info.dtype, &info.shape, info.data_offsets), expected, "{}", tensor.name);
    }
}

/// The index of a folder in which two files of weights lie, one of them in a folder.
///
/// An accepted index names files by paths without steps up. Whatever it names, no file outside of the folder is opened, and
/// each tensor comes from the file that the index names for it.
pub fn safetensors_index(data: &[u8]) {
    thread_local! {
        static FOLDER: TempDir = folder_for_an_index();
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    FOLDER.with(|root| {
        let folder = root.path().join("model");
        let path = folder.join("model.safetensors.index.json");
        match memory_bound(data.len(), || parse_index(text, &path)) {
            Ok(by_file) => {
                let is_inside = |file: &String| {
                    let has_step_up = file.split('/').any(|part| part == "..");
                    !file.starts_with('/') && !has_step_up && file.ends_with(".safetensors")
                };
                assert!(by_file.keys().all(is_inside), "{by_file:?}");
                fs::write(&path, text).expect("a folder of the target");
                open(&folder, &by_file);
            }
            Err(error) => assert!(error.to_string().contains("model.safetensors.index.json"), "{error}"),
        }
    });
}

fn open(folder: &Path, by_file: &BTreeMap<String, Vec<String>>) {
    match ModelFolder::open(folder) {
        Ok(model) => {
            let inside = folder.canonicalize().expect("a folder of the target");
            for tensor in model.tensors() {
                let path = model.file_path(tensor.file);
                assert!(path.canonicalize().expect("an open file").starts_with(&inside), "{path:?}");
                let name = path.strip_prefix(folder).expect("a file of the folder").to_str().expect("UTF-8");
                assert!(by_file[name].contains(&tensor.name), "{tensor:?} from {name}");
            }
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(folder.to_str().expect("a path of the target")), "no path in {message:?}");
            assert!(!message.contains(OUTSIDE), "outside of the folder: {message}");
        }
    }
}

/// The name of a tensor that lies in files outside of the folder, and damages them.
const OUTSIDE: &str = "a tensor from outside";

fn folder_for_an_index() -> TempDir {
    let root = scratch_folder();
    let folder = root.path().join("model");
    fs::create_dir_all(folder.join("sub")).expect("a folder of the target");
    fs::create_dir(root.path().join("outside")).expect("a folder of the target");
    let file = |name: &str, num_bytes: usize| {
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.resize(bytes.len() + num_bytes, 0);
        bytes
    };
    fs::write(folder.join("m.safetensors"), file("a", 8)).expect("a folder of the target");
    fs::write(folder.join("sub/n.safetensors"), file("b", 8)).expect("a folder of the target");
    // Cut short, so that opening it shows in the message.
    let damaged = file(OUTSIDE, 4);
    for outside in ["o.safetensors", "m.safetensors", "outside/m.safetensors", "outside/o.safetensors"] {
        fs::write(root.path().join(outside), &damaged).expect("a folder of the target");
    }
    std::os::unix::fs::symlink("../outside", folder.join("link")).expect("a folder of the target");
    root
}
