//! `config.json` of a Hugging Face model folder -> [`Architecture`].
//!
//! Both forms of rotary settings are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
//! (transformers 5). Whatever changes the mathematics and is not built is refused by name.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// The decoder families that are built. They share one block; the differences are fields of [`Architecture`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    const NAMES: [(&'static str, Family); 4] = [
        ("LlamaForCausalLM", Family::Llama),
        ("MistralForCausalLM", Family::Mistral),
        ("Qwen2ForCausalLM", Family::Qwen2),
        ("Qwen3ForCausalLM", Family::Qwen3),
    ];
}

/// How rotary frequencies are changed for longer contexts (transformers `modeling_rope_utils.py`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

/// Sizes and options of a decoder-only transformer with RMSNorm, rotary positions and a gated SiLU MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the o projection.
    pub o_bias: bool,
    /// Biases on the gate, up and down projections.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before the rotation.
    pub qk_norm: bool,
    /// For each block: attend to this many last positions only.
    pub sliding_windows: Vec<Option<usize>>,
    /// Standard deviation of randomly initialised matrices.
    pub initializer_range: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not valid JSON: {source}", path = path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: key `{key}`: expected {expected}, got {got}", path = path.display())]
    Key { path: PathBuf, key: String, expected: String, got: String },
}

impl Architecture {
    /// Reads `config.json` at `path` (a file, or the model folder that holds it).
    pub fn from_config_json(path: &Path) -> Result<Self, PlanError> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let text = std::fs::read_to_string(&path).map_err(|source| PlanError::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    /// Parses the text of a `config.json`; `path` is only named in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PlanError> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| PlanError::Json { path: path.to_path_buf(), source })?;
        let keys = Keys { path, map: &value };

        let family = keys.family()?;
        keys.must_be("hidden_act", "silu")?;
        keys.refuse_if_set("quantization_config", "an unquantised model")?;
        if keys.f64_or("attention_dropout", 0.0)? != 0.0 {
            return Err(keys.error("attention_dropout", "0 (attention dropout is not built)"));
        }
        if keys.f64_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(keys.error("partial_rotary_factor", "1 (partial rotation is not built)"));
        }

        let hidden_size = keys.size("hidden_size")?;
        let num_heads = keys.size("num_attention_heads")?;
        let num_kv_heads = keys.size_or("num_key_value_heads", num_heads)?;
        if num_heads % num_kv_heads != 0 {
            return Err(keys.error("num_key_value_heads", &format!("a divisor of num_attention_heads = {num_heads}")));
        }
        if keys.get("head_dim").is_none() && hidden_size % num_heads != 0 {
            return Err(keys.error("num_attention_heads", &format!("a divisor of hidden_size = {hidden_size}")));
        }
        let head_dim = keys.size_or("head_dim", hidden_size / num_heads)?;
        if head_dim % 2 != 0 {
            return Err(keys.error("head_dim", "an even number (rotary positions turn pairs)"));
        }
        let num_layers = keys.size("num_hidden_layers")?;
        let bias = keys.bool_or("attention_bias", false)?;
        let (rope_theta, rope_scaling) = keys.rope()?;
        let arch = Architecture {
            family,
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: keys.size_or("max_position_embeddings", 2048)?,
            rms_norm_eps: keys.f64_or("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
            qkv_bias: matches!(family, Family::Qwen2) || (bias && family != Family::Mistral),
            o_bias: bias && matches!(family, Family::Llama | Family::Qwen3),
            mlp_bias: family == Family::Llama && keys.bool_or("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            sliding_windows: keys.sliding_windows(family, num_layers)?,
            initializer_range: keys.f64_or("initializer_range", 0.02)?,
        };
        Ok(arch)
    }
}

/// The keys of one `config.json`, with errors that name file, key, expected and got.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Value,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn error(&self, key: &str, expected: &str) -> PlanError {
        self.error_got(key, expected, self.get(key))
    }

    fn error_got(&self, key: &str, expected: &str, got: Option<&Value>) -> PlanError {
        PlanError::Key {
            path: self.path.to_path_buf(),
            key: key.to_string(),
            expected: expected.to_string(),
            got: got.map_or("nothing".to_string(), |v| v.to_string()),
        }
    }

    fn family(&self) -> Result<Family, PlanError> {
        let known = Family::NAMES.map(|(name, _)| name).join(", ");
        let expected = format!("one of {known}");
        let name = self.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        Family::NAMES
            .iter()
            .find(|(known, _)| Some(*known) == name)
            .map(|(_, family)| *family)
            .ok_or_else(|| self.error("architectures", &expected))
    }

    /// A positive size that is small enough for products of two to be counted.
    fn size(&self, key: &str) -> Result<usize, PlanError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) if (1..1 << 31).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, "a positive whole number below 2^31")),
        }
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, PlanError> {
        if self.get(key).is_none() { Ok(default) } else { self.size(key) }
    }

    fn f64_or(&self, key: &str, default: f64) -> Result<f64, PlanError> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().filter(|x| *x >= 0.0).ok_or_else(|| self.error(key, "a number, not negative")),
        }
    }

    fn bool_or(&self, key: &str, default: bool) -> Result<bool, PlanError> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.error(key, "true or false")),
        }
    }

    fn must_be(&self, key: &str, only: &str) -> Result<(), PlanError> {
        match self.get(key) {
            Some(v) if v.as_str() != Some(only) => Err(self.error(key, &format!("\"{only}\""))),
            _ => Ok(()),
        }
    }

    fn refuse_if_set(&self, key: &str, expected: &str) -> Result<(), PlanError> {
        if self.get(key).is_some() { Err(self.error(key, expected)) } else { Ok(()) }
    }

    fn rope(&self) -> Result<(f64, RopeScaling), PlanError> {
        // transformers 5 has everything in rope_parameters, transformers 4 splits it over two keys.
        let table_key = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let table = self.get(table_key);
        let number = |key: &str| -> Result<f64, PlanError> {
            let got = table.and_then(|t| t.get(key));
            got.and_then(Value::as_f64)
                .filter(|x| *x > 0.0)
                .ok_or_else(|| self.error_got(&format!("{table_key}.{key}"), "a positive number", got))
        };
        let theta = match table.and_then(|t| t.get("rope_theta")) {
            Some(_) => number("rope_theta")?,
            None => self.f64_or("rope_theta", 10_000.0)?,
        };
        // Older files say `type`.
        let kind = table.and_then(|t| t.get("rope_type").or_else(|| t.get("type")));
        let scaling = match kind.map(|k| k.as_str()) {
            None if table.is_none() || table_key == "rope_parameters" => RopeScaling::Default,
            Some(Some("default")) => RopeScaling::Default,
            Some(Some("linear")) => RopeScaling::Linear { factor: number("factor")? },
            Some(Some("llama3")) => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            _ => {
                let key = format!("{table_key}.rope_type");
                return Err(self.error_got(&key, "one of default, linear, llama3", kind));
            }
        };
        Ok((theta, scaling))
    }

    fn sliding_windows(&self, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>, PlanError> {
        let none = vec![None; num_layers];
        let in_use = match family {
            Family::Llama => false,
            Family::Mistral => self.get("sliding_window").is_some(),
            Family::Qwen2 | Family::Qwen3 => self.bool_or("use_sliding_window", false)?,
        };
        if !in_use {
            return Ok(none);
        }
        let window = Some(self.size("sliding_window")?);
        if family == Family::Mistral {
            return Ok(vec![window; num_layers]);
        }
        if let Some(types) = self.get("layer_types") {
            let expected = format!("{num_layers} times full_attention or sliding_attention");
            let types = types.as_array().filter(|t| t.len() == num_layers);
            let types = types.ok_or_else(|| self.error("layer_types", &expected))?;
            return types
                .iter()
                .map(|t| match t.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") => Ok(window),
                    _ => Err(self.error("layer_types", &expected)),
                })
                .collect();
        }
        // Without layer_types the first max_window_layers blocks attend to everything.
        let full = match self.get("max_window_layers") {
            None => 28,
            Some(v) => v.as_u64().ok_or_else(|| self.error("max_window_layers", "a whole number"))? as usize,
        };
        Ok((0..num_layers).map(|i| if i < full { None } else { window }).collect())
    }
}
