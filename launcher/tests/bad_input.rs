//! Each bad input ends with status 2 and one clear message, before any rank starts.

mod job;

use std::collections::BTreeMap;
use std::process::Stdio;

use fsdp_checkpoint::sharded::{self, Chunk, ManifestMeta, ShardWriter, State};
use job::{Job, end};

/// A wrong change to a right job, the flags it is started with, and what the message must say.
type Case = (&'static str, fn(&Job), &'static [&'static str], &'static [&'static str]);

fn replace(job: &Job, name: &str, from: &str, to: &str) {
    let text = job.read(name);
    assert!(text.contains(from), "{name} has no {from}");
    job.write(name, text.replace(from, to));
}

fn nothing(_: &Job) {}

/// `model.safetensors` with its last `len` bytes cut off.
fn cut_weights(job: &Job, len: usize) {
    let bytes = std::fs::read(job.path("model/model.safetensors")).unwrap();
    job.write("model/model.safetensors", &bytes[..bytes.len() - len]);
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("no config", |job| std::fs::remove_file(job.path("job.toml")).unwrap(), &[],
        &["job.toml: expected a readable TOML config", "No such file"]),
    ("syntax", |job| replace(job, "job.toml", "lr = 1e-3", "lr = "), &[], &["job.toml:4:", "syntax error"]),
    ("unknown key", |job| replace(job, "job.toml", "seq_len = 8", "seq_len = 8\nlocal_batch_size = 2"), &[],
        &["job.toml:8:1: [training] local_batch_size", "[training] micro_batch_size"]),
    ("type", nothing, &["--set", "optimizer.lr=fast"], &["--set optimizer.lr=fast: [optimizer] lr", "above 0"]),
    ("range", |job| replace(job, "job.toml", "seq_len = 8", "seq_len = 0"), &[], &["job.toml:7:11: [training] seq_len"]),
    ("not built", nothing, &["--set", "activation_checkpointing.mode=selective"], &["[activation_checkpointing] mode", "not built yet"]),
    ("nodes", nothing, &["--nnodes", "0"], &["--nnodes", "expected a number of machines"]),
    ("node rank", nothing, &["--node-rank", "1"], &["--node-rank: expected 0"]),
    ("no node rank", nothing, &["--nnodes", "2"], &["--node-rank: expected 0 to 1 with --nnodes 2, got none"]),
    ("no master", nothing, &["--nnodes", "2", "--node-rank", "0"], &["--master-addr: expected the address of node 0"]),
    ("nccl by flag", nothing, &["--backend", "nccl"], &["[fsdp] backend: expected an NVIDIA GPU for \"nccl\", got none"]),
    ("nccl by config", nothing, &["--set", "fsdp.backend=nccl"], &["[fsdp] backend: ", "no /dev/nvidia0"]),
    ("cuda", nothing, &["--set", "fsdp.device=cuda"], &["[fsdp] device: expected an NVIDIA GPU for \"cuda\", got none"]),
    ("nccl on the CPU", nothing, &["--backend=nccl", "--set", "fsdp.device=cpu"], &["[fsdp] backend", "which is for GPUs"]),
    ("shards", nothing, &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=3"],
        &["[fsdp] shard_size: expected a divisor of the 2 ranks, got 3"]),
    ("flag", nothing, &["--nprocs", "2"], &["--nprocs"]),
    ("global batch", nothing, &["--set", "training.global_batch_size=3"], &["micro_batch_size x ranks = 1 x 2 = 2, got 3"]),
    ("no model", nothing, &["--set", "model.path=models/none/here"], &["[model] path", "models/none/here", "no such folder"]),
    ("model is a file", nothing, &["--set", "model.path=data.jsonl"], &["[model] path", "a file"]),
    ("no config.json", |job| std::fs::remove_file(job.path("model/config.json")).unwrap(), &[], &["model/config.json"]),
    ("architecture", |job| replace(job, "model/config.json", "LlamaForCausalLM", "GPT2LMHeadModel"), &[],
        &["model/config.json", "architectures", "GPT2LMHeadModel", "LlamaForCausalLM"]),
    ("no weights", |job| std::fs::remove_file(job.path("model/model.safetensors")).unwrap(), &[], &["model", "safetensors"]),
    ("truncated weights", |job| cut_weights(job, 5), &[], &["model/model.safetensors"]),
    ("header too long", |job| job.write("model/model.safetensors", b"\xff\xff\xff\x00\x00\x00\x00\x00{}"), &[],
        &["model/model.safetensors", "header"]),
    ("missing tensor", |job| job.write_weights(|name, _| name != "model.norm.weight"), &[], &["model.norm.weight", "missing"]),
    ("wrong shape", |job| job.write_weights(|name, shape| { if name == "model.norm.weight" { shape[0] = 9; } true }), &[],
        &["model.norm.weight", "[8]", "[9]"]),
    ("wrong dtype", |job| {
        let bytes = std::fs::read(job.path("model/model.safetensors")).unwrap();
        let text: Vec<u8> = String::from_utf8_lossy(&bytes).replacen("\"F32\"", "\"I32\"", 1).into();
        job.write("model/model.safetensors", text);
    }, &[], &["model.embed_tokens.weight", "I32"]),
    ("index outside", |job| {
        std::fs::rename(job.path("model/model.safetensors"), job.path("outside.safetensors")).unwrap();
        job.write("model/model.safetensors.index.json", r#"{"weight_map": {"model.norm.weight": "../outside.safetensors"}}"#);
    }, &[], &["model.safetensors.index.json", "../outside.safetensors"]),
    ("vocabulary", |job| {
        replace(job, "model/tokenizer.json", "\"c\": 15", "\"c\": 16");
        job.write("data.jsonl", "{\"text\": \"a b c\"}\n");
    }, &[], &["tokenizer", "16 rows"]),
    ("no tokenizer", |job| std::fs::remove_file(job.path("model/tokenizer.json")).unwrap(),
        &["--set", "validation.prompts=[\"a b\"]"], &["tokenizer.json"]),
    ("prompt too long", nothing, &["--set", "validation.prompts=[\"a b c a b c a b c\"]"],
        &["[validation] prompts", "1 to 7 tokens"]),
    ("token out of range", |job| job.write("data.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [1, 16]}\n"), &[],
        &["data.jsonl:2", "16"]),
    ("malformed JSONL", |job| job.write("data.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [1,\n"), &[], &["data.jsonl:2"]),
    ("not UTF-8", |job| job.write("data.jsonl", b"{\"text\": \"\xff\"}\n"), &[], &["data.jsonl:1", "UTF-8"]),
    ("empty data", |job| job.write("data.jsonl", ""), &[], &["data.jsonl", "no sample"]),
    ("nothing to learn", |job| job.write("data.jsonl", "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n"), &[],
        &["data.jsonl", "expected tokens to learn from"]),
    ("no data", |job| std::fs::remove_file(job.path("data.jsonl")).unwrap(), &[], &["data.jsonl", "No such file"]),
    ("line too long", |job| job.write("data.jsonl", "{\"input_ids\": [1,1,1,1,1,1,1,1,1]}\n"), &[], &["data.jsonl:1", "9", "8"]),
    ("output over the model", |job| std::fs::rename(job.path("model"), job.path("hf")).unwrap(),
        &["--set", "model.path=hf", "--set", "output.dir=."], &["[output] dir", "[model] path"]),
    ("sequence too long", nothing, &["--set", "training.seq_len=33"],
        &["[training] seq_len: expected at most 32", "model/config.json", "got 33"]),
    ("output below a file", nothing, &["--set", "output.dir=data.jsonl/out"], &["[output] dir", "data.jsonl is no folder"]),
    ("output is a file", |job| job.write("out", ""), &[], &["[output] dir", "is no folder"]),
    ("output not writable", nothing, &["--set", "output.dir=/proc/out"], &["[output] dir", "/proc/out"]),
    ("never over checkpoints", |job| std::fs::create_dir_all(job.path("out/checkpoints/step-00000002")).unwrap(),
        &["--set", "checkpoint.resume=never"], &["[checkpoint] resume", "step-00000002"]),
    ("no such checkpoint", nothing, &["--set", "checkpoint.resume=out/step"], &["[checkpoint] resume", "out/step"]),
    ("address of another machine", nothing, &["--master-addr", "192.0.2.1"], &["192.0.2.1"]),
];

#[test]
fn every_bad_input_exits_2_with_one_message_and_starts_no_rank() {
    let mut wrong = Vec::new();
    for (name, change, args, says) in CASES {
        let job = Job::new(5);
        change(&job);
        let ended = job.run(2, "", args);
        let is_right = ended.status == 2
            && says.iter().all(|part| ended.stderr.contains(part))
            && !ended.stderr.contains("panicked")
            && job.num_ranks_started() == 0;
        if !is_right {
            wrong.push(format!("{name}: expected {says:?}, got {ended:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
}

#[test]
fn check_says_what_it_found_and_starts_nothing() {
    let job = Job::new(5);
    let ended = end(job.command(&["check", "job.toml", "--nproc", "2"]).spawn().unwrap());
    assert_eq!(ended.status, 0, "{ended:?}");
    for part in [
        "config      job.toml: 2 ranks on cpu over shm",
        "model       model: Llama, 920 parameters in 1 blocks, vocabulary 16",
        "weights     12 tensors",
        "data        2 samples",
        "output      out: no checkpoint yet",
        "nothing wrong was found",
    ] {
        assert!(ended.stdout.contains(part), "{part:?} is not in {ended:?}");
    }
    assert!(!job.path("out").exists());
    replace(&job, "job.toml", "seq_len = 8", "seq_len = 800");
    let ended = end(job.command(&["check", "job.toml"]).spawn().unwrap());
    assert_eq!((ended.status, ended.stdout.as_str()), (2, ""), "{ended:?}");
}

#[test]
fn a_config_that_does_not_continue_the_checkpoint_is_refused_with_both_values() {
    let job = Job::new(5);
    assert_eq!(job.run(2, "", &[]).status, 0);
    let root = job.path("out/checkpoints");
    let chunk = Chunk { state: State::Param, name: "w", shape: &[1], start: 0, len: 1 };
    let mut writer = ShardWriter::create(&root, 3, "a", 0, 1, &[chunk]).unwrap();
    writer.write_f32(&[1.0]).unwrap();
    let meta = ManifestMeta {
        config: job.read("out/config.toml"),
        data_digest: String::new(),
        tokenizer_digest: String::new(),
        trainer: serde_json::Value::Null,
        versions: BTreeMap::new(),
    };
    sharded::commit(&root, 3, "a", &[writer.finish().unwrap()], meta).unwrap();
    assert_eq!(job.run(2, "", &["--set", "training.steps=6"]).status, 0);
    let ended = job.run(2, "", &["--set", "optimizer.lr=0.5", "--set", "training.seed=9"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    for part in ["step-00000003", "[optimizer] lr: expected 0.001 as in the checkpoint, got 0.5", "[training] seed"] {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
}

#[test]
fn random_weights_need_no_weight_files() {
    let job = Job::new(2);
    std::fs::remove_file(job.path("model/model.safetensors")).unwrap();
    assert_eq!(job.run(1, "", &["--set", "model.init=random"]).status, 0);
}

#[test]
fn plan_needs_neither_weights_nor_data_and_says_whether_it_fits() {
    let job = Job::new(5);
    std::fs::remove_file(job.path("model/model.safetensors")).unwrap();
    std::fs::remove_file(job.path("data.jsonl")).unwrap();
    for (memory, fits) in [("1GiB", "fits: "), ("1KiB", "does not fit: ")] {
        let args = ["plan", "job.toml", "--nproc", "2", "--device-memory", memory];
        let ended = end(job.command(&args).spawn().unwrap());
        assert_eq!(ended.status, 0, "{ended:?}");
        assert!(ended.stdout.contains(fits) && ended.stdout.contains("920"), "{ended:?}");
    }
    let ended = end(job.command(&["plan", "job.toml", "--nproc", "2", "--steps"]).spawn().unwrap());
    for line in ["   0  count tokens\n", "  start unshard 1\n", "  optimizer step\n"] {
        assert!(ended.stdout.contains(line), "{ended:?}");
    }
    let args = ["plan", "job.toml", "--nproc", "2", "--device-memory", "1GiB", "--json"];
    let ended = end(job.command(&args).spawn().unwrap());
    let value: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&value["num_params"], &value["fits"]), (&920.into(), &true.into()), "{value}");
    assert!(value["peak_bytes"]["total"].as_u64().unwrap() > 0);
}

#[test]
fn help_and_version_are_no_errors() {
    let job = Job::new(1);
    for flag in ["--help", "--version"] {
        let mut command = job.command(&[flag]);
        assert_eq!(end(command.stderr(Stdio::null()).spawn().unwrap()).status, 0, "{flag}");
    }
    assert_eq!(end(job.command(&[]).spawn().unwrap()).status, 2);
}
