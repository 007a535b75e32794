//! Exported folders: same bytes for any world size, readable by others, complete or absent.

mod fixture;

use std::fs;
use std::path::Path;

use fixture::*;
use fsdp_checkpoint::export::{Export, ExportLayout};
use fsdp_checkpoint::hf_folder::{Dtype, ModelFolder};
use safetensors::SafeTensors;

const CONFIG: &str = "{\n    \"rms_norm_eps\": 1e-05,  \"torch_dtype\":\"float32\",\n\t\"vocab_size\": 97\n}\n";

fn source(config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        fs::write(dir.path().join(name), format!("content of {name}")).unwrap();
    }
    for name in ["model.safetensors", "README.md", "optimizer.pt"] {
        fs::write(dir.path().join(name), "not copied").unwrap();
    }
    dir
}

fn export(layout: &ExportLayout, out: &Path, source: &Path, world_size: usize) {
    let tensors = model();
    let first = Export::create(layout, out, source).unwrap();
    let mut ranks = vec![first];
    ranks.extend((1..world_size).map(|_| Export::open(layout, out).unwrap()));
    for (rank, export) in ranks.iter_mut().enumerate() {
        for (tensor, start, len) in shard(&tensors, rank, world_size) {
            let (name, shape) = &tensors[tensor];
            export.write_f32(name, start, &values(tensor, shape)[start..start + len]).unwrap();
        }
        export.sync().unwrap();
    }
    ranks.swap_remove(0).commit().unwrap();
}

/// Every file of a folder with its content.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn the_bytes_depend_on_the_weights_only_and_the_safetensors_crate_reads_them() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for max_file_bytes in [5 << 30, 6000] {
            let layout = ExportLayout::new(&model(), dtype, max_file_bytes);
            let source = source(CONFIG);
            let mut first: Option<Vec<(String, Vec<u8>)>> = None;
            for world_size in 1..=4 {
                let out = tempfile::tempdir().unwrap();
                let hf = out.path().join("deep/hf");
                export(&layout, &hf, source.path(), world_size);
                let files = contents(&hf);
                assert_eq!(first.get_or_insert(files.clone()), &files, "world size {world_size}");

                let folder = ModelFolder::open(&hf).unwrap();
                folder.expect(&model()).unwrap();
                assert_eq!(folder.tensors().count(), model().len());
                assert_eq!(folder.dominant_dtype(), dtype);
            }
            let mut seen = 0;
            let mut bytes = 0;
            for (name, content) in first.unwrap() {
                if !name.ends_with(".safetensors") {
                    continue;
                }
                bytes += content.len() as u64;
                let (_, metadata) = SafeTensors::read_metadata(&content).unwrap();
                assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
                let file = SafeTensors::deserialize(&content).unwrap();
                for (name, view) in file.tensors() {
                    let i = model().iter().position(|(wanted, _)| *wanted == name).unwrap();
                    assert_eq!(view.shape(), model()[i].1);
                    assert_eq!(view.data(), bytes_of(view.dtype(), &values(i, view.shape())));
                    seen += 1;
                }
            }
            assert_eq!(seen, model().len());
            assert_eq!(bytes, layout.len_bytes());
        }
    }
}

#[test]
fn several_files_are_numbered_and_indexed() {
    let (source, out) = (source(CONFIG), tempfile::tempdir().unwrap());
    let hf = out.path().join("hf");
    export(&ExportLayout::new(&model(), Dtype::BF16, 6000), &hf, source.path(), 2);
    let names: Vec<String> = contents(&hf).into_iter().map(|(name, _)| name).collect();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    let index = fs::read_to_string(hf.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    let total: usize = model().iter().map(|(_, shape)| 2 * numel(shape)).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), model().len());
    assert_eq!(index["weight_map"]["model.norm.weight"], "model-00004-of-00004.safetensors");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn the_config_changes_in_its_dtype_only() {
    let cases = [
        (CONFIG, CONFIG.replace("\"float32\"", "\"bfloat16\"")),
        (r#"{"dtype": null, "a": {"dtype": "x"}}"#, r#"{"dtype": "bfloat16", "a": {"dtype": "x"}}"#.into()),
        (
            r#"{"torch_dtype":"float16","b":1.0e0,"dtype":"float16"}"#,
            r#"{"torch_dtype":"bfloat16","b":1.0e0,"dtype":"bfloat16"}"#.into(),
        ),
        (r#" {"a":1}"#, " {\n  \"torch_dtype\": \"bfloat16\",\"a\":1}".into()),
        ("{}", "{\n  \"torch_dtype\": \"bfloat16\"}".into()),
    ];
    for (config, expected) in cases {
        let (source, out) = (source(config), tempfile::tempdir().unwrap());
        let layout = ExportLayout::new(&model(), Dtype::BF16, 5 << 30);
        export(&layout, &out.path().join("hf"), source.path(), 1);
        let written = fs::read_to_string(out.path().join("hf/config.json")).unwrap();
        assert_eq!(written, expected);
        serde_json::from_str::<serde_json::Value>(&written).unwrap();
    }
    for config in ["", "[]", r#"{"a":1,"a":2}"#] {
        let (source, out) = (source(config), tempfile::tempdir().unwrap());
        let layout = ExportLayout::new(&model(), Dtype::BF16, 5 << 30);
        let error = Export::create(&layout, &out.path().join("hf"), source.path()).unwrap_err();
        assert!(error.to_string().contains("config.json: config: "), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left of a refused export");
    }
}

#[test]
fn values_round_to_nearest_even_and_none_becomes_infinite() {
    let tensors = [("w".to_string(), vec![4])];
    let (source, out) = (source(CONFIG), tempfile::tempdir().unwrap());
    let hf = out.path().join("hf");
    // bf16 has 8 significant bits: 257 and 259 lie half-way between neighbours.
    let layout = ExportLayout::new(&tensors, Dtype::BF16, 5 << 30);
    let mut export = Export::create(&layout, &hf, source.path()).unwrap();
    export.write_f32("w", 0, &[257.0, 259.0, f32::INFINITY, f32::NAN]).unwrap();
    export.commit().unwrap();
    let mut out_values = [0.0; 4];
    ModelFolder::open(&hf).unwrap().read_f32("w", 0, &mut out_values).unwrap();
    assert_eq!(out_values[..3], [256.0, 260.0, f32::INFINITY]);
    assert!(out_values[3].is_nan());

    for (dtype, value) in [(Dtype::F16, 70000.0), (Dtype::BF16, f32::MAX)] {
        let layout = ExportLayout::new(&tensors, dtype, 5 << 30);
        let mut export = Export::create(&layout, &hf, source.path()).unwrap();
        let error = export.write_f32("w", 1, &[1.0, value]).unwrap_err().to_string();
        assert!(error.contains(&format!("element 2 of tensor w is {value}, too large for {dtype}")), "{error}");
    }
}

#[test]
fn an_older_export_stays_until_the_commit_and_is_gone_after_it() {
    let (source, out) = (source(CONFIG), tempfile::tempdir().unwrap());
    let hf = out.path().join("hf");
    let layout = ExportLayout::new(&model(), Dtype::F32, 5 << 30);
    fs::create_dir(&hf).unwrap();
    fs::write(hf.join("old"), "old").unwrap();

    // A run that was killed before its commit.
    drop(Export::create(&layout, &hf, source.path()).unwrap());
    assert!(hf.join("old").exists());
    export(&layout, &hf, source.path(), 2);
    assert!(!hf.join("old").exists());
    ModelFolder::open(&hf).unwrap().expect(&model()).unwrap();
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "nothing temporary is left");

    // A model fine-tuned in place: the source is the folder that is replaced.
    export(&layout, &hf, &hf, 1);
    assert_eq!(fs::read_to_string(hf.join("tokenizer.json")).unwrap(), "content of tokenizer.json");
}
