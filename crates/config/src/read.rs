//! The tables, key by key, with their defaults and ranges.

use std::path::PathBuf;

use crate::error::ConfigError;
use crate::job::*;
use crate::lr_scheduler::{LrKind, LrScheduler, Portion};
use crate::names;
use crate::raw::{Entry, RawConfig, Value};
use crate::section::Section;

/// Far above any real job, and small enough that a product of a few of them fits into 64 bits.
const MAX_STEPS: u64 = 1_000_000_000_000;
const MAX_SEQ_LEN: u64 = 1 << 24;
const MAX_BATCH: u64 = 1 << 20;
const MAX_RANKS: u64 = 1 << 20;
/// The step program has a few entries for each unit and microbatch.
const MAX_ACCUMULATION: u64 = 10_000;

/// The validated config of everything that was written.
pub(crate) fn job(mut raw: RawConfig) -> Result<JobConfig, ConfigError> {
    names::check(&raw)?;
    let optimizer = optimizer(&mut table(&mut raw, "optimizer"))?;
    let training = training(&mut table(&mut raw, "training"))?;
    Ok(JobConfig {
        model: model(&mut table(&mut raw, "model"))?,
        fsdp: fsdp(&mut table(&mut raw, "fsdp"))?,
        precision: precision(&mut table(&mut raw, "precision"))?,
        activation_checkpointing: activation_checkpointing(&mut table(&mut raw, "activation_checkpointing"))?,
        lr_scheduler: lr_scheduler(&mut table(&mut raw, "lr_scheduler"), &optimizer)?,
        optimizer,
        training,
        data: data(&mut table(&mut raw, "data"))?,
        validation: match raw.root.contains_key("validation") {
            true => Some(validation(&mut table(&mut raw, "validation"))?),
            false => None,
        },
        checkpoint: checkpoint(&mut table(&mut raw, "checkpoint"))?,
        metrics: metrics(&mut table(&mut raw, "metrics"))?,
        output: output(&mut table(&mut raw, "output"))?,
    })
}

/// The table `name` as written, or an empty one.
fn table(raw: &mut RawConfig, name: &str) -> Section {
    match raw.root.remove(name) {
        Some(entry) => match entry.value.value {
            Value::Table(keys) => Section::new(name, entry.key_at.text, keys),
            _ => unreachable!("names::check refuses a [{name}] that is no table"),
        },
        None => Section::new(name, raw.file.clone(), Default::default()),
    }
}

fn model(s: &mut Section) -> Result<Model, ConfigError> {
    const PATH: &str = "a folder with config.json, weights and tokenizer files";
    Ok(Model {
        path: s.string("path", PATH)?.ok_or_else(|| s.missing("path", PATH))?.value,
        init: s.choice("init", Init::CHOICES, &[])?.unwrap_or(Init::Pretrained),
    })
}

fn fsdp(s: &mut Section) -> Result<Fsdp, ConfigError> {
    let strategy = s.choice("strategy", Strategy::CHOICES, &[])?.unwrap_or(Strategy::FullShard);
    let shard_size = match s.integer("shard_size", 1..=MAX_RANKS)? {
        Some(taken) if strategy != Strategy::HybridShard => {
            let got = format!("shard_size with strategy = {:?}", strategy.name());
            return Err(s.wrong(&taken.at, "shard_size", "strategy = \"hybrid_shard\"", got, "remove one of the two"));
        }
        taken => taken.map(|taken| taken.value),
    };
    let resident_units = match s.integer("resident_units", 0..=10_000)? {
        Some(taken) if taken.value > 0 && matches!(strategy, Strategy::ShardGradOp | Strategy::NoShard) => {
            let got = format!("resident_units with strategy = {:?}, where all blocks are resident", strategy.name());
            let expected = "strategy = \"full_shard\" or \"hybrid_shard\"";
            return Err(s.wrong(&taken.at, "resident_units", expected, got, "remove one of the two"));
        }
        taken => taken.map_or(0, |taken| taken.value),
    };
    Ok(Fsdp {
        strategy,
        wrap: s.choice("wrap", Wrap::CHOICES, &[])?.unwrap_or(Wrap::TransformerBlock),
        resident_units,
        prefetch: s.integer("prefetch", 0..=64)?.map_or(1, |taken| taken.value),
        backend: s.choice("backend", Backend::CHOICES, &[])?.unwrap_or(Backend::Auto),
        device: s.choice("device", Device::CHOICES, &[])?.unwrap_or(Device::Auto),
        shard_size,
        offload: s.choice("offload", Offload::CHOICES, &[])?.unwrap_or(Offload::None),
        timeout_secs: s.integer("timeout_secs", 1..=604_800)?.map_or(600, |taken| taken.value),
    })
}

const WITHOUT_FP16: &[(&str, Dtype)] = &[("fp32", Dtype::Fp32), ("bf16", Dtype::Bf16)];

fn precision(s: &mut Section) -> Result<Precision, ConfigError> {
    const OVERRIDE: &str = "tables [[precision.override]] with match and param or reduce";
    let param = s.choice("param", Dtype::CHOICES, &[])?.unwrap_or(Dtype::Bf16);
    // fp16 needs the loss scaler, which comes with fp16 compute.
    let with_scaler = if param == Dtype::Fp16 { Dtype::CHOICES } else { WITHOUT_FP16 };
    let mut overrides = Vec::new();
    if let Some(Entry { value: located, .. }) = s.take("override") {
        let Value::Array(rules) = located.value else {
            return Err(s.wrong(&located.at, "override", OVERRIDE, located.value.describe(), "use double brackets"));
        };
        for rule in rules {
            let Value::Table(keys) = rule.value else {
                return Err(s.wrong(&rule.at, "override", OVERRIDE, rule.value.describe(), ""));
            };
            const NAME: &str = "precision.override";
            if let Some((key, entry)) = keys.iter().find(|(key, _)| !names::OVERRIDE_KEYS.contains(&key.as_str())) {
                return Err(names::unknown_key(NAME, names::OVERRIDE_KEYS, key, entry));
            }
            overrides.push(precision_override(&mut Section::new(NAME, rule.at.text, keys), with_scaler)?);
        }
    }
    Ok(Precision {
        param,
        reduce: s.choice("reduce", with_scaler, &[])?.unwrap_or(Dtype::Fp32),
        buffer: s.choice("buffer", WITHOUT_FP16, &[])?.unwrap_or(Dtype::Fp32),
        overrides,
    })
}

fn precision_override(
    s: &mut Section,
    dtypes: &'static [(&'static str, Dtype)],
) -> Result<PrecisionOverride, ConfigError> {
    const MATCH: &str = "a pattern of parameter names, such as \"*norm*\"";
    let rule = PrecisionOverride {
        match_glob: s.string("match", MATCH)?.ok_or_else(|| s.missing("match", MATCH))?.value,
        param: s.choice("param", dtypes, &[])?,
        reduce: s.choice("reduce", dtypes, &[])?,
    };
    if rule.param.is_none() && rule.reduce.is_none() {
        return Err(s.missing("param", "param or reduce"));
    }
    Ok(rule)
}

fn activation_checkpointing(s: &mut Section) -> Result<ActivationCheckpointing, ConfigError> {
    Ok(ActivationCheckpointing {
        mode: s.choice("mode", Recompute::CHOICES, &["selective"])?.unwrap_or(Recompute::Full),
    })
}

fn optimizer(s: &mut Section) -> Result<Optimizer, ConfigError> {
    const LR: &str = "a number above 0";
    Ok(Optimizer {
        lr: s.number("lr", LR, |lr| lr > 0.0)?.ok_or_else(|| s.missing("lr", LR))?.value,
        betas: s
            .pair("betas", "two numbers from 0 to below 1", |beta| (0.0..1.0).contains(&beta))?
            .unwrap_or([0.9, 0.999]),
        eps: s.number("eps", "a number above 0", |eps| eps > 0.0)?.map_or(1e-8, |taken| taken.value),
        weight_decay: s
            .number("weight_decay", "a number of at least 0", |decay| decay >= 0.0)?
            .map_or(0.01, |taken| taken.value),
    })
}

fn lr_scheduler(s: &mut Section, optimizer: &Optimizer) -> Result<LrScheduler, ConfigError> {
    let kind = s.choice("kind", LrKind::CHOICES, &[])?.unwrap_or(LrKind::Constant);
    if kind != LrKind::Wsd {
        for key in ["decay_steps", "decay_ratio"] {
            if let Some(entry) = s.take(key) {
                let got = format!("{key} with kind = {:?}", kind.name());
                return Err(s.wrong(
                    &entry.key_at,
                    key,
                    "kind = \"wsd\"",
                    got,
                    "other kinds decay over all steps behind the warm-up",
                ));
            }
        }
    }
    let warmup = portion(s, "warmup_steps", "warmup_ratio")?.unwrap_or(Portion::Steps(0));
    let decay = portion(s, "decay_steps", "decay_ratio")?.unwrap_or(Portion::Ratio(match kind {
        LrKind::Wsd => 0.1,
        _ => 0.0,
    }));
    let lr = optimizer.lr;
    let min_lr = match s.number("min_lr", "a number from 0 to [optimizer] lr", |min_lr| (0.0..=lr).contains(&min_lr))? {
        Some(taken) if kind == LrKind::Constant => {
            let got = "min_lr with kind = \"constant\"".to_owned();
            return Err(s.wrong(&taken.at, "min_lr", "a kind that decays", got, "remove min_lr or set kind"));
        }
        Some(taken) => taken.value,
        None => 0.0,
    };
    Ok(LrScheduler { kind, warmup, min_lr, decay })
}

/// One of a number of steps and a share of all steps. It may be longer than the run: a try of a few steps keeps the
/// schedule of the whole.
fn portion(s: &mut Section, steps: &str, ratio: &str) -> Result<Option<Portion>, ConfigError> {
    s.exclusive(steps, ratio)?;
    let share = s.number(ratio, "a number from 0 to 1", |share| (0.0..=1.0).contains(&share))?;
    let steps = s.integer(steps, 0..=MAX_STEPS)?;
    Ok(steps.map(|taken| Portion::Steps(taken.value)).or(share.map(|taken| Portion::Ratio(taken.value))))
}

fn training(s: &mut Section) -> Result<Training, ConfigError> {
    s.exclusive("steps", "epochs")?;
    s.exclusive("grad_accumulation", "global_batch_size")?;
    let duration = match (s.integer("steps", 1..=MAX_STEPS)?, s.integer("epochs", 1..=MAX_STEPS)?) {
        (Some(steps), _) => Duration::Steps(steps.value),
        (None, Some(epochs)) => Duration::Epochs(epochs.value),
        (None, None) => return Err(s.missing("steps", "steps or epochs")),
    };
    let seq_len =
        s.integer("seq_len", 1..=MAX_SEQ_LEN)?.ok_or_else(|| s.missing("seq_len", "the tokens of a sequence"))?;
    let micro_batch_size = s.integer("micro_batch_size", 1..=MAX_BATCH)?.map_or(1, |taken| taken.value);
    let batch = match s.integer("global_batch_size", 1..=MAX_BATCH)? {
        Some(size) if !size.value.is_multiple_of(micro_batch_size) => {
            let expected = format!("a multiple of micro_batch_size = {micro_batch_size}");
            return Err(s.wrong(&size.at, "global_batch_size", &expected, size.value.to_string(), ""));
        }
        Some(size) => Batch::GlobalBatch(size.value),
        None => {
            Batch::Accumulation(s.integer("grad_accumulation", 1..=MAX_ACCUMULATION)?.map_or(1, |taken| taken.value))
        }
    };
    let max_grad_norm = s
        .number("max_grad_norm", "a number of at least 0 (0 = no clipping)", |norm| norm >= 0.0)?
        .map_or(1.0, |taken| taken.value);
    Ok(Training {
        duration,
        seq_len: seq_len.value,
        micro_batch_size,
        batch,
        max_grad_norm: (max_grad_norm > 0.0).then_some(max_grad_norm),
        seed: s.integer("seed", 0..=i64::MAX as u64)?.map_or(0, |taken| taken.value),
        deterministic: s.boolean("deterministic", false)?,
        on_nonfinite: s.choice("on_nonfinite", OnNonfinite::CHOICES, &[])?.unwrap_or(OnNonfinite::Stop),
    })
}

fn data(s: &mut Section) -> Result<Data, ConfigError> {
    const TRAIN: &str = "an array of JSONL files, such as [\"train.jsonl\"]";
    let train = s.strings("train", TRAIN)?;
    if train.is_empty() {
        return Err(s.missing("train", TRAIN));
    }
    Ok(Data {
        train: train.into_iter().map(PathBuf::from).collect(),
        format: s.choice("format", Format::CHOICES, &["chat", "classification"])?.unwrap_or(Format::Auto),
        shuffle: s.boolean("shuffle", true)?,
        packing: s.off("packing")?,
    })
}

fn validation(s: &mut Section) -> Result<Validation, ConfigError> {
    let validation = Validation {
        data: s.strings("data", "an array of JSONL files")?.into_iter().map(PathBuf::from).collect(),
        every_steps: s.integer("every_steps", 0..=MAX_STEPS)?.map_or(0, |taken| taken.value),
        prompts: s.strings("prompts", "an array of strings")?,
        max_new_tokens: s.integer("max_new_tokens", 1..=MAX_SEQ_LEN)?.map_or(32, |taken| taken.value),
    };
    if validation.data.is_empty() && validation.prompts.is_empty() {
        return Err(s.missing("data", "data or prompts"));
    }
    Ok(validation)
}

fn checkpoint(s: &mut Section) -> Result<Checkpoint, ConfigError> {
    let every_steps = s.integer("every_steps", 0..=MAX_STEPS)?.map_or(500, |taken| taken.value);
    let keep_every = match s.integer("keep_every", 0..=MAX_STEPS)? {
        None => 0,
        Some(taken) if taken.value.is_multiple_of(every_steps) => taken.value,
        Some(taken) => {
            let expected = format!("a multiple of every_steps, {every_steps}, or 0");
            return Err(s.wrong(&taken.at, "keep_every", &expected, taken.value.to_string(), ""));
        }
    };
    Ok(Checkpoint {
        every_steps,
        keep: s.integer("keep", 2..=1_000_000)?.map_or(2, |taken| taken.value),
        resume: match s.string("resume", "\"auto\", \"never\" or the path of a checkpoint")? {
            None => Resume::Auto,
            Some(taken) => match taken.value.as_str() {
                "auto" => Resume::Auto,
                "never" => Resume::Never,
                path => Resume::Path(path.into()),
            },
        },
        keep_every,
        async_save: s.boolean("async", true)?,
    })
}

fn metrics(s: &mut Section) -> Result<Metrics, ConfigError> {
    Ok(Metrics {
        log_every: s.integer("log_every", 1..=MAX_STEPS)?.map_or(10, |taken| taken.value),
        tensorboard: s.off("tensorboard")?,
        trace_steps: trace_steps(s)?,
        peak_tflops: s.number("peak_tflops", "a number above 0", |peak| peak > 0.0)?.map(|taken| taken.value),
    })
}

/// `"10-12"` or `"10"`.
fn trace_steps(s: &mut Section) -> Result<Option<TraceSteps>, ConfigError> {
    const STEPS: &str = "steps counted from 1, such as \"10-12\"";
    let Some(taken) = s.string("trace_steps", STEPS)? else { return Ok(None) };
    let number = |text: &str| text.trim().parse::<u64>().ok().filter(|step| (1..=MAX_STEPS).contains(step));
    let (first, last) = taken.value.split_once('-').unwrap_or((&taken.value, &taken.value));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(Some(TraceSteps { first, last })),
        _ => Err(s.wrong(&taken.at, "trace_steps", STEPS, format!("{:?}", taken.value), "")),
    }
}

fn output(s: &mut Section) -> Result<Output, ConfigError> {
    Ok(Output {
        dir: s.string("dir", "a folder to write to")?.map_or_else(|| "out".to_owned(), |taken| taken.value).into(),
        dtype: s.choice("dtype", OutputDtype::CHOICES, &[])?.unwrap_or(OutputDtype::Auto),
    })
}
