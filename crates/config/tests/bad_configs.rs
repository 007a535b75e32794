//! Every wrong config is refused with the place, the key, what was expected, what was found and what to do.

use std::path::Path;

use fsdp_config::{ConfigError, JobConfig};

/// A config that is right; the cases replace one line of it, or add lines behind it.
const BASE: [&str; 9] = [
    "[model]",
    "path = \"models/tiny\"",
    "[optimizer]",
    "lr = 1e-4",
    "[training]",
    "steps = 10",
    "seq_len = 8",
    "[data]",
    "train = [\"a.jsonl\"]",
];
const END: usize = BASE.len();

fn load(text: &[u8], sets: &[&str]) -> Result<JobConfig, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("job.toml");
    std::fs::write(&path, text).unwrap();
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    JobConfig::load(&path, &sets)
}

/// The message without the folder in front of the file's name.
fn message(error: &ConfigError) -> String {
    let text = error.to_string();
    match text.find("job.toml") {
        Some(at) if text.starts_with('/') => text[at..].to_owned(),
        _ => text,
    }
}

struct Case {
    /// The line of `BASE` that is replaced (from 0), or `END` to add.
    line: usize,
    text: &'static str,
    /// What the message starts with.
    starts: &'static str,
    /// What it also says.
    says: &'static str,
}

const fn case(line: usize, text: &'static str, starts: &'static str, says: &'static str) -> Case {
    Case { line, text, starts, says }
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    // Syntax.
    case(3, "lr = ", "job.toml:4:", "syntax error"),
    case(3, "lr = 1e-4 junk", "job.toml:4:6: ", "syntax error"),
    case(3, "lr = 1e-4\nlr = 1e-5", "job.toml:5:1: ", "duplicate key"),
    case(0, "[model", "job.toml:1:", "syntax error"),
    case(1, "path = \"unclosed", "job.toml:2:", "syntax error"),
    case(1, "path = unquoted", "job.toml:2:", "syntax error"),
    case(END, "[model]\ninit = \"random\"", "job.toml:10:", "duplicate key"),
    case(5, "steps = 99999999999999999999", "job.toml:6:9: expected valid TOML", "does not fit"),
    // Unknown keys: misspelt.
    case(5, "stepz = 10", "job.toml:6:1: [training] stepz: ", "did you mean steps?"),
    case(6, "seq_length = 8", "job.toml:7:1: [training] seq_length: ", "did you mean seq_len?"),
    case(1, "paht = \"x\"", "job.toml:2:1: [model] paht: ", "did you mean path?"),
    case(END, "[fsdp]\nstrategi = \"full_shard\"", "job.toml:11:1: [fsdp] strategi: ", "did you mean strategy?"),
    case(END, "[checkpoint]\nevery_step = 5", "job.toml:11:1: [checkpoint] every_step: ", "did you mean every_steps?"),
    case(END, "[output]\nxyzzy = 5", "job.toml:11:1: [output] xyzzy: ", "[output] has dir, dtype"),
    // Unknown keys: in another table.
    case(7, "lr = 1e-4\n[data]", "job.toml:8:1: [training] lr: ", "lr belongs to [optimizer]"),
    case(3, "lr = 1e-4\nmax_grad_norm = 1.0", "job.toml:5:1: [optimizer] max_grad_norm: ", "belongs to [training]"),
    case(3, "lr = 1e-4\nwarmup_steps = 1", "job.toml:5:1: [optimizer] warmup_steps: ", "belongs to [lr_scheduler]"),
    case(8, "train = [\"a\"]\nevery_steps = 1", "job.toml:10:1: [data] every_steps: ", "belongs to [validation] or [checkpoint]"),
    case(0, "lr = 1\n[model]", "job.toml:1:1: lr: ", "belongs to [optimizer]"),
    // Unknown keys: other tools' names.
    case(7, "local_batch_size = 8\n[data]", "job.toml:8:1: [training] local_batch_size: ", "[training] micro_batch_size"),
    case(7, "max_norm = 1.0\n[data]", "job.toml:8:1: [training] max_norm: ", "[training] max_grad_norm"),
    case(5, "num_epochs = 1", "job.toml:6:1: [training] num_epochs: ", "[training] epochs"),
    case(5, "num_train_epochs = 1", "job.toml:6:1: [training] num_train_epochs: ", "[training] epochs"),
    case(7, "gradient_accumulation_steps = 4\n[data]", "job.toml:8:1: [training] gradient_accumulation_steps: ", "[training] grad_accumulation"),
    case(7, "per_device_train_batch_size = 4\n[data]", "job.toml:8:1: [training] per_device_train_batch_size: ", "[training] micro_batch_size"),
    case(3, "learning_rate = 1e-4", "job.toml:4:1: [optimizer] learning_rate: ", "[optimizer] lr"),
    case(7, "learning_rate = 1e-4\n[data]", "job.toml:8:1: [training] learning_rate: ", "[optimizer] lr"),
    case(0, "learning_rate = 1e-4\n[model]", "job.toml:1:1: learning_rate: ", "[optimizer] lr"),
    case(END, "[checkpoint]\ninterval = 5", "job.toml:11:1: [checkpoint] interval: ", "[checkpoint] every_steps"),
    case(END, "[metrics]\nlog_freq = 5", "job.toml:11:1: [metrics] log_freq: ", "[metrics] log_every"),
    case(6, "sequence_len = 8", "job.toml:7:1: [training] sequence_len: ", "[training] seq_len"),
    case(END, "[model.extra]\na = 1", "job.toml:10:8: [model] extra: ", "[model] has path, init"),
    // Unknown tables.
    case(2, "[optim]", "job.toml:3:2: [optim]: ", "did you mean [optimizer]?"),
    case(4, "[trainning]", "job.toml:5:2: [trainning]: ", "did you mean [training]?"),
    case(END, "[activation_checkpoint]\nmode = \"full\"", "job.toml:10:2: [activation_checkpoint]: ", "[activation_checkpointing]"),
    case(END, "[parallelism]\ndata_parallel_shard_degree = 2", "job.toml:10:2: [parallelism]: ", "[fsdp]"),
    case(END, "[job]\ndump_folder = \"x\"", "job.toml:10:2: [job]: ", "[output] dir"),
    case(END, "[wandb]\nproject = \"x\"", "job.toml:10:2: [wandb]: ", "the tables are [model]"),
    case(0, "metrics = 5\n[model]", "job.toml:1:11: [metrics]: expected a table", "got the integer 5"),
    // Missing keys.
    case(1, "", "job.toml:1:2: [model] path: expected a folder", "got nothing; add path to [model]"),
    case(3, "", "job.toml:3:2: [optimizer] lr: ", "got nothing"),
    case(5, "", "job.toml:5:2: [training] steps: expected steps or epochs", "got nothing"),
    case(6, "", "job.toml:5:2: [training] seq_len: ", "got nothing"),
    case(8, "", "job.toml:8:2: [data] train: ", "got nothing"),
    case(8, "train = []", "job.toml:8:2: [data] train: ", "got nothing"),
    case(END, "[validation]\nevery_steps = 5", "job.toml:10:2: [validation] data: expected data or prompts", "got nothing"),
    case(END, "[[precision.override]]\nparam = \"fp32\"", "job.toml:10:1: [precision.override] match: ", "got nothing"),
    case(END, "[[precision.override]]\nmatch = \"*\"", "job.toml:10:1: [precision.override] param: expected param or reduce", "got nothing"),
    // Types.
    case(1, "path = 5", "job.toml:2:8: [model] path: ", "got the integer 5; put it in quotes"),
    case(1, "path = \"\"", "job.toml:2:8: [model] path: ", "got the string \"\""),
    case(3, "lr = \"1e-4\"", "job.toml:4:6: [optimizer] lr: expected a number above 0", "got the string \"1e-4\"; write it without quotes"),
    case(3, "lr = true", "job.toml:4:6: [optimizer] lr: ", "got the boolean true"),
    case(5, "steps = 10.0", "job.toml:6:9: [training] steps: expected an integer", "got the number 10"),
    case(5, "steps = \"10\"", "job.toml:6:9: [training] steps: expected an integer", "got the string \"10\""),
    case(5, "steps = 2026-01-01", "job.toml:6:9: [training] steps: ", "got the date 2026-01-01"),
    case(8, "train = \"a.jsonl\"", "job.toml:9:9: [data] train: ", "put it in brackets: train = [\"a.jsonl\"]"),
    case(8, "train = [\"a.jsonl\",\n  7]", "job.toml:10:3: [data] train: ", "got the integer 7"),
    case(8, "train = [\"a.jsonl\"]\nshuffle = \"yes\"", "job.toml:10:11: [data] shuffle: expected true or false", "got the string \"yes\""),
    case(3, "lr = 1e-4\nbetas = 0.9", "job.toml:5:9: [optimizer] betas: expected two numbers", "got the number 0.9"),
    case(3, "lr = 1e-4\nbetas = [0.9]", "job.toml:5:9: [optimizer] betas: expected two numbers", "got an array of 1"),
    case(END, "[precision]\noverride = \"*norm*\"", "job.toml:11:12: [precision] override: ", "use double brackets"),
    case(END, "[precision.override]\nmatch = \"*\"", "job.toml:10:1: [precision] override: ", "got a table"),
    case(END, "[fsdp]\nstrategy = 3", "job.toml:11:12: [fsdp] strategy: expected \"full_shard\"", "got the integer 3"),
    // Ranges.
    case(3, "lr = 0", "job.toml:4:6: [optimizer] lr: ", "got the integer 0"),
    case(3, "lr = -1e-4", "job.toml:4:6: [optimizer] lr: ", "got the number -0.0001"),
    case(3, "lr = nan", "job.toml:4:6: [optimizer] lr: ", "got the number NaN"),
    case(3, "lr = inf", "job.toml:4:6: [optimizer] lr: ", "got the number inf"),
    case(3, "lr = 1e-4\nbetas = [0.9, 1.0]", "job.toml:5:15: [optimizer] betas: ", "got the number 1"),
    case(3, "lr = 1e-4\neps = 0.0", "job.toml:5:7: [optimizer] eps: ", "expected a number above 0"),
    case(3, "lr = 1e-4\nweight_decay = -0.1", "job.toml:5:16: [optimizer] weight_decay: ", "expected a number of at least 0"),
    case(5, "steps = 0", "job.toml:6:9: [training] steps: expected an integer from 1", "got the integer 0"),
    case(5, "epochs = -1", "job.toml:6:10: [training] epochs: expected an integer from 1", "got the integer -1"),
    case(6, "seq_len = 0", "job.toml:7:11: [training] seq_len: ", "got the integer 0"),
    case(7, "micro_batch_size = 0\n[data]", "job.toml:8:20: [training] micro_batch_size: ", "got the integer 0"),
    case(7, "grad_accumulation = 0\n[data]", "job.toml:8:21: [training] grad_accumulation: ", "got the integer 0"),
    case(7, "max_grad_norm = -1\n[data]", "job.toml:8:17: [training] max_grad_norm: ", "got the integer -1"),
    case(7, "seed = -1\n[data]", "job.toml:8:8: [training] seed: ", "got the integer -1"),
    case(7, "micro_batch_size = 4\nglobal_batch_size = 6\n[data]", "job.toml:9:21: [training] global_batch_size: expected a multiple of micro_batch_size = 4", "got 6"),
    case(END, "[fsdp]\nprefetch = -1", "job.toml:11:12: [fsdp] prefetch: ", "got the integer -1"),
    case(END, "[fsdp]\ntimeout_secs = 0", "job.toml:11:16: [fsdp] timeout_secs: ", "got the integer 0"),
    case(END, "[checkpoint]\nkeep = 1", "job.toml:11:8: [checkpoint] keep: expected an integer from 2", "got the integer 1"),
    case(END, "[metrics]\nlog_every = 0", "job.toml:11:13: [metrics] log_every: ", "got the integer 0"),
    case(END, "[lr_scheduler]\nwarmup_ratio = 1.5", "job.toml:11:16: [lr_scheduler] warmup_ratio: ", "expected a number from 0 to 1"),
    case(END, "[lr_scheduler]\nkind = \"linear\"\nmin_lr = 1.0", "job.toml:12:10: [lr_scheduler] min_lr: ", "from 0 to [optimizer] lr"),
    // Conflicts.
    case(5, "steps = 10\nepochs = 1", "job.toml:7:1: [training] epochs: expected one of steps and epochs", "remove one of the two"),
    case(7, "global_batch_size = 4\ngrad_accumulation = 2\n[data]", "job.toml:8:1: [training] global_batch_size: ", "remove one of the two"),
    case(END, "[lr_scheduler]\nwarmup_steps = 1\nwarmup_ratio = 0.1", "job.toml:12:1: [lr_scheduler] warmup_ratio: ", "remove one of the two"),
    case(END, "[lr_scheduler]\nmin_lr = 1e-5", "job.toml:11:10: [lr_scheduler] min_lr: expected a kind that decays", "remove min_lr or set kind"),
    case(END, "[lr_scheduler]\nkind = \"cosine\"\ndecay_steps = 4", "job.toml:12:1: [lr_scheduler] decay_steps: expected kind = \"wsd\"", "\"cosine\""),
    // Values that are none.
    case(END, "[fsdp]\nstrategy = \"fullshard\"", "job.toml:11:12: [fsdp] strategy: ", "did you mean \"full_shard\"?"),
    case(END, "[precision]\nparam = \"float32\"", "job.toml:11:9: [precision] param: expected \"fp32\" or \"bf16\" or \"fp16\"", "got the string \"float32\""),
    case(END, "[precision]\nreduce = \"fp16\"", "job.toml:11:10: [precision] reduce: expected \"fp32\" or \"bf16\"", "got the string \"fp16\""),
    case(END, "[[precision.override]]\nmatch = \"*\"\nparam = \"fp16\"", "job.toml:12:9: [precision.override] param: expected \"fp32\" or \"bf16\"", ""),
    case(END, "[precision]\nbuffer = \"fp16\"", "job.toml:11:10: [precision] buffer: expected \"fp32\" or \"bf16\"", ""),
    case(END, "[lr_scheduler]\nkind = \"cosin\"", "job.toml:11:8: [lr_scheduler] kind: ", "did you mean \"cosine\"?"),
    case(END, "[output]\ndtype = \"int8\"", "job.toml:11:9: [output] dtype: ", "got the string \"int8\""),
    case(END, "[[precision.override]]\nmatch = \"*\"\nparm = \"fp32\"", "job.toml:12:1: [precision.override] parm: ", "did you mean param?"),
    case(END, "[[precision.override]]\nmatch = \"*\"\nparam = \"fp8\"", "job.toml:12:9: [precision.override] param: ", "got the string \"fp8\""),
    // Not built yet.
    case(END, "[activation_checkpointing]\nmode = \"selective\"", "job.toml:11:8: [activation_checkpointing] mode: ", "\"selective\", which is not built yet; use \"full\" or \"none\""),
    case(END, "[fsdp]\nstrategy = \"ddp\"", "job.toml:11:12: [fsdp] strategy: ", "\"no_shard\""),
    case(END, "[fsdp]\nstrategy = \"no_shard\"\nresident_units = 2", "job.toml:12:18: [fsdp] resident_units: ", "remove one of the two"),
    case(END, "[fsdp]\nstrategy = \"no_shard\"\nshard_size = 2", "job.toml:12:14: [fsdp] shard_size: ", "hybrid_shard"),
    case(END, "[fsdp]\nbackend = \"gloo\"", "job.toml:11:11: [fsdp] backend: ", "\"mpi\""),
    case(END, "[fsdp]\ndevice = \"tpu\"", "job.toml:11:10: [fsdp] device: ", "\"cuda\""),
    case(END, "[fsdp]\noffload = true", "job.toml:11:11: [fsdp] offload: ", "\"optimizer\""),
    case(END, "[fsdp]\nshard_size = 2", "job.toml:11:14: [fsdp] shard_size: ", "hybrid_shard"),
    case(END, "[fsdp]\nstrategy = \"hybrid_shard\"\nshard_size = 0", "job.toml:12:14: [fsdp] shard_size: ", "from 1"),
    case(END, "[metrics]\ntrace_steps = \"12-10\"", "job.toml:11:15: [metrics] trace_steps: ", "\"10-12\""),
    case(END, "[metrics]\ntrace_steps = \"0\"", "job.toml:11:15: [metrics] trace_steps: ", "counted from 1"),
    case(END, "[metrics]\npeak_tflops = 0", "job.toml:11:15: [metrics] peak_tflops: ", "above 0"),
    case(END, "[activation_checkpointing]\nmode = \"selective\"", "job.toml:11:8: [activation_checkpointing] mode: ", "not built yet; use \"full\" or \"none\""),
    case(8, "train = [\"a\"]\nformat = \"chat\"", "job.toml:10:10: [data] format: ", "not built yet"),
    case(8, "train = [\"a\"]\nformat = \"classification\"", "job.toml:10:10: [data] format: ", "not built yet"),
    case(8, "train = [\"a\"]\npacking = true", "job.toml:10:11: [data] packing: ", "true, which is not built yet; use false"),
    case(END, "[checkpoint]\nasync = \"yes\"", "job.toml:11:9: [checkpoint] async: ", "true or false"),
    case(END, "[checkpoint]\nevery_steps = 500\nkeep_every = 750", "job.toml:12:14: [checkpoint] keep_every: ", "a multiple of every_steps, 500"),
    case(END, "[checkpoint]\nkeep_every = -1", "job.toml:11:14: [checkpoint] keep_every: ", "from 0"),
    case(6, "seq_len = 8\non_nonfinite = \"warn\"", "job.toml:8:16: [training] on_nonfinite: ", "\"skip\""),
    case(END, "[metrics]\ntensorboard = true", "job.toml:11:15: [metrics] tensorboard: ", "not built yet; use false"),
];

#[test]
fn every_bad_config_names_its_line_and_key() {
    assert!(CASES.len() >= 60);
    let mut wrong = Vec::new();
    for Case { line, text, starts, says } in CASES {
        let mut lines = BASE.to_vec();
        if *line == END {
            lines.push(text);
        } else {
            lines[*line] = text;
        }
        match load(lines.join("\n").as_bytes(), &[]) {
            Ok(_) => wrong.push(format!("{text:?} was accepted")),
            Err(error) => {
                let got = message(&error);
                if !got.starts_with(starts) || !got.contains(says) || got.contains('\n') {
                    wrong.push(format!("{text:?}\n  starts {starts}\n  says   {says}\n  got    {got}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
}

#[test]
fn a_flag_that_is_wrong_is_named_as_it_was_typed() {
    for (set, starts, says) in [
        ("training.steps", "--set training.steps: expected --set table.key=value", "no equals sign"),
        ("steps=5", "--set steps=5: expected --set table.key=value", "a key without a table"),
        ("a.b.c=5", "--set a.b.c=5: expected --set table.key=value", "not one table and one key"),
        (".b=5", "--set .b=5: ", "not one table and one key"),
        ("training.stepz=5", "--set training.stepz=5: [training] stepz: ", "did you mean steps?"),
        ("train.steps=5", "--set train.steps=5: [train]: ", "did you mean [training]?"),
        ("training.steps=many", "--set training.steps=many: [training] steps: ", "got the string \"many\""),
        ("training.steps=0", "--set training.steps=0: [training] steps: ", "got the integer 0"),
        ("optimizer.betas=[1]", "--set optimizer.betas=[1]: [optimizer] betas: ", "got the integer 1"),
        (
            "activation_checkpointing.mode=selective",
            "--set activation_checkpointing.mode=selective: [activation_checkpointing] mode: ",
            "not built yet",
        ),
    ] {
        let error = load(BASE.join("\n").as_bytes(), &[set]).unwrap_err();
        let got = message(&error);
        assert!(got.starts_with(starts) && got.contains(says), "{set}: {got}");
    }
}

#[test]
fn files_that_are_no_text_and_files_that_are_not_there_are_refused() {
    let got = message(&load(b"[model]\npath = \"\xff\"", &[]).unwrap_err());
    assert_eq!(got, "job.toml:2:9: expected valid TOML, got a syntax error: the file is not UTF-8; save it as UTF-8");

    let got = JobConfig::load(Path::new("/nonexistent/job.toml"), &[]).unwrap_err().to_string();
    assert!(got.starts_with("/nonexistent/job.toml: expected a readable TOML config") && got.contains("No such file"));

    let got = JobConfig::load(Path::new("/"), &[]).unwrap_err().to_string();
    assert!(got.contains("directory"), "{got}");

    let got = message(&load(b"", &[]).unwrap_err());
    assert!(got.starts_with("job.toml: [optimizer] lr: ") && got.ends_with("add lr to [optimizer]"), "{got}");
}

#[test]
fn the_first_unknown_name_in_the_file_is_reported() {
    let text = "[training]\nzzz = 1\n[data]\naaa = 1\n";
    assert!(message(&load(text.as_bytes(), &[]).unwrap_err()).starts_with("job.toml:2:1: [training] zzz"));
}

/// No text, however broken, may panic.
#[test]
fn cut_and_doubled_configs_never_panic() {
    let full = BASE.join("\n");
    for end in 0..=full.len() {
        let _ = load(&full.as_bytes()[..end], &[]);
        let _ = load(format!("{full}\n{}", &full[end..]).as_bytes(), &[]);
    }
    for hostile in ["a = [[[[[[[[", "[[precision.override]]", "\"\" = 1", "[\"\"]\n\"\"=1", "x.y.z = 1", "é = \"ü"] {
        let _ = load(hostile.as_bytes(), &[]);
    }
    let deep = format!("a = {}", "[".repeat(100_000));
    assert!(load(deep.as_bytes(), &[]).is_err());
}
