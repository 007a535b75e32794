//! Which keys may differ from the config that a checkpoint was made with.

use crate::job::JobConfig;

/// Keys that a resumed run may change: how long it is, what it prints and keeps, and how the same numbers come about.
/// A table alone stands for all its keys.
const MAY_DIFFER: &[&str] = &[
    "training.steps",
    "training.epochs",
    "training.on_nonfinite",
    "fsdp.strategy",
    "fsdp.shard_size",
    "fsdp.resident_units",
    "fsdp.prefetch",
    "fsdp.backend",
    "fsdp.device",
    "fsdp.offload",
    "fsdp.timeout_secs",
    "activation_checkpointing.mode",
    "metrics",
    "checkpoint",
    "output",
];

/// A key that differs between a checkpoint and the run that wants to continue it, with both values in TOML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: expected {saved} as in the checkpoint, got {now}; set it back, or start in another output folder")]
pub struct Difference {
    /// `[table] key`.
    pub key: String,
    /// The checkpoint's value, or `nothing`.
    pub saved: String,
    /// The run's value, or `nothing`.
    pub now: String,
}

/// Whether a run with the config `now` may continue a checkpoint that was made with `saved`.
///
/// # Errors
/// Every key that differs and may not, in the order of the interface.
pub fn compatible_for_resume(saved: &JobConfig, now: &JobConfig) -> Result<(), Vec<Difference>> {
    let texts = |config: &JobConfig| -> Vec<(&'static str, &'static str, String)> {
        let entries = config.entries().into_iter();
        entries
            .filter(|(table, key, _)| {
                let full = format!("{table}.{key}");
                !MAY_DIFFER.iter().any(|name| name == table || *name == full)
            })
            .map(|(table, key, value)| (table, key, value.to_string()))
            .collect()
    };
    let (saved, now) = (texts(saved), texts(now));
    let value_in = |side: &[(&str, &str, String)], table: &str, key: &str| {
        let found = side.iter().find(|(t, k, _)| (*t, *k) == (table, key));
        found.map_or_else(|| "nothing".to_owned(), |(.., value)| value.clone())
    };
    let mut differences = Vec::new();
    for (table, key, _) in saved.iter().chain(&now) {
        let difference = Difference {
            key: format!("[{table}] {key}"),
            saved: value_in(&saved, table, key),
            now: value_in(&now, table, key),
        };
        if difference.saved != difference.now && !differences.contains(&difference) {
            differences.push(difference);
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(differences) }
}
