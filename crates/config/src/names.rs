//! Every table and key there is, what other tools call them, and what an unknown name may have meant.

use crate::error::ConfigError;
use crate::raw::{Entry, Place, RawConfig, RawTable, Value};

/// All tables with their keys.
pub(crate) const TABLES: &[(&str, &[&str])] = &[
    ("model", &["path", "init"]),
    (
        "fsdp",
        &[
            "strategy",
            "shard_size",
            "wrap",
            "resident_units",
            "prefetch",
            "backend",
            "device",
            "offload",
            "timeout_secs",
        ],
    ),
    ("precision", &["param", "reduce", "buffer", "override"]),
    ("activation_checkpointing", &["mode"]),
    ("optimizer", &["lr", "betas", "eps", "weight_decay"]),
    ("lr_scheduler", &["kind", "warmup_steps", "warmup_ratio", "min_lr", "decay_steps", "decay_ratio"]),
    (
        "training",
        &[
            "steps",
            "epochs",
            "seq_len",
            "micro_batch_size",
            "grad_accumulation",
            "global_batch_size",
            "max_grad_norm",
            "seed",
            "deterministic",
            "on_nonfinite",
        ],
    ),
    ("data", &["train", "format", "shuffle", "packing"]),
    ("validation", &["data", "every_steps", "prompts", "max_new_tokens"]),
    ("checkpoint", &["every_steps", "keep", "keep_every", "resume", "async"]),
    ("metrics", &["log_every", "tensorboard", "trace_steps", "peak_tflops"]),
    ("output", &["dir", "dtype"]),
];

/// The keys of one `[[precision.override]]`.
pub(crate) const OVERRIDE_KEYS: &[&str] = &["match", "param", "reduce"];

/// Pairs of keys of which a table has at most one.
const ALTERNATIVES: &[(&str, &str, &str)] = &[
    ("training", "steps", "epochs"),
    ("training", "grad_accumulation", "global_batch_size"),
    ("lr_scheduler", "warmup_steps", "warmup_ratio"),
    ("lr_scheduler", "decay_steps", "decay_ratio"),
];

/// The key that excludes `key`.
pub(crate) fn alternative(table: &str, key: &str) -> Option<&'static str> {
    ALTERNATIVES.iter().find_map(|&(of, a, b)| match key {
        _ if of != table => None,
        _ if key == a => Some(b),
        _ if key == b => Some(a),
        _ => None,
    })
}

/// What torchtitan, axolotl and the Hugging Face Trainer call our keys: (their name, our table, our key).
const OTHER_TOOLS: &[(&str, &str, &str)] = &[
    ("hf_assets_path", "model", "path"),
    ("model_name_or_path", "model", "path"),
    ("base_model", "model", "path"),
    ("initial_load_path", "model", "path"),
    ("sharding_strategy", "fsdp", "strategy"),
    ("fsdp_sharding_strategy", "fsdp", "strategy"),
    ("reshard_after_forward", "fsdp", "strategy"),
    ("fsdp_reshard_after_forward", "fsdp", "strategy"),
    ("fsdp_reshard_after_forward_policy", "fsdp", "strategy"),
    ("data_parallel_shard_degree", "fsdp", "shard_size"),
    ("hybrid_sharding_group_size", "fsdp", "shard_size"),
    ("cpu_offload", "fsdp", "offload"),
    ("fsdp_offload_params", "fsdp", "offload"),
    ("fsdp_cpu_offload", "fsdp", "offload"),
    ("auto_wrap_policy", "fsdp", "wrap"),
    ("fsdp_auto_wrap_policy", "fsdp", "wrap"),
    ("fsdp_transformer_layer_cls_to_wrap", "fsdp", "wrap"),
    ("backward_prefetch", "fsdp", "prefetch"),
    ("forward_prefetch", "fsdp", "prefetch"),
    ("fsdp_backward_prefetch", "fsdp", "prefetch"),
    ("ddp_backend", "fsdp", "backend"),
    ("ddp_timeout", "fsdp", "timeout_secs"),
    ("train_timeout_seconds", "fsdp", "timeout_secs"),
    ("mixed_precision_param", "precision", "param"),
    ("mixed_precision", "precision", "param"),
    ("param_dtype", "precision", "param"),
    ("bf16", "precision", "param"),
    ("fp16", "precision", "param"),
    ("mixed_precision_reduce", "precision", "reduce"),
    ("reduce_dtype", "precision", "reduce"),
    ("buffer_dtype", "precision", "buffer"),
    ("gradient_checkpointing", "activation_checkpointing", "mode"),
    ("selective_ac_option", "activation_checkpointing", "mode"),
    ("fsdp_activation_checkpointing", "activation_checkpointing", "mode"),
    ("learning_rate", "optimizer", "lr"),
    ("adam_beta1", "optimizer", "betas"),
    ("adam_beta2", "optimizer", "betas"),
    ("beta1", "optimizer", "betas"),
    ("beta2", "optimizer", "betas"),
    ("adam_epsilon", "optimizer", "eps"),
    ("lr_scheduler_type", "lr_scheduler", "kind"),
    ("decay_type", "lr_scheduler", "kind"),
    ("num_warmup_steps", "lr_scheduler", "warmup_steps"),
    ("min_lr_factor", "lr_scheduler", "min_lr"),
    ("lr_min", "lr_scheduler", "min_lr"),
    ("min_lr_ratio", "lr_scheduler", "min_lr"),
    ("cosine_min_lr_ratio", "lr_scheduler", "min_lr"),
    ("num_decay_steps", "lr_scheduler", "decay_steps"),
    ("max_steps", "training", "steps"),
    ("num_epochs", "training", "epochs"),
    ("num_train_epochs", "training", "epochs"),
    ("sequence_len", "training", "seq_len"),
    ("max_seq_length", "training", "seq_len"),
    ("max_length", "training", "seq_len"),
    ("local_batch_size", "training", "micro_batch_size"),
    ("per_device_train_batch_size", "training", "micro_batch_size"),
    ("batch_size", "training", "micro_batch_size"),
    ("gradient_accumulation_steps", "training", "grad_accumulation"),
    ("gradient_accumulation", "training", "grad_accumulation"),
    ("max_norm", "training", "max_grad_norm"),
    ("gradient_clipping", "training", "max_grad_norm"),
    ("clip_grad_norm", "training", "max_grad_norm"),
    ("full_determinism", "training", "deterministic"),
    ("dataset", "data", "train"),
    ("dataset_path", "data", "train"),
    ("datasets", "data", "train"),
    ("train_file", "data", "train"),
    ("train_on_inputs", "data", "format"),
    ("sample_packing", "data", "packing"),
    ("shuffle_merged_datasets", "data", "shuffle"),
    ("eval_dataset", "validation", "data"),
    ("test_datasets", "validation", "data"),
    ("validation_file", "validation", "data"),
    ("eval_steps", "validation", "every_steps"),
    ("interval", "checkpoint", "every_steps"),
    ("save_steps", "checkpoint", "every_steps"),
    ("keep_latest_k", "checkpoint", "keep"),
    ("save_total_limit", "checkpoint", "keep"),
    ("resume_from_checkpoint", "checkpoint", "resume"),
    ("auto_resume_from_checkpoints", "checkpoint", "resume"),
    ("async_mode", "checkpoint", "async"),
    ("log_freq", "metrics", "log_every"),
    ("logging_steps", "metrics", "log_every"),
    ("enable_tensorboard", "metrics", "tensorboard"),
    ("use_tensorboard", "metrics", "tensorboard"),
    ("report_to", "metrics", "tensorboard"),
    ("enable_profiling", "metrics", "trace_steps"),
    ("profile_freq", "metrics", "trace_steps"),
    ("output_dir", "output", "dir"),
    ("dump_folder", "output", "dir"),
    ("export_dtype", "output", "dtype"),
];

/// What other tools call our tables: (their name, ours).
const OTHER_TABLES: &[(&str, &str)] = &[
    ("job", "output"),
    ("parallelism", "fsdp"),
    ("fsdp_config", "fsdp"),
    ("activation_checkpoint", "activation_checkpointing"),
    ("dataset", "data"),
    ("mixed_precision", "precision"),
    ("eval", "validation"),
    ("scheduler", "lr_scheduler"),
    ("optim", "optimizer"),
];

/// Refuses the first name, as the user wrote them, that is none of ours.
pub(crate) fn check(config: &RawConfig) -> Result<(), ConfigError> {
    let mut unknown: Vec<(&Place, ConfigError)> = Vec::new();
    for (name, entry) in &config.root {
        let known = TABLES.iter().find(|(table, _)| table == name);
        match (&entry.value.value, known) {
            (Value::Table(keys), Some((table, known))) => {
                for (key, entry) in keys {
                    if !known.contains(&key.as_str()) {
                        unknown.push((&entry.key_at, unknown_key(table, known, key, entry)));
                    }
                }
            }
            (Value::Table(keys), None) => {
                unknown.push((&entry.key_at, unknown_table(name, keys, entry)));
            }
            (_, Some(_)) => unknown.push((
                &entry.key_at,
                ConfigError::Value {
                    at: entry.value.at.text.clone(),
                    key: format!("[{name}]"),
                    expected: "a table".to_owned(),
                    got: entry.value.value.describe(),
                    hint: String::new(),
                },
            )),
            (_, None) => unknown.push((
                &entry.key_at,
                ConfigError::Unknown {
                    at: entry.key_at.text.clone(),
                    key: name.clone(),
                    expected: "a table".to_owned(),
                    hint: elsewhere(name)
                        .or_else(|| nearest_anywhere(name))
                        .unwrap_or_else(|| format!("every key belongs to a table: {}", table_list())),
                },
            )),
        }
    }
    match unknown.into_iter().min_by_key(|(place, _)| place.order) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// The error for a key that `[table]`, which has the keys `known`, does not have.
pub(crate) fn unknown_key(table: &str, known: &[&str], key: &str, entry: &Entry) -> ConfigError {
    let hint = elsewhere(key)
        .or_else(|| nearest(key, known.iter().copied(), 0.6).map(|near| format!("did you mean {near}?")))
        .or_else(|| nearest_anywhere(key))
        .unwrap_or_else(|| format!("[{table}] has {}", known.join(", ")));
    ConfigError::Unknown {
        at: entry.key_at.text.clone(),
        key: format!("[{table}] {key}"),
        expected: format!("a key of [{table}]"),
        hint,
    }
}

fn unknown_table(name: &str, keys: &RawTable, entry: &Entry) -> ConfigError {
    let theirs = OTHER_TABLES.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours);
    let mut hint = match theirs.or_else(|| nearest(name, TABLES.iter().map(|(table, _)| *table), 0.6)) {
        Some(near) => format!("did you mean [{near}]?"),
        None => format!("the tables are {}", table_list()),
    };
    // The first of its keys that is known under another name says more than the table's own name.
    if let Some(moved) = keys.keys().find_map(|key| elsewhere(key)) {
        hint = format!("{hint} {moved}");
    }
    ConfigError::Unknown {
        at: entry.key_at.text.clone(),
        key: format!("[{name}]"),
        expected: "a known table".to_owned(),
        hint,
    }
}

/// Where `key` lives, if it is another tool's name or lives in another table.
fn elsewhere(key: &str) -> Option<String> {
    let key = key.to_lowercase();
    if let Some((_, table, ours)) = OTHER_TOOLS.iter().find(|(theirs, ..)| *theirs == key) {
        return Some(format!("another tool's {key} is [{table}] {ours} here"));
    }
    let homes: Vec<String> =
        TABLES.iter().filter(|(_, keys)| keys.contains(&key.as_str())).map(|(table, _)| format!("[{table}]")).collect();
    (!homes.is_empty()).then(|| format!("{key} belongs to {}", homes.join(" or ")))
}

fn nearest_anywhere(key: &str) -> Option<String> {
    let all = TABLES.iter().flat_map(|(table, keys)| keys.iter().map(move |ours| (*table, *ours)));
    let theirs = OTHER_TOOLS.iter().map(|(name, table, ours)| (*name, (*table, *ours)));
    let (_, (table, ours)) = all
        .map(|(table, ours)| (ours, (table, ours)))
        .chain(theirs)
        .map(|(name, home)| (strsim::normalized_damerau_levenshtein(key, name), home))
        .filter(|(similarity, _)| *similarity >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(format!("did you mean [{table}] {ours}?"))
}

pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>, at_least: f64) -> Option<&'a str> {
    known
        .map(|known| (strsim::normalized_damerau_levenshtein(name, known), known))
        .filter(|(similarity, _)| *similarity >= at_least)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

fn table_list() -> String {
    let names: Vec<String> = TABLES.iter().map(|(table, _)| format!("[{table}]")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_tools_lead_to_keys_that_exist() {
        for (theirs, table, key) in OTHER_TOOLS {
            let (_, keys) = TABLES.iter().find(|(name, _)| name == table).expect(theirs);
            assert!(keys.contains(key), "{theirs} -> [{table}] {key}");
        }
        for (theirs, ours) in OTHER_TABLES {
            assert!(TABLES.iter().any(|(table, _)| table == ours), "{theirs} -> [{ours}]");
        }
        for (table, a, b) in ALTERNATIVES {
            assert_eq!(alternative(table, a), Some(*b));
            assert_eq!(alternative(table, b), Some(*a));
        }
    }
}
