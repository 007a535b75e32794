//! `config.json`.

use std::path::Path;

use fsdp_plan::{Architecture, PlanError, RopeScaling, units};
use serde_json::{Map, Value};

use crate::within::memory_bound;

/// Units of deeper models are not listed here, for want of time.
const MAX_LISTED_LAYERS: usize = 64;

/// An accepted config describes a model that can be computed: sizes that fit each other, numbers that can be counted. A
/// refusal names the file, and a key if it is JSON.
pub fn model_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let path = Path::new("model/config.json");
    let parsed = memory_bound(data.len(), || Architecture::parse(path, text));
    match parsed {
        Ok(arch) => check(&arch),
        Err(error) => {
            assert!(error.to_string().contains("model/config.json"), "{error}");
            match error {
                PlanError::Json { .. } => assert!(serde_json::from_str::<Map<String, Value>>(text).is_err()),
                PlanError::Key { key, expected, got, .. } => assert!(![key, expected, got].contains(&String::new())),
                PlanError::Read { .. } => panic!("nothing was read"),
            }
        }
    }
}

fn check(arch: &Architecture) {
    let sizes = [
        arch.vocab_size,
        arch.hidden_size,
        arch.intermediate_size,
        arch.num_layers,
        arch.num_heads,
        arch.num_kv_heads,
        arch.head_dim,
        arch.max_position_embeddings,
    ];
    assert!(!sizes.contains(&0), "{arch:?}");
    assert!(arch.num_heads.is_multiple_of(arch.num_kv_heads) && arch.head_dim.is_multiple_of(2), "{arch:?}");
    assert_eq!(arch.sliding_windows.len(), arch.num_layers);
    assert!(arch.sliding_windows.iter().flatten().all(|window| *window > 0), "{arch:?}");
    let mut numbers = vec![arch.rms_norm_eps, arch.rope_theta, arch.initializer_range];
    match arch.rope_scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => numbers.push(factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            assert!(low_freq_factor < high_freq_factor, "{arch:?}");
            numbers.extend([factor, low_freq_factor, high_freq_factor, original_max_position_embeddings]);
        }
    }
    assert!(numbers.iter().all(|number| number.is_finite() && *number >= 0.0), "{arch:?}");
    if arch.num_layers <= MAX_LISTED_LAYERS {
        let units = units::units(arch);
        assert_eq!(units.len(), arch.num_layers + 2);
        let num_params: Option<usize> = units.iter().try_fold(0usize, |sum, unit| sum.checked_add(unit.num_params()));
        // In fp32, with both moments and a gradient.
        assert!(num_params.and_then(|num| num.checked_mul(16)).is_some(), "{arch:?}");
    }
}
