//! Reading model folders: values, byte counts, what is said when tensors do not fit.

mod fixture;

use std::fs;
use std::path::Path;

use fixture::*;
use fsdp_checkpoint::hf_folder::{Dtype, ModelFolder};
use safetensors::Dtype as FileDtype;

/// The model in two files and an index.
fn write_indexed(dir: &Path, dtype: FileDtype) {
    let tensors = model();
    let (a, b) = tensors.split_at(6);
    write_safetensors(&dir.join("model-00001-of-00002.safetensors"), dtype, a, 0);
    write_safetensors(&dir.join("model-00002-of-00002.safetensors"), dtype, b, a.len());
    let mut weight_map = serde_json::Map::new();
    for (i, (name, _)) in tensors.iter().enumerate() {
        let file = if i < a.len() { 1 } else { 2 };
        weight_map.insert(name.clone(), format!("model-{file:05}-of-00002.safetensors").into());
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn any_range_of_any_dtype_reads_as_f32_from_one_file_or_several() {
    let dtypes = [(FileDtype::F32, Dtype::F32), (FileDtype::F16, Dtype::F16), (FileDtype::BF16, Dtype::BF16)];
    for (file_dtype, dtype) in dtypes {
        for indexed in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            if indexed {
                write_indexed(dir.path(), file_dtype);
            } else {
                write_safetensors(&dir.path().join("model.safetensors"), file_dtype, &model(), 0);
            }
            let folder = ModelFolder::open(dir.path()).unwrap();
            folder.expect(&model()).unwrap();
            assert_eq!(folder.dominant_dtype(), dtype);
            for (i, (name, shape)) in model().iter().enumerate() {
                let whole = values(i, shape);
                for (start, end) in [(0, whole.len()), (1, 1), (whole.len() / 3, whole.len() / 2), (5, 23)] {
                    let mut out = vec![f32::NAN; end - start];
                    folder.read_f32(name, start, &mut out).unwrap();
                    assert_eq!(out, whole[start..end], "{name} {start}..{end}");
                }
            }
        }
    }
}

#[test]
fn ranges_larger_than_the_buffer_read_right() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = vec![("big".to_string(), vec![700, 1001])];
    write_safetensors(&dir.path().join("model.safetensors"), FileDtype::BF16, &tensors, 3);
    let folder = ModelFolder::open(dir.path()).unwrap();
    let mut out = vec![0.0; 700 * 1001 - 1];
    folder.read_f32("big", 1, &mut out).unwrap();
    assert_eq!(out, values(3, &[700, 1001])[1..]);
}

#[test]
fn a_rank_reads_headers_and_its_share_of_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    write_indexed(dir.path(), FileDtype::BF16);
    for world_size in 1..=4 {
        let mut data_bytes = 0;
        for rank in 0..world_size {
            let folder = ModelFolder::open(dir.path()).unwrap();
            for (tensor, start, len) in shard(&model(), rank, world_size) {
                folder.read_f32(&model()[tensor].0, start, &mut vec![0.0; len]).unwrap();
            }
            let limit = folder.header_bytes() as f64 + folder.total_bytes() as f64 / world_size as f64 * 1.05;
            assert!(folder.bytes_read() as f64 <= limit, "rank {rank} of {world_size} read {}", folder.bytes_read());
            data_bytes += folder.bytes_read() - folder.header_bytes();
        }
        let total: usize = model().iter().map(|(_, shape)| 2 * numel(shape)).sum();
        assert_eq!(data_bytes, total as u64, "all ranks together read each byte once");
    }
}

#[test]
fn what_does_not_fit_the_model_is_listed_with_file_expected_and_got() {
    let dir = tempfile::tempdir().unwrap();
    let view = |dtype, len| safetensors::tensor::TensorView::new(dtype, vec![4], &[0; 32][..len]).unwrap();
    let tensors = [("ids", view(FileDtype::I64, 32)), ("norm", view(FileDtype::F32, 16))];
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();

    folder.expect(&[("norm".into(), vec![4])]).unwrap();
    let wanted = [("norm".to_string(), vec![2, 2]), ("ids".into(), vec![4]), ("head".into(), vec![3, 4])];
    let message = folder.expect(&wanted).unwrap_err().to_string();
    for part in ["norm", "model.safetensors", "[2, 2]", "[4]", "ids", "I64", "head", "[3, 4] is missing"] {
        assert!(message.contains(part), "{part:?} not in {message}");
    }
    let many: Vec<Named> = (0..50).map(|i| (format!("layer.{i}"), vec![1])).collect();
    let message = folder.expect(&many).unwrap_err().to_string();
    assert!(message.contains("and 40 more") && message.lines().count() == 12, "{message}");

    let message = folder.read_f32("ids", 0, &mut [0.0]).unwrap_err().to_string();
    assert!(message.contains("ids is I64"), "{message}");
    let message = folder.read_f32("norm", 3, &mut [0.0; 2]).unwrap_err().to_string();
    assert!(message.contains("norm has 4 elements, elements 3..5"), "{message}");
}

#[test]
fn links_into_another_folder_work_as_in_the_hub_cache() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshot"));
    fs::create_dir(&blobs).unwrap();
    fs::create_dir(&snapshot).unwrap();
    write_indexed(&blobs, FileDtype::F32);
    for entry in fs::read_dir(&blobs).unwrap() {
        let name = entry.unwrap().file_name();
        std::os::unix::fs::symlink(Path::new("../blobs").join(&name), snapshot.join(&name)).unwrap();
    }
    ModelFolder::open(&snapshot).unwrap().expect(&model()).unwrap();
}
