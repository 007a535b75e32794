//! What is wrong with a job is said in one message, with the place, what was expected and what was found, before any rank
//! starts.

use std::net::TcpListener;

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::model::{self, Stored};
use safetensors::tensor::Dtype;

/// Name, what is changed in a job that is right, arguments, and what the message must contain.
type Case = (&'static str, fn(&Job), &'static [&'static str], &'static [&'static str]);

fn nothing(_: &Job) {}

/// Weights with one tensor changed or left out.
fn with_tensor(job: &Job, change: impl Fn(&str) -> Option<Stored>) {
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut tensors = model::tensors(&job.path("model"), Dtype::F32);
    tensors.remove(name);
    tensors.extend(change(name).map(|tensor| (name.to_string(), tensor)));
    model::write(&job.path("model/model.safetensors"), &tensors);
}

fn text_data(job: &Job) {
    job.write("train.jsonl", "{\"text\": \"w1 w2 w3\"}\n");
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("no such config", |job| std::fs::remove_file(job.path("job.toml")).unwrap(), &[], &["job.toml", "No such file"]),
    ("TOML syntax error", |job| job.replace("job.toml", "lr = 1e-3", "lr = = 1"), &[], &["job.toml:4:", "syntax"]),
    ("unknown key", |job| job.replace("job.toml", "seq_len = 8", "seq_len = 8\nmax_norm = 1.0"), &[],
        &["job.toml:8:1", "max_norm", "max_grad_norm"]),
    ("wrong type", |job| job.replace("job.toml", "seq_len = 8", "seq_len = \"long\""), &[],
        &["job.toml:7:", "[training] seq_len", "integer", "\"long\""]),
    ("out of range", |job| job.replace("job.toml", "lr = 1e-3", "lr = -1"), &[],
        &["job.toml:4:", "[optimizer] lr", "above 0", "-1"]),
    ("wrong value in a flag", nothing, &["--set", "optimizer.betas=[0.9, 1.5]"], &["--set optimizer.betas", "below 1", "1.5"]),
    ("missing model folder", |job| std::fs::remove_dir_all(job.path("model")).unwrap(), &[], &["[model] path", "\"model\"", "no such folder"]),
    ("missing config.json", |job| std::fs::remove_file(job.path("model/config.json")).unwrap(), &[], &["model/config.json"]),
    ("config.json is no JSON", |job| job.write("model/config.json", "{"), &[], &["model/config.json", "JSON"]),
    ("unknown architecture", |job| job.replace("model/config.json", "LlamaForCausalLM", "MambaForCausalLM"), &[],
        &["model/config.json", "architectures", "MambaForCausalLM", "LlamaForCausalLM"]),
    ("impossible sizes", |job| job.replace("model/config.json", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"), &[],
        &["model/config.json", "num_key_value_heads", "3"]),
    ("truncated safetensors", |job| {
        let bytes = std::fs::read(job.path("model/model.safetensors")).unwrap();
        job.write("model/model.safetensors", &bytes[..bytes.len() - 100]);
    }, &[], &["model/model.safetensors"]),
    ("header longer than the file", |job| job.write("model/model.safetensors", b"\xff\xff\0\0\0\0\0\0{}"), &[],
        &["model/model.safetensors", "header", "65535"]),
    ("header of a huge length", |job| job.write("model/model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\xff{}"), &[],
        &["model/model.safetensors", "header"]),
    ("missing tensor", |job| with_tensor(job, |_| None), &[], &["model", "model.layers.1.mlp.up_proj.weight", "missing"]),
    ("wrong shape", |job| with_tensor(job, |name| Some(Stored::new(name, &[16, 24], Dtype::F32))), &[],
        &["model.layers.1.mlp.up_proj.weight", "[24, 16]", "[16, 24]"]),
    ("wrong dtype", |job| with_tensor(job, |_| Some(Stored { dtype: Dtype::I8, shape: vec![24, 16], bytes: vec![1; 24 * 16] })), &[],
        &["model.layers.1.mlp.up_proj.weight", "I8", "BF16"]),
    ("index names a file outside", |job| {
        std::fs::rename(job.path("model/model.safetensors"), job.path("outside.safetensors")).unwrap();
        job.write("model/model.safetensors.index.json", "{\"weight_map\": {\"model.norm.weight\": \"../outside.safetensors\"}}");
    }, &[], &["model.safetensors.index.json", "\"../outside.safetensors\"", "inside"]),
    ("index names a missing file", |job| {
        std::fs::rename(job.path("model/model.safetensors"), job.path("outside.safetensors")).unwrap();
        job.write("model/model.safetensors.index.json", "{\"weight_map\": {\"model.norm.weight\": \"a.safetensors\"}}");
    }, &[], &["model/a.safetensors"]),
    ("vocabulary larger than the embedding", |job| {
        text_data(job);
        job.replace("model/tokenizer.json", "\"w47\": 47", "\"w47\": 48");
    }, &[], &["tokenizer.json", "w47", "48"]),
    ("tokenizer missing", |job| {
        text_data(job);
        std::fs::remove_file(job.path("model/tokenizer.json")).unwrap();
    }, &[], &["tokenizer.json"]),
    ("token out of range", |job| job.write("train.jsonl", "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 48]}\n"), &[],
        &["train.jsonl:2", "input_ids[1] is 48", "0 to 47"]),
    ("label out of range", |job| job.write("train.jsonl", "{\"input_ids\": [1, 2], \"labels\": [1, -1]}\n"), &[],
        &["train.jsonl:1", "labels[1] is -1", "0 to 47"]),
    ("malformed JSONL", |job| job.write("train.jsonl", "{\"input_ids\": [1, 2]}\n\n{\"input_ids\": [1,\n"), &[], &["train.jsonl:3", "not JSON"]),
    ("not UTF-8", |job| job.write("train.jsonl", b"{\"input_ids\": [1, 2]}\n{\"text\": \"\xe4\"}\n"), &[], &["train.jsonl:2", "UTF-8"]),
    ("empty data", |job| job.write("train.jsonl", "\n\n"), &[], &["train.jsonl", "no sample"]),
    ("missing data", |job| std::fs::remove_file(job.path("train.jsonl")).unwrap(), &[], &["train.jsonl", "No such file"]),
    ("line longer than the sequence", |job| job.write("train.jsonl", "{\"input_ids\": [1, 1, 1, 1, 1, 1, 1, 1, 1]}\n"), &[],
        &["train.jsonl:1", "9 tokens", "seq_len is 8"]),
    ("sequence longer than the model allows", nothing, &["--set", "training.seq_len=65"],
        &["[training] seq_len", "at most 64", "model/config.json", "65"]),
    ("bad validation data", |job| job.write("valid.jsonl", "{\"input_ids\": [99]}\n"), &["--set", "validation.data=[\"valid.jsonl\"]"],
        &["valid.jsonl:1", "99"]),
    ("unwritable output", nothing, &["--set", "output.dir=/proc/nowhere/out"], &["[output] dir", "/proc/nowhere/out"]),
    ("output below a file", nothing, &["--set", "output.dir=train.jsonl/out"], &["[output] dir", "train.jsonl"]),
    ("a feature not built yet", nothing, &["--set", "activation_checkpointing.mode=selective"], &["[activation_checkpointing] mode", "selective", "not built yet", "full"]),
    ("no GPU", nothing, &["--backend", "nccl"], &["--backend", "nccl", "an NVIDIA GPU", "got none"]),
    ("global batch does not divide", nothing, &["--set", "training.global_batch_size=6"], &["global_batch_size", "2 x 2", "6"]),
    ("unknown flag", nothing, &["--gpus", "2"], &["--gpus"]),
];

#[test]
fn bad_input_is_refused_before_any_rank_starts() {
    let mut wrong = Vec::new();
    for (name, change, args, says) in CASES {
        let job = Job::new();
        change(&job);
        wrong.extend(judge(name, &job, args, says));
    }
    // Somebody else listens.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    wrong.extend(judge("port in use", &Job::new(), &["--master-port", &port], &[&port, "in use"]));
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len() + 1, wrong.join("\n"));
}

/// What is wrong with the run of a job that is wrong.
fn judge(name: &str, job: &Job, args: &[&str], says: &[&str]) -> Option<String> {
    let ended = job.run(2, args);
    let missing: Vec<&&str> = says.iter().filter(|part| !ended.stderr.contains(**part)).collect();
    let noise = ["panicked", "backtrace", "Traceback", "0x"].iter().find(|word| ended.stderr.contains(**word));
    let num_messages = ended.stderr.lines().filter(|line| line.starts_with("fsdp-launch: ")).count();
    // clap writes its own messages.
    let is_one_message = num_messages == 1 || (num_messages == 0 && ended.stderr.starts_with("error: "));
    let has_started = job.path("out/logs/rank-0.log").exists() || job.path("out/metrics.jsonl").exists();
    let is_right = ended.status == 2 && missing.is_empty() && noise.is_none() && is_one_message && !has_started;
    (!is_right).then(|| {
        format!(
            "{name}: exit status {}, ranks started: {has_started}, not said: {missing:?}; {:?}",
            ended.status, ended.stderr
        )
    })
}

/// The same things found by the command that only looks.
#[test]
fn check_says_the_same_and_leaves_nothing() {
    for (change, says) in [
        (nothing as fn(&Job), None),
        (|job| job.write("train.jsonl", "{\"input_ids\": [1, 48]}\n"), Some("train.jsonl:1")),
        (|job| job.replace("job.toml", "lr = 1e-3", ""), Some("[optimizer] lr")),
    ] {
        let job = Job::new();
        change(&job);
        let ended = job.run(2, &["check"]);
        assert_eq!(ended.status, if says.is_some() { 2 } else { 0 }, "{ended:?}");
        assert!(says.is_none_or(|says| ended.stderr.contains(says)), "{ended:?}");
        assert!(!job.path("out").exists());
    }
}
