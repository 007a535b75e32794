//! `config.json` in both forms and of every family; what is wrong or not built is refused with file and key.

use std::path::Path;

use fsdp_plan::units::units;
use fsdp_plan::{
    Architecture, DeviceKind, Dtype, Family, Offload, Plan, PlanError, PlanInput, RopeScaling, Strategy, Unit,
};
use serde_json::{Value, json};

fn parse(config: &Value) -> Result<Architecture, PlanError> {
    Architecture::parse(Path::new("model/config.json"), &config.to_string())
}

/// `base` with the keys of `changes` set.
fn with(mut base: Value, changes: Value) -> Value {
    base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    base
}

/// `base` without one key.
fn without(mut base: Value, key: &str) -> Value {
    base.as_object_mut().unwrap().remove(key).unwrap();
    base
}

/// Only what every file must have.
fn minimal(architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 1000,
        "num_hidden_layers": 32, "vocab_size": 500,
    })
}

fn llama_3_1_8b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "tie_word_embeddings": false, "use_cache": true, "vocab_size": 128256,
    })
}

fn mistral_7b() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000,
    })
}

fn qwen2_5_0_5b() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936,
    })
}

fn qwen3_0_6b() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936,
    })
}

#[test]
fn published_models_have_their_published_sizes() {
    for (config, family, expected) in [
        (llama_3_1_8b(), Family::Llama, 8_030_261_248),
        (mistral_7b(), Family::Mistral, 7_241_732_096),
        (qwen2_5_0_5b(), Family::Qwen2, 494_032_768),
        (qwen3_0_6b(), Family::Qwen3, 596_049_920),
    ] {
        let arch = parse(&config).unwrap();
        assert_eq!(arch.family, family);
        let num_params: usize = units(&arch).iter().map(Unit::num_params).sum();
        assert_eq!(num_params, expected, "{family:?}");
    }
}

#[test]
fn llama_3_1_is_read_in_full() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    let expected = Architecture {
        family: Family::Llama,
        vocab_size: 128256,
        hidden_size: 4096,
        intermediate_size: 14336,
        num_layers: 32,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        max_position_embeddings: 131072,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: llama3,
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_windows: vec![None; 32],
        initializer_range: 0.02,
    };
    assert_eq!(parse(&llama_3_1_8b()).unwrap(), expected);
    // The same in the newer form.
    let mut newer = without(llama_3_1_8b(), "rope_theta");
    let mut table = newer.as_object_mut().unwrap().remove("rope_scaling").unwrap();
    table["rope_theta"] = json!(500000.0);
    newer["rope_parameters"] = table;
    assert_eq!(parse(&newer).unwrap(), expected);
}

#[test]
fn rotary_settings_mean_what_they_mean_to_transformers() {
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    let linear_with_theta = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0});
    let default = json!({"rope_type": "default", "rope_theta": 3.0});
    let scaled = RopeScaling::Linear { factor: 2.0 };
    for (changes, theta, scaling) in [
        (json!({}), 10_000.0, RopeScaling::Default),
        (json!({"rope_theta": 5}), 5.0, RopeScaling::Default),
        (json!({"rope_theta": 5, "rope_scaling": null, "rope_parameters": null}), 5.0, RopeScaling::Default),
        (json!({"rope_scaling": {}, "rope_parameters": default}), 3.0, RopeScaling::Default),
        (json!({"rope_parameters": {"rope_theta": 3.0}}), 3.0, RopeScaling::Default),
        (json!({"rope_scaling": linear, "rope_theta": 5}), 5.0, scaled),
        (json!({"rope_scaling": {"type": "linear", "factor": 2}}), 10_000.0, scaled),
        (json!({"rope_parameters": linear}), 10_000.0, scaled),
        (json!({"rope_parameters": linear_with_theta, "rope_theta": 5}), 7.0, scaled),
        // Where both tables are there, the older one counts.
        (json!({"rope_scaling": linear, "rope_parameters": default}), 10_000.0, scaled),
    ] {
        let arch = parse(&with(minimal("LlamaForCausalLM"), changes.clone())).unwrap();
        assert_eq!((arch.rope_theta, arch.rope_scaling), (theta, scaling), "{changes}");
    }
}

#[test]
fn missing_keys_mean_what_they_mean_to_transformers() {
    for (name, num_kv_heads, positions, window) in [
        ("LlamaForCausalLM", 64, 2048, None),
        ("MistralForCausalLM", 8, 131_072, Some(4096)),
        ("Qwen2ForCausalLM", 32, 32_768, None),
        ("Qwen3ForCausalLM", 32, 32_768, None),
    ] {
        let arch = parse(&minimal(name)).unwrap();
        assert_eq!(arch.num_kv_heads, num_kv_heads, "{name}");
        assert_eq!(arch.max_position_embeddings, positions, "{name}");
        assert_eq!(arch.sliding_windows, vec![window; 32], "{name}");
        assert_eq!((arch.head_dim, arch.rms_norm_eps, arch.initializer_range), (128, 1e-6, 0.02), "{name}");
        assert!(!arch.tie_word_embeddings, "{name}");
        // null is not missing.
        let arch = parse(&with(minimal(name), json!({"num_key_value_heads": null, "sliding_window": null}))).unwrap();
        assert_eq!((arch.num_kv_heads, arch.sliding_windows), (64, vec![None; 32]), "{name}");
    }
    let narrow = json!({"hidden_size": 1024, "num_key_value_heads": 8});
    assert_eq!(parse(&with(minimal("Qwen2ForCausalLM"), narrow.clone())).unwrap().head_dim, 16);
    assert_eq!(parse(&with(minimal("Qwen3ForCausalLM"), narrow)).unwrap().head_dim, 128);
}

#[test]
fn biases_and_norms_follow_the_family() {
    for (name, changes, qkv_bias, o_bias, mlp_bias, qk_norm) in [
        ("LlamaForCausalLM", json!({}), false, false, false, false),
        ("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true}), true, true, true, false),
        ("MistralForCausalLM", json!({"attention_bias": true, "mlp_bias": true}), false, false, false, false),
        ("Qwen2ForCausalLM", json!({"attention_bias": false, "mlp_bias": true}), true, false, false, false),
        ("Qwen3ForCausalLM", json!({}), false, false, false, true),
        ("Qwen3ForCausalLM", json!({"attention_bias": true}), true, true, false, true),
    ] {
        let a = parse(&with(minimal(name), changes)).unwrap();
        assert_eq!((a.qkv_bias, a.o_bias, a.mlp_bias, a.qk_norm), (qkv_bias, o_bias, mlp_bias, qk_norm), "{name}");
        let names: Vec<String> = units(&a)[1].params.iter().map(|p| p.name.clone()).collect();
        let has = |part: &str| names.contains(&format!("model.layers.0.{part}"));
        assert_eq!((has("self_attn.q_proj.bias"), has("self_attn.v_proj.bias")), (qkv_bias, qkv_bias), "{name}");
        assert_eq!((has("self_attn.o_proj.bias"), has("mlp.up_proj.bias")), (o_bias, mlp_bias), "{name}");
        assert_eq!((has("self_attn.q_norm.weight"), has("self_attn.k_norm.weight")), (qk_norm, qk_norm), "{name}");
    }
}

#[test]
fn sliding_windows_follow_the_layers() {
    let on = json!({"num_hidden_layers": 4, "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 3});
    let types = json!(["sliding_attention", "full_attention", "full_attention", "sliding_attention"]);
    for (name, changes, expected) in [
        ("LlamaForCausalLM", json!({}), [None; 4]),
        ("MistralForCausalLM", json!({}), [Some(9); 4]),
        ("Qwen2ForCausalLM", json!({}), [None, None, None, Some(9)]),
        ("Qwen3ForCausalLM", json!({"layer_types": types}), [Some(9), None, None, Some(9)]),
        ("Qwen3ForCausalLM", json!({"layer_types": types, "use_sliding_window": false}), [None; 4]),
    ] {
        let arch = parse(&with(with(minimal(name), on.clone()), changes)).unwrap();
        assert_eq!(arch.sliding_windows, expected, "{name}");
    }
}

#[test]
fn bad_values_are_refused_by_key() {
    let llama = || minimal("LlamaForCausalLM");
    let mistral = || minimal("MistralForCausalLM");
    let qwen = |changes| with(with(minimal("Qwen2ForCausalLM"), json!({"use_sliding_window": true})), changes);
    let rope = |table: Value| with(llama(), json!({ "rope_scaling": table }));
    let long = "x".repeat(1000);
    // Config, key, and what the message says besides.
    let cases = [
        (without(llama(), "architectures"), "architectures", "LlamaForCausalLM, MistralForCausalLM"),
        (minimal("GPT2LMHeadModel"), "architectures", r#"got ["GPT2LMHeadModel"]"#),
        (with(llama(), json!({"architectures": []})), "architectures", "got []"),
        (with(llama(), json!({"architectures": "LlamaForCausalLM"})), "architectures", "one of"),
        (without(llama(), "hidden_size"), "hidden_size", "got nothing"),
        (without(llama(), "num_attention_heads"), "num_attention_heads", "got nothing"),
        (without(llama(), "intermediate_size"), "intermediate_size", "got nothing"),
        (without(llama(), "num_hidden_layers"), "num_hidden_layers", "got nothing"),
        (without(llama(), "vocab_size"), "vocab_size", "got nothing"),
        (with(llama(), json!({"vocab_size": null})), "vocab_size", "got nothing"),
        (with(llama(), json!({"vocab_size": 0})), "vocab_size", "a whole number from 1 to 4194304, got 0"),
        (with(llama(), json!({"vocab_size": -1})), "vocab_size", "got -1"),
        (with(llama(), json!({"vocab_size": 32000.5})), "vocab_size", "got 32000.5"),
        (with(llama(), json!({"vocab_size": "32000"})), "vocab_size", r#"got "32000""#),
        (with(llama(), json!({"vocab_size": [1]})), "vocab_size", "got [1]"),
        (with(llama(), json!({"vocab_size": u64::MAX})), "vocab_size", "got 18446744073709551615"),
        (with(llama(), json!({"vocab_size": 1e30})), "vocab_size", "got 1e+30"),
        (with(llama(), json!({"hidden_size": 1u64 << 40})), "hidden_size", "to 4194304"),
        (with(llama(), json!({"intermediate_size": 1u64 << 23})), "intermediate_size", "to 4194304"),
        (with(llama(), json!({"num_hidden_layers": 0})), "num_hidden_layers", "got 0"),
        (with(llama(), json!({"num_hidden_layers": 2_000_000_000})), "num_hidden_layers", "from 1 to 10000"),
        (with(llama(), json!({"num_attention_heads": 0})), "num_attention_heads", "got 0"),
        (with(llama(), json!({"num_attention_heads": 60})), "num_attention_heads", "a divisor of hidden_size = 8192"),
        (with(llama(), json!({"num_attention_heads": 5000})), "num_attention_heads", "to 4096"),
        (with(llama(), json!({"num_key_value_heads": 0})), "num_key_value_heads", "got 0"),
        (with(llama(), json!({"num_key_value_heads": 7})), "num_key_value_heads", "attention_heads = 64, got 7"),
        (with(mistral(), json!({"num_attention_heads": 4})), "num_key_value_heads", "got 8"),
        (with(llama(), json!({"head_dim": 0})), "head_dim", "got 0"),
        (with(llama(), json!({"head_dim": 33})), "head_dim", "an even number"),
        (with(llama(), json!({"hidden_size": 320})), "head_dim", "got 5"),
        (with(llama(), json!({"max_position_embeddings": 0})), "max_position_embeddings", "got 0"),
        (with(llama(), json!({"rms_norm_eps": -1e-5})), "rms_norm_eps", "not negative"),
        (with(llama(), json!({"rms_norm_eps": "1e-5"})), "rms_norm_eps", "a number"),
        (with(llama(), json!({"initializer_range": []})), "initializer_range", "a number"),
        (with(llama(), json!({"tie_word_embeddings": "true"})), "tie_word_embeddings", "true or false"),
        (with(llama(), json!({"attention_bias": 1})), "attention_bias", "true or false"),
        (with(llama(), json!({"mlp_bias": "no"})), "mlp_bias", "true or false"),
        (with(llama(), json!({"hidden_act": "gelu"})), "hidden_act", r#"expected "silu", got "gelu""#),
        (with(llama(), json!({"quantization_config": {"bits": 4}})), "quantization_config", "unquantised"),
        (with(llama(), json!({"quantization_config": long})), "quantization_config", "xxx..."),
        (with(llama(), json!({"attention_dropout": 0.1})), "attention_dropout", "not built"),
        (with(llama(), json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor", "not built"),
        (with(llama(), json!({"rope_theta": 0})), "rope_theta", "a number above 0"),
        (with(llama(), json!({"rope_theta": "1e4"})), "rope_theta", "a number above 0"),
        (rope(json!("linear")), "rope_scaling", "an object"),
        (rope(json!({"factor": 2.0})), "rope_scaling.rope_type", "default, linear, llama3, got nothing"),
        (rope(json!({"rope_type": "yarn", "factor": 2.0})), "rope_scaling.rope_type", r#"got "yarn""#),
        (rope(json!({"type": "dynamic", "factor": 2.0})), "rope_scaling.rope_type", r#"got "dynamic""#),
        (rope(json!({"rope_type": 1})), "rope_scaling.rope_type", "got 1"),
        (rope(json!({"rope_type": "linear"})), "rope_scaling.factor", "got nothing"),
        (rope(json!({"rope_type": "linear", "factor": 0})), "rope_scaling.factor", "a number above 0, got 0"),
        (rope(json!({"rope_type": "llama3", "factor": 8.0})), "rope_scaling.low_freq_factor", "got nothing"),
        (
            rope(json!({"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4})),
            "rope_scaling.high_freq_factor",
            "a number above low_freq_factor = 4",
        ),
        (
            with(llama(), json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}})),
            "rope_parameters.rope_type",
            "got nothing",
        ),
        (
            with(llama(), json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})),
            "rope_parameters.partial_rotary_factor",
            "not built",
        ),
        (with(mistral(), json!({"sliding_window": 0})), "sliding_window", "got 0"),
        (qwen(json!({"use_sliding_window": "yes"})), "use_sliding_window", "true or false"),
        (qwen(json!({"max_window_layers": -1})), "max_window_layers", "a whole number"),
        (qwen(json!({"layer_types": ["full_attention"]})), "layer_types", "32 times"),
        (qwen(json!({"layer_types": vec!["chunked_attention"; 32]})), "layer_types", "full_attention or"),
        (
            // Every size within its range, 4 x 10^16 parameters in all.
            with(llama(), json!({"hidden_size": 1 << 22, "intermediate_size": 1 << 22, "num_attention_heads": 4096})),
            "hidden_size",
            "at most 1099511627776 parameters",
        ),
    ];
    for (config, key, says) in cases {
        let message = parse(&config).expect_err(key).to_string();
        assert!(message.starts_with(&format!("model/config.json: key `{key}`: expected ")), "{message}");
        assert!(message.contains(says), "{message}: should say {says}");
        assert!(message.len() < 300, "{message}");
    }
}

#[test]
fn the_largest_accepted_sizes_are_planned_without_overflow() {
    let huge = json!({
        "num_hidden_layers": 10_000, "hidden_size": 4096, "intermediate_size": 2048, "vocab_size": 1 << 22,
        "num_attention_heads": 16, "max_position_embeddings": 1u64 << 31,
    });
    let arch = parse(&with(minimal("LlamaForCausalLM"), huge)).unwrap();
    let input = PlanInput {
        num_shards: 1,
        num_replicas: 1,
        strategy: Strategy::NoShard,
        resident_units: 0,
        prefetch: 64,
        recompute: false,
        accumulation: 1,
        micro_batch_size: 1 << 20,
        seq_len: 1 << 24,
        compute_dtype: Dtype::Fp32,
        device: DeviceKind::Cpu,
        offload: Offload::None,
    };
    let plan = Plan::new(arch, &input, |_| (Dtype::Fp32, Dtype::Fp32));
    assert_eq!(plan.replay.peak.total_bytes(), u64::MAX);
    assert!(plan.to_string().contains("TiB"));
}

#[test]
fn unreadable_files_are_named() {
    let folder = std::env::temp_dir().join(format!("fsdp-plan-arch-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("config.json");
    let message = |path: &Path| Architecture::from_config_json(path).unwrap_err().to_string();
    let expect = |got: String, says: &str| {
        assert!(got.starts_with(&file.display().to_string()) && got.contains(says), "{got}: should say {says}");
    };
    // A folder stands for the file in it.
    expect(message(&folder), "cannot be read");
    for (bytes, says) in [
        (&b""[..], "not valid JSON"),
        (b"{\"a\": 1,}", "line 1 column 9"),
        (b"[1, 2]", "expected a map"),
        (b"\"LlamaForCausalLM\"", "expected a map"),
        (b"{\"vocab_size\": 1e999}", "number out of range"),
        (b"\xff\xfe{}", "cannot be read"),
        (&b"[".repeat(100_000)[..], "not valid JSON"),
        (&b" ".repeat((1 << 20) + 1)[..], "1048577 bytes, at most 1048576 expected"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        expect(message(&file), says);
        expect(message(&folder), says);
    }
    std::fs::write(&file, llama_3_1_8b().to_string()).unwrap();
    assert_eq!(Architecture::from_config_json(&folder).unwrap(), parse(&llama_3_1_8b()).unwrap());
    // It would never end, as a pipe would never begin.
    std::fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
    expect(message(&file), "not a regular file");
    std::fs::remove_dir_all(&folder).unwrap();
}
