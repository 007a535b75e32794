//! What is read of a model's files, and what the exported folder holds.

use std::collections::BTreeMap;

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::model::{self, Stored};
use safetensors::tensor::Dtype;
use serde_json::Value;

/// A rate at which fp32 weights stay as they are.
const STILL: &[&str] = &["--set", "optimizer.lr=1e-30", "--set", "training.steps=2"];

fn json(text: &str) -> BTreeMap<String, Value> {
    serde_json::from_str(text).unwrap()
}

/// Names, shapes, dtypes and, with weights that stand still, values are the source's; so are tokenizer and config.
#[test]
fn the_exported_folder_is_the_source_with_new_weights() {
    let tokenizer_files =
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];
    for (dtype, tied, is_sharded, nproc) in
        [(Dtype::F32, false, false, 2), (Dtype::BF16, true, true, 3), (Dtype::BF16, false, false, 1)]
    {
        let job = Job::new();
        if tied {
            job.replace("model/config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        }
        let source = model::tensors(&job.path("model"), dtype);
        assert_eq!(source.contains_key("lm_head.weight"), !tied);
        let mut files = source.clone();
        if tied {
            // As some tools write it, although it is the embedding again.
            files.insert("lm_head.weight".to_owned(), source["model.embed_tokens.weight"].clone());
        }
        std::fs::remove_file(job.path("model/model.safetensors")).unwrap();
        match is_sharded {
            true => model::write_sharded(&job.path("model"), &files),
            false => model::write(&job.path("model/model.safetensors"), &files),
        }
        for name in &tokenizer_files[1..] {
            job.write(&format!("model/{name}"), format!("{{\"of\": {name:?}}}"));
        }
        job.write("model/secret.txt", "no part of a model");
        job.finish(nproc, STILL);

        let exported = model::read(&job.path("out/hf"));
        assert!(exported.keys().eq(source.keys()), "{:?}", exported.keys());
        for (name, Stored { dtype, shape, bytes }) in &exported {
            assert_eq!((dtype, shape), (&source[name].dtype, &source[name].shape), "{name}");
            assert!(*bytes == source[name].bytes, "{name}: weights that stand still are the source's");
        }
        let files = job.exported();
        for name in tokenizer_files {
            assert_eq!(files[name], std::fs::read(job.path("model").join(name)).unwrap(), "{name}");
        }
        assert!(!files.contains_key("secret.txt"));
        let mut config = json(std::str::from_utf8(&files["config.json"]).unwrap());
        let name = if dtype == Dtype::F32 { "float32" } else { "bfloat16" };
        assert_eq!(config.insert("torch_dtype".into(), "float32".into()), Some(Value::from(name)));
        assert_eq!(config, json(&job.read("model/config.json")));
    }
}

#[test]
fn the_exported_dtype_can_be_chosen() {
    let job = Job::new();
    job.finish(2, &[STILL, &["--set", "output.dtype=bf16"]].concat());
    assert!(model::read(&job.path("out/hf")).values().all(|t| t.dtype == Dtype::BF16));
}

/// Training goes on from an exported model as from any other.
#[test]
fn an_exported_model_can_be_trained_again() {
    let job = Job::new();
    job.finish(2, &[]);
    let last = job.steps().last().unwrap()["loss"].as_f64().unwrap();
    std::fs::rename(job.path("out/hf"), job.path("model-2")).unwrap();
    std::fs::remove_dir_all(job.path("out")).unwrap();
    job.finish(3, &["--set", "model.path=model-2", "--set", "training.steps=1"]);
    let first = job.steps()[0]["loss"].as_f64().unwrap();
    assert!((first - last).abs() < 0.3 * last, "{first} after {last}");
}

/// Headers, and little more than its share of the rest.
#[test]
fn a_rank_reads_its_own_part_of_the_weights_only() {
    for is_sharded in [false, true] {
        let job = Job::new();
        job.replace("model/config.json", "\"hidden_size\": 16", "\"hidden_size\": 64");
        job.replace("model/config.json", "\"vocab_size\": 48", "\"vocab_size\": 500");
        let tensors = model::tensors(&job.path("model"), Dtype::F32);
        std::fs::remove_file(job.path("model/model.safetensors")).unwrap();
        match is_sharded {
            true => model::write_sharded(&job.path("model"), &tensors),
            false => model::write(&job.path("model/model.safetensors"), &tensors),
        }
        let total: u64 = tensors.values().map(|t| t.bytes.len() as u64).sum();
        let entries = std::fs::read_dir(job.path("model")).unwrap().map(|entry| entry.unwrap());
        let of_weights = entries.filter(|entry| entry.file_name().to_string_lossy().contains("model"));
        let headers = of_weights.map(|entry| entry.metadata().unwrap().len()).sum::<u64>() - total;
        for nproc in [1, 2, 4] {
            let _ = std::fs::remove_dir_all(job.path("out"));
            job.finish(nproc, STILL);
            let mut sum = 0;
            for rank in 0..nproc {
                let log = job.read(&format!("out/logs/rank-{rank}.log"));
                let line = log.lines().find(|line| line.contains("read ") && line.contains(" bytes of ")).unwrap();
                let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
                let &[read, of] = numbers.as_slice() else { panic!("{line}") };
                assert_eq!(of, total);
                let most = headers as f64 + total as f64 / nproc as f64 * 1.05;
                assert!(read as f64 <= most, "rank {rank} of {nproc} read {read} of {total} bytes, headers {headers}");
                sum += read - headers;
            }
            assert_eq!(sum, total, "together the ranks read every byte once");
        }
    }
}
