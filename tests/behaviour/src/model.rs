//! Tiny model folders.

use std::collections::BTreeMap;
use std::path::Path;

use fsdp_plan::{Architecture, units};
use safetensors::tensor::{Dtype, TensorView};

/// A Llama with two blocks and its own head.
pub const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
    "torch_dtype": "float32"
}"#;

/// Words `<unk>`, `w1` to `w47`, split at spaces.
pub fn tokenizer() -> String {
    let words: Vec<String> = (1..48).map(|i| format!("\"w{i}\": {i}")).collect();
    format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {{"type": "Whitespace"}}, "post_processor": null, "decoder": null,
            "model": {{"type": "WordLevel", "vocab": {{"<unk>": 0, {}}}, "unk_token": "<unk>"}}}}"#,
        words.join(", ")
    )
}

/// One tensor as a file has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    /// Deterministic numbers around zero, or around one for norms.
    pub fn new(name: &str, shape: &[usize], dtype: Dtype) -> Self {
        let center = if name.contains("norm") { 1.0 } else { 0.0 };
        let mut state = name.bytes().fold(7u64, |s, b| s.wrapping_mul(31).wrapping_add(u64::from(b)));
        let mut bytes = Vec::new();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = center + ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.4;
            match dtype {
                // The upper half of an f32 is a bf16.
                Dtype::BF16 => bytes.extend_from_slice(&value.to_le_bytes()[2..]),
                _ => bytes.extend_from_slice(&value.to_le_bytes()),
            }
        }
        Stored { dtype, shape: shape.to_vec(), bytes }
    }
}

/// The tensors that `config.json` in `folder` asks for.
pub fn tensors(folder: &Path, dtype: Dtype) -> BTreeMap<String, Stored> {
    let arch = Architecture::from_config_json(folder).expect("the test's own config");
    let params = units::units(&arch).into_iter().flat_map(|unit| unit.params);
    params.map(|p| (p.name.clone(), Stored::new(&p.name, &p.shape, dtype))).collect()
}

pub fn write(path: &Path, tensors: &BTreeMap<String, Stored>) {
    let views = tensors.iter().map(|(name, t)| {
        (name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("bytes fit shape and dtype"))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).expect("a file that can be written");
}

/// Writes two files and their index.
pub fn write_sharded(folder: &Path, tensors: &BTreeMap<String, Stored>) {
    let mut parts = [BTreeMap::new(), BTreeMap::new()];
    let mut weight_map = BTreeMap::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        parts[i % 2].insert(name.clone(), tensor.clone());
        weight_map.insert(name, part_name(i % 2));
    }
    for (i, part) in parts.iter().enumerate() {
        write(&folder.join(part_name(i)), part);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("a folder of the test");
}

fn part_name(part: usize) -> String {
    format!("model-{:05}-of-00002.safetensors", part + 1)
}

/// All tensors of the safetensors files in `folder`.
pub fn read(folder: &Path) -> BTreeMap<String, Stored> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("a model folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = std::fs::read(&path).expect("a readable file");
            for (name, t) in safetensors::SafeTensors::deserialize(&bytes).expect("safetensors").tensors() {
                let stored = Stored { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
                assert!(tensors.insert(name.clone(), stored).is_none(), "{name} is in two files");
            }
        }
    }
    tensors
}
