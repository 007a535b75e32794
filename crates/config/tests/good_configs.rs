//! A right config is read as written, with the defaults of the interface, and survives being written out again.

use std::path::PathBuf;

use fsdp_config::*;

const MINIMAL: &str = "\
[model]
path = \"models/tiny\"
[optimizer]
lr = 1e-4
[training]
steps = 10
seq_len = 8
[data]
train = [\"a.jsonl\"]
";

/// Every key, each with a value that is not its default where there is another.
const FULL: &str = "\
[model]
path = \"models/with \\\"quotes\\\" and é\"
init = \"random\"
[fsdp]
strategy = \"hybrid_shard\"
shard_size = 4
wrap = \"transformer_block\"
prefetch = 0
backend = \"shm\"
device = \"cpu\"
offload = \"master\"
timeout_secs = 5
[precision]
param = \"fp16\"
reduce = \"bf16\"
buffer = \"bf16\"
[[precision.override]]
match = \"*norm*\"
param = \"fp32\"
[[precision.override]]
match = \"lm_head.?eight\"
reduce = \"fp32\"
[activation_checkpointing]
mode = \"none\"
[optimizer]
lr = 3
betas = [0, 0.95]
eps = 1e-300
weight_decay = 0
[lr_scheduler]
kind = \"wsd\"
warmup_ratio = 0.03
min_lr = 1e-7
decay_steps = 7
[training]
epochs = 3
seq_len = 16_777_216
micro_batch_size = 4
global_batch_size = 48
max_grad_norm = 0
seed = 9223372036854775807
deterministic = true
on_nonfinite = \"skip\"
[data]
train = [\"a.jsonl\", \"b.jsonl\"]
format = \"alpaca\"
shuffle = false
packing = false
[validation]
data = [\"v.jsonl\"]
every_steps = 100
prompts = [\"1 + 1 =\", \"line\\nbreak\"]
max_new_tokens = 5
[checkpoint]
every_steps = 25
keep = 3
keep_every = 50
resume = \"out/checkpoints/step-00000010\"
async = false
[metrics]
log_every = 1
trace_steps = \"10-12\"
peak_tflops = 989.5
tensorboard = false
[output]
dir = \"out/x\"
dtype = \"bf16\"
";

fn load(text: &str, sets: &[&str]) -> JobConfig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("job.toml");
    std::fs::write(&path, text).unwrap();
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    JobConfig::load(&path, &sets).unwrap()
}

#[test]
fn a_minimal_config_gets_the_defaults_of_the_interface() {
    let config = load(MINIMAL, &[]);
    let expected = JobConfig {
        model: Model { path: "models/tiny".to_owned(), init: Init::Pretrained },
        fsdp: Fsdp {
            strategy: Strategy::FullShard,
            wrap: Wrap::TransformerBlock,
            resident_units: 0,
            prefetch: 1,
            backend: Backend::Auto,
            device: Device::Auto,
            shard_size: None,
            offload: Offload::None,
            timeout_secs: 600,
        },
        precision: Precision { param: Dtype::Bf16, reduce: Dtype::Fp32, buffer: Dtype::Fp32, overrides: vec![] },
        activation_checkpointing: ActivationCheckpointing { mode: Recompute::Full },
        optimizer: Optimizer { lr: 1e-4, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 },
        lr_scheduler: LrScheduler {
            kind: LrKind::Constant,
            warmup: Portion::Steps(0),
            min_lr: 0.0,
            decay: Portion::Ratio(0.0),
        },
        training: Training {
            duration: Duration::Steps(10),
            seq_len: 8,
            micro_batch_size: 1,
            batch: Batch::Accumulation(1),
            max_grad_norm: Some(1.0),
            seed: 0,
            deterministic: false,
            on_nonfinite: OnNonfinite::Stop,
        },
        data: Data { train: vec!["a.jsonl".into()], format: Format::Auto, shuffle: true, packing: false },
        validation: None,
        checkpoint: Checkpoint { every_steps: 500, keep: 2, keep_every: 0, resume: Resume::Auto, async_save: true },
        metrics: Metrics { log_every: 10, tensorboard: false, trace_steps: None, peak_tflops: None },
        output: Output { dir: "out".into(), dtype: OutputDtype::Auto },
    };
    assert_eq!(config, expected);
}

/// `configs/reference.toml` claims to show every key and the defaults.
#[test]
fn the_reference_config_has_every_key_with_its_default() {
    let text = include_str!("../../../configs/reference.toml");
    let same =
        ["model.path='models/llama'", "training.steps=1000", "training.seq_len=512", "data.train=['train.jsonl']"];
    assert_eq!(load(text, &[]), load(MINIMAL, &same));

    // With what is commented out as well: `key = value` and `[table]`, unlike prose.
    let is_toml =
        |line: &str| line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
    let all: Vec<&str> =
        text.lines().map(|line| line.strip_prefix("# ").filter(|l| is_toml(l)).unwrap_or(line)).collect();
    let all_of_them =
        all.join("\n").replace("\"constant\"", "\"wsd\"").replacen("\"full_shard\"", "\"hybrid_shard\"", 1);
    let config = load(&all_of_them, &[]);
    assert_eq!(config.precision.overrides.len(), 1);
    assert_eq!(config.validation.as_ref().map(|v| (v.every_steps, v.max_new_tokens)), Some((0, 32)));
    assert_eq!((config.lr_scheduler.min_lr, config.lr_scheduler.decay), (0.0, Portion::Ratio(0.1)));
    let written = config.to_toml();
    let missing: Vec<&str> = written
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(key, _)| key)
        .filter(|key| *key != "override" && !all.iter().any(|line| line.starts_with(&format!("{key} = "))))
        .collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn every_key_is_read() {
    let config = load(FULL, &[]);
    assert_eq!(config.model, Model { path: "models/with \"quotes\" and é".to_owned(), init: Init::Random });
    assert_eq!((config.fsdp.prefetch, config.fsdp.backend, config.fsdp.timeout_secs), (0, Backend::Shm, 5));
    let rule = |glob: &str, param, reduce| PrecisionOverride { match_glob: glob.to_owned(), param, reduce };
    assert_eq!(
        config.precision.overrides,
        [rule("*norm*", Some(Dtype::Fp32), None), rule("lm_head.?eight", None, Some(Dtype::Fp32)),]
    );
    assert_eq!(config.activation_checkpointing.mode, Recompute::None);
    assert_eq!(config.optimizer, Optimizer { lr: 3.0, betas: [0.0, 0.95], eps: 1e-300, weight_decay: 0.0 });
    assert_eq!(
        config.lr_scheduler,
        LrScheduler { kind: LrKind::Wsd, warmup: Portion::Ratio(0.03), min_lr: 1e-7, decay: Portion::Steps(7) }
    );
    assert_eq!(config.training.duration, Duration::Epochs(3));
    assert_eq!(config.training.batch, Batch::GlobalBatch(48));
    assert_eq!((config.training.max_grad_norm, config.training.seed), (None, i64::MAX as u64));
    assert_eq!(config.data.train, [PathBuf::from("a.jsonl"), PathBuf::from("b.jsonl")]);
    let validation = config.validation.unwrap();
    assert_eq!((validation.every_steps, validation.max_new_tokens), (100, 5));
    assert_eq!(validation.prompts, ["1 + 1 =", "line\nbreak"]);
    assert_eq!(config.checkpoint.resume, Resume::Path("out/checkpoints/step-00000010".into()));
    assert_eq!(config.output, Output { dir: "out/x".into(), dtype: OutputDtype::Bf16 });
}

#[test]
fn a_resolved_config_reads_back_as_the_same_config() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text, sets) in [
        ("minimal", MINIMAL, vec![]),
        ("full", FULL, vec![]),
        ("prompts only", MINIMAL, vec!["validation.prompts=[\"a\"]"]),
        ("odd numbers", MINIMAL, vec!["optimizer.lr=0.1", "optimizer.eps=1e-17", "optimizer.betas=[0.1,0.3]"]),
        ("never", MINIMAL, vec!["checkpoint.resume=never", "lr_scheduler.kind=cosine"]),
    ] {
        let config = load(text, &sets);
        let path = folder.path().join("config.toml");
        std::fs::write(&path, config.to_toml()).unwrap();
        let again = JobConfig::from_resolved(&path).unwrap();
        assert_eq!(again, JobConfig::parse("a checkpoint's config", &config.to_toml()).unwrap());
        assert_eq!(again, config, "{name}");
        assert_eq!(again.to_toml(), config.to_toml(), "{name}");
    }
}

#[test]
fn flags_win_over_the_file_and_later_flags_over_earlier_ones() {
    let config = load(
        FULL,
        &[
            "training.seed=1",
            "training.seed=2",
            "output.dir=out/y z=1",
            "data.train=[\"c.jsonl\"]",
            "model.init = \"pretrained\"",
            // The other of two exclusive keys in the file gives way.
            "training.steps=20",
            "training.grad_accumulation=2",
            "lr_scheduler.decay_ratio=0.5",
            // A table that the file lacks, and rules as inline tables.
            "precision.override=[{match=\"*\", param=\"bf16\"}]",
        ],
    );
    assert_eq!(config.training.seed, 2);
    assert_eq!(config.output.dir, PathBuf::from("out/y z=1"));
    assert_eq!(config.data.train, [PathBuf::from("c.jsonl")]);
    assert_eq!(config.model.init, Init::Pretrained);
    assert_eq!(config.training.duration, Duration::Steps(20));
    assert_eq!(config.training.batch, Batch::Accumulation(2));
    assert_eq!(config.lr_scheduler.decay, Portion::Ratio(0.5));
    assert_eq!(config.precision.overrides.len(), 1);
}

#[test]
fn two_flags_for_exclusive_keys_still_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("job.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    let sets = ["training.steps=5".to_owned(), "training.epochs=1".to_owned()];
    let error = JobConfig::load(&path, &sets).unwrap_err().to_string();
    assert_eq!(
        error,
        "--set training.epochs=1: [training] epochs: expected one of steps and epochs, got both (steps at --set \
         training.steps=5); remove one of the two"
    );
}

#[test]
fn later_precision_rules_win_over_earlier_ones() {
    let config = load(
        MINIMAL,
        &[
            "precision.param=fp16",
            "precision.override=[{match='*norm*',param='fp32',reduce='bf16'},{match='*.weight',param='bf16'}]",
        ],
    );
    for (name, expected) in [
        ("model.norm.weight", (Dtype::Bf16, Dtype::Bf16)),
        ("model.norm.bias", (Dtype::Fp32, Dtype::Bf16)),
        ("lm_head.weight", (Dtype::Bf16, Dtype::Fp32)),
        ("lm_head.bias", (Dtype::Fp16, Dtype::Fp32)),
    ] {
        assert_eq!(config.precision.dtypes_of(name), expected, "{name}");
    }
}

#[test]
fn microbatches_follow_from_the_global_batch() {
    let mut config = load(FULL, &[]);
    for (world_size, expected) in [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)] {
        assert_eq!(config.num_microbatches(world_size).unwrap(), expected);
    }
    assert_eq!(
        config.num_microbatches(5).unwrap_err().to_string(),
        "[training] global_batch_size: expected a multiple of micro_batch_size x ranks = 4 x 5 = 20, got 48; change \
         one of the three"
    );
    config.training.batch = Batch::Accumulation(3);
    assert_eq!(config.num_microbatches(5).unwrap(), 3);
}

#[test]
fn a_resumed_run_may_change_its_length_and_outputs_but_not_its_numbers() {
    let saved = load(MINIMAL, &[]);
    for set in [
        "training.steps=99",
        "training.epochs=2",
        "metrics.log_every=3",
        "checkpoint.keep=7",
        "checkpoint.resume=never",
        "output.dir=elsewhere",
        "output.dtype=bf16",
        "fsdp.timeout_secs=5",
        "fsdp.prefetch=3",
        "activation_checkpointing.mode=none",
    ] {
        assert_eq!(compatible_for_resume(&saved, &load(MINIMAL, &[set])), Ok(()), "{set}");
    }
    for (set, key, was, is) in [
        ("optimizer.lr=0.5", "[optimizer] lr", "0.0001", "0.5"),
        ("training.seed=1", "[training] seed", "0", "1"),
        ("training.seq_len=16", "[training] seq_len", "8", "16"),
        ("training.grad_accumulation=2", "[training] grad_accumulation", "1", "2"),
        ("precision.param=fp32", "[precision] param", "\"bf16\"", "\"fp32\""),
        (
            "precision.override=[{match='*',param='fp32'}]",
            "[precision] override",
            "nothing",
            "[{ match = \"*\", param = \"fp32\" }]",
        ),
        ("data.shuffle=false", "[data] shuffle", "true", "false"),
        ("lr_scheduler.warmup_steps=2", "[lr_scheduler] warmup_steps", "0", "2"),
        ("model.init=random", "[model] init", "\"pretrained\"", "\"random\""),
    ] {
        let differences = compatible_for_resume(&saved, &load(MINIMAL, &[set])).unwrap_err();
        let expected = Difference { key: key.to_owned(), saved: was.to_owned(), now: is.to_owned() };
        assert_eq!(differences, [expected], "{set}");
    }
    let both = load(MINIMAL, &["training.seed=1", "training.global_batch_size=4"]);
    let keys: Vec<String> = compatible_for_resume(&saved, &both).unwrap_err().into_iter().map(|d| d.key).collect();
    assert_eq!(keys, ["[training] grad_accumulation", "[training] seed", "[training] global_batch_size"]);
}
