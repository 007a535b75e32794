//! Whole checkpoints that are not of the job that would go on from them: refused, with both values.

use std::path::Path;

use fsdp_checkpoint::sharded::Manifest;
use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::model;
use safetensors::tensor::Dtype;

use crate::tally::Tally;

const SAVED: &[&str] = &["--set", "training.steps=2", "--set", "checkpoint.every_steps=2"];
const LONGER: &[&str] = &["--set", "training.steps=4", "--set", "checkpoint.every_steps=2"];
const CHECKPOINT: &str = "out/checkpoints/step-00000002";

/// What is another than when the checkpoint was made.
#[derive(Debug)]
enum Now {
    /// A key of the config.
    Key(&'static str),
    /// Text of one of the job's files.
    Text { file: &'static str, from: &'static str, to: &'static str },
    /// Text of `config.json`, with weights that go with it.
    Model { from: &'static str, to: &'static str },
    /// The manifest, under a digest that is right.
    Manifest(fn(&mut Manifest)),
}

/// With what must be said of it: where, what was there, what is now.
const CASES: &[(Now, &[&str])] = &[
    (Now::Key("optimizer.lr=0.002"), &["[optimizer] lr", "0.001", "0.002"]),
    (Now::Key("optimizer.betas=[0.8, 0.99]"), &["[optimizer] betas", "0.9, 0.999", "0.8, 0.99"]),
    (Now::Key("optimizer.eps=1e-6"), &["[optimizer] eps", "0.00000001", "0.000001"]),
    (Now::Key("optimizer.weight_decay=0.1"), &["[optimizer] weight_decay", "0.01", "0.1"]),
    (Now::Key("lr_scheduler.kind=cosine"), &["[lr_scheduler] kind", "constant", "cosine"]),
    (Now::Key("lr_scheduler.warmup_steps=3"), &["[lr_scheduler] warmup_steps", "expected 0", "got 3"]),
    (Now::Key("training.seq_len=16"), &["[training] seq_len", "expected 8", "got 16"]),
    (Now::Key("training.max_grad_norm=0.5"), &["[training] max_grad_norm", "1.0", "0.5"]),
    (Now::Key("training.seed=7"), &["[training] seed", "expected 0", "got 7"]),
    (Now::Key("precision.param=fp32"), &["[precision] param", "bf16", "fp32"]),
    (Now::Key("precision.reduce=bf16"), &["[precision] reduce", "fp32", "bf16"]),
    (Now::Key("data.shuffle=false"), &["[data] shuffle", "true", "false"]),
    (Now::Key("data.train=[\"valid.jsonl\"]"), &["[data] train", "train.jsonl", "valid.jsonl"]),
    (Now::Text { file: "train.jsonl", from: "[11, ", to: "[12, " }, &["training data", "digest"]),
    (Now::Text { file: "model/tokenizer.json", from: "\"w7\": 7,", to: "\"v7\": 7," }, &["tokenizer", "digest"]),
    (
        Now::Model { from: "\"intermediate_size\": 24", to: "\"intermediate_size\": 32" },
        &["config.json", "intermediate_size: 24 then, 32 now"],
    ),
    (Now::Model { from: "\"vocab_size\": 48", to: "\"vocab_size\": 64" }, &["vocab_size: 48 then, 64 now"]),
    (
        Now::Model { from: "\"num_hidden_layers\": 2", to: "\"num_hidden_layers\": 3" },
        &["num_hidden_layers: 2 then, 3 now"],
    ),
    (
        Now::Model { from: "\"num_hidden_layers\": 2", to: "\"num_hidden_layers\": 1" },
        &["num_hidden_layers: 2 then, 1 now"],
    ),
    // Of the same shapes.
    (
        Now::Model { from: "\"rope_theta\": 10000.0", to: "\"rope_theta\": 500.0" },
        &["rope_theta: 10000.0 then, 500.0 now"],
    ),
    (Now::Model { from: "\"rms_norm_eps\": 1e-6", to: "\"rms_norm_eps\": 1e-3" }, &["rms_norm_eps"]),
    (
        Now::Model {
            from: "\"num_attention_heads\": 4, \"num_key_value_heads\": 2",
            to: "\"num_attention_heads\": 2, \"num_key_value_heads\": 1",
        },
        &["num_attention_heads: 4 then, 2 now"],
    ),
    (
        Now::Manifest(|manifest| manifest.chunks.iter_mut().for_each(|chunk| chunk.dtype = "F16".to_owned())),
        &["manifest.json", "F16", "F32"],
    ),
    (
        Now::Manifest(|manifest| manifest.chunks.iter_mut().for_each(|chunk| chunk.shape.reverse())),
        &["[24, 16]", "[16, 24]"],
    ),
    (Now::Manifest(|manifest| manifest.world_size = 3), &["manifest.json", "world_size", "3", "2 files"]),
];

/// Row 26: all cases, whatever `n` is.
pub fn refused(tally: &mut Tally, _n: usize) {
    let saved = Job::new();
    saved.finish(2, SAVED);
    for (now, says) in CASES {
        tally.check(format_args!("{now:?}, which must say {says:?}"), || {
            let job = Job::new();
            job.write("valid.jsonl", job.read("train.jsonl"));
            copy(&saved.path(CHECKPOINT), &job.path(CHECKPOINT));
            let mut args = LONGER.to_vec();
            match now {
                Now::Key(key) => args.extend(["--set", key]),
                Now::Text { file, from, to } => job.replace(file, from, to),
                Now::Model { from, to } => {
                    job.replace("model/config.json", from, to);
                    let tensors = model::tensors(&job.path("model"), Dtype::F32);
                    model::write(&job.path("model/model.safetensors"), &tensors);
                }
                Now::Manifest(edit) => {
                    let path = job.path(CHECKPOINT).join("manifest.json");
                    let text = job.read(&format!("{CHECKPOINT}/manifest.json"));
                    let mut manifest = Manifest::parse(&text, &path).expect("a manifest");
                    edit(&mut manifest);
                    std::fs::write(path, manifest.to_sealed_text()).expect("a file of the test");
                    args.extend(["--set", "checkpoint.resume=out/checkpoints/step-00000002"]);
                }
            }
            let ended = job.run(2, &args);
            assert_eq!(ended.status, 2, "{ended:?}");
            for part in *says {
                assert!(ended.stderr.contains(part), "{part:?} is not in {}", ended.stderr);
            }
            assert_eq!(job.checkpoints(), ["step-00000002"], "the checkpoint is left alone");
            assert_eq!(job.steps().len(), 0, "nothing is trained");
        });
    }
}

/// Copies the files of a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder of the test");
    for entry in std::fs::read_dir(from).expect("a readable folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
}
