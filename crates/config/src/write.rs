//! A validated config as TOML again.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::Value;

use crate::job::*;
use crate::lr_scheduler::{LrKind, Portion};

impl JobConfig {
    /// The config as TOML with every key written out, which [`JobConfig::from_resolved`] reads as the same config.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut last_table = "";
        for (table, key, value) in self.entries() {
            if table != last_table {
                let gap = if last_table.is_empty() { "" } else { "\n" };
                writeln!(text, "{gap}[{table}]").expect("a string takes any text");
                last_table = table;
            }
            writeln!(text, "{key} = {value}").expect("a string takes any text");
        }
        text
    }

    /// Every (table, key, value) that is set, in the order of the interface.
    pub(crate) fn entries(&self) -> Vec<(&'static str, &'static str, Value)> {
        let mut entries = Vec::new();
        let mut add = |table, key, value: Value| entries.push((table, key, value));

        add("model", "path", self.model.path.as_str().into());
        add("model", "init", self.model.init.name().into());

        add("fsdp", "strategy", self.fsdp.strategy.name().into());
        if let Some(size) = self.fsdp.shard_size {
            add("fsdp", "shard_size", integer(size));
        }
        add("fsdp", "wrap", self.fsdp.wrap.name().into());
        if self.fsdp.resident_units > 0 {
            add("fsdp", "resident_units", integer(self.fsdp.resident_units));
        }
        add("fsdp", "prefetch", integer(self.fsdp.prefetch));
        add("fsdp", "backend", self.fsdp.backend.name().into());
        add("fsdp", "device", self.fsdp.device.name().into());
        add("fsdp", "offload", self.fsdp.offload.name().into());
        add("fsdp", "timeout_secs", integer(self.fsdp.timeout_secs));

        add("precision", "param", self.precision.param.name().into());
        add("precision", "reduce", self.precision.reduce.name().into());
        add("precision", "buffer", self.precision.buffer.name().into());
        if !self.precision.overrides.is_empty() {
            add("precision", "override", overrides(&self.precision.overrides));
        }

        add("activation_checkpointing", "mode", self.activation_checkpointing.mode.name().into());

        add("optimizer", "lr", self.optimizer.lr.into());
        add("optimizer", "betas", self.optimizer.betas.to_vec().into());
        add("optimizer", "eps", self.optimizer.eps.into());
        add("optimizer", "weight_decay", self.optimizer.weight_decay.into());

        let scheduler = &self.lr_scheduler;
        add("lr_scheduler", "kind", scheduler.kind.name().into());
        match scheduler.warmup {
            Portion::Steps(steps) => add("lr_scheduler", "warmup_steps", integer(steps)),
            Portion::Ratio(ratio) => add("lr_scheduler", "warmup_ratio", ratio.into()),
        }
        if scheduler.kind != LrKind::Constant {
            add("lr_scheduler", "min_lr", scheduler.min_lr.into());
        }
        if scheduler.kind == LrKind::Wsd {
            match scheduler.decay {
                Portion::Steps(steps) => add("lr_scheduler", "decay_steps", integer(steps)),
                Portion::Ratio(ratio) => add("lr_scheduler", "decay_ratio", ratio.into()),
            }
        }

        match self.training.duration {
            Duration::Steps(steps) => add("training", "steps", integer(steps)),
            Duration::Epochs(epochs) => add("training", "epochs", integer(epochs)),
        }
        add("training", "seq_len", integer(self.training.seq_len));
        add("training", "micro_batch_size", integer(self.training.micro_batch_size));
        match self.training.batch {
            Batch::Accumulation(num) => add("training", "grad_accumulation", integer(num)),
            Batch::GlobalBatch(size) => add("training", "global_batch_size", integer(size)),
        }
        add("training", "max_grad_norm", self.training.max_grad_norm.unwrap_or(0.0).into());
        add("training", "seed", integer(self.training.seed));
        add("training", "deterministic", self.training.deterministic.into());
        add("training", "on_nonfinite", self.training.on_nonfinite.name().into());

        add("data", "train", paths(&self.data.train));
        add("data", "format", self.data.format.name().into());
        add("data", "shuffle", self.data.shuffle.into());
        add("data", "packing", self.data.packing.into());

        if let Some(validation) = &self.validation {
            add("validation", "data", paths(&validation.data));
            add("validation", "every_steps", integer(validation.every_steps));
            add("validation", "prompts", validation.prompts.clone().into());
            add("validation", "max_new_tokens", integer(validation.max_new_tokens));
        }

        add("checkpoint", "every_steps", integer(self.checkpoint.every_steps));
        add("checkpoint", "keep", integer(self.checkpoint.keep));
        add("checkpoint", "keep_every", integer(self.checkpoint.keep_every));
        add(
            "checkpoint",
            "resume",
            match &self.checkpoint.resume {
                Resume::Auto => "auto".into(),
                Resume::Never => "never".into(),
                Resume::Path(folder) => path(folder),
            },
        );
        add("checkpoint", "async", self.checkpoint.async_save.into());

        add("metrics", "log_every", integer(self.metrics.log_every));
        add("metrics", "tensorboard", self.metrics.tensorboard.into());
        if let Some(TraceSteps { first, last }) = self.metrics.trace_steps {
            add("metrics", "trace_steps", format!("{first}-{last}").into());
        }
        if let Some(peak) = self.metrics.peak_tflops {
            add("metrics", "peak_tflops", peak.into());
        }

        add("output", "dir", path(&self.output.dir));
        add("output", "dtype", self.output.dtype.name().into());
        entries
    }
}

/// Integers come from TOML's 64-bit signed ones, so they go back into them.
fn integer(number: u64) -> Value {
    Value::Integer(i64::try_from(number).expect("config integers are below 2^63"))
}

/// Paths come from TOML, which is UTF-8.
fn path(path: &Path) -> Value {
    Value::String(path.to_str().expect("config paths are UTF-8").to_owned())
}

fn paths(list: &[PathBuf]) -> Value {
    Value::Array(list.iter().map(|item| path(item)).collect())
}

/// `[[precision.override]]` as an array of inline tables, which TOML takes for the same thing.
fn overrides(rules: &[PrecisionOverride]) -> Value {
    let rule = |rule: &PrecisionOverride| {
        let mut table = toml::Table::new();
        table.insert("match".to_owned(), rule.match_glob.as_str().into());
        for (key, dtype) in [("param", rule.param), ("reduce", rule.reduce)] {
            if let Some(dtype) = dtype {
                table.insert(key.to_owned(), dtype.name().into());
            }
        }
        Value::Table(table)
    };
    Value::Array(rules.iter().map(rule).collect())
}
