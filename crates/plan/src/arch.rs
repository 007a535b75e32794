//! `config.json` of a Hugging Face model folder -> [`Architecture`].
//!
//! Both forms of rotary settings are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
//! (transformers 5). A key that is left out means what it means to transformers. Whatever changes the mathematics and is
//! not built is refused by name.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

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

    /// `num_key_value_heads`, `head_dim` and `max_position_embeddings` where the file lacks the key; `None` derives the
    /// size from others, as a `null` in the file does.
    fn defaults(self) -> (Option<usize>, Option<usize>, usize) {
        match self {
            Family::Llama => (None, None, 2048),
            Family::Mistral => (Some(8), None, 131_072),
            Family::Qwen2 => (Some(32), None, 32_768),
            Family::Qwen3 => (Some(32), Some(128), 32_768),
        }
    }
}

/// `sliding_window` and `max_window_layers` where the file lacks the key.
const DEFAULT_SLIDING_WINDOW: usize = 4096;
const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

// Above any real model, and low enough that bytes and products of sizes fit into 64 bits.
const MAX_SIZE: usize = 1 << 22;
const MAX_LAYERS: usize = 10_000;
/// Heads of a block, and elements of a head.
const MAX_HEADS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 31;
const MAX_PARAMS: usize = 1 << 40;

/// Of `config.json`. In memory a value takes tens of times the bytes of its text.
const MAX_FILE_BYTES: u64 = 1 << 20;

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
        let text = read_text(&path).map_err(|source| PlanError::Read { path: path.clone(), source })?;
        Self::parse(&path, &text)
    }

    /// Elements of all matrices, a tied one counted twice.
    fn num_matrix_params(&self) -> usize {
        let attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim;
        let block = self.hidden_size * (attention + 3 * self.intermediate_size);
        2 * self.vocab_size * self.hidden_size + self.num_layers * block
    }

    /// Parses the text of a `config.json`; `path` is only named in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PlanError> {
        let map = serde_json::from_str(text).map_err(|source| PlanError::Json { path: path.to_path_buf(), source })?;
        let keys = Keys { path, map: &map };

        let family = keys.family()?;
        keys.must_be("hidden_act", "silu")?;
        keys.refuse_if_set("quantization_config", "an unquantised model")?;
        if keys.f64_or("attention_dropout", 0.0)? != 0.0 {
            return Err(keys.error("attention_dropout", "0 (attention dropout is not built)"));
        }
        if keys.f64_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(keys.error("partial_rotary_factor", "1 (partial rotation is not built)"));
        }

        let (default_kv_heads, default_head_dim, default_positions) = family.defaults();
        let hidden_size = keys.size("hidden_size", MAX_SIZE)?;
        let num_heads = keys.size("num_attention_heads", MAX_HEADS)?;
        let num_kv_heads = match keys.size_or_default("num_key_value_heads", default_kv_heads, MAX_HEADS)? {
            Some(n) if num_heads % n != 0 => {
                let expected = format!("a divisor of num_attention_heads = {num_heads}");
                return Err(keys.error_got("num_key_value_heads", &expected, Some(&n.into())));
            }
            Some(n) => n,
            None => num_heads,
        };
        let head_dim = match keys.size_or_default("head_dim", default_head_dim, MAX_HEADS)? {
            Some(n) => n,
            None if hidden_size % num_heads != 0 => {
                return Err(keys.error("num_attention_heads", &format!("a divisor of hidden_size = {hidden_size}")));
            }
            None => hidden_size / num_heads,
        };
        if head_dim % 2 != 0 {
            let expected = "an even number (rotary positions turn pairs)";
            return Err(keys.error_got("head_dim", expected, Some(&head_dim.into())));
        }
        let num_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let bias = keys.bool_or("attention_bias", false)?;
        let (rope_theta, rope_scaling) = keys.rope()?;
        let arch = Architecture {
            family,
            vocab_size: keys.size("vocab_size", MAX_SIZE)?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_SIZE)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: keys
                .size_or_default("max_position_embeddings", Some(default_positions), MAX_POSITIONS)?
                .unwrap_or(default_positions),
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
        if arch.num_matrix_params() > MAX_PARAMS {
            let expected = format!("sizes that make at most {MAX_PARAMS} parameters in all");
            return Err(keys.error_got("hidden_size", &expected, Some(&arch.num_matrix_params().into())));
        }
        Ok(arch)
    }
}

/// The text of a file of a model folder. A pipe would block for ever, and of no file but a small one can the values be held.
fn read_text(path: &Path) -> std::io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("{} bytes, at most {MAX_FILE_BYTES} expected", metadata.len())));
    }
    std::fs::read_to_string(path)
}

/// So much of a value that a message stays one line.
fn shortened(text: String) -> String {
    const MAX_CHARS: usize = 60;
    if text.chars().count() <= MAX_CHARS { text } else { text.chars().take(MAX_CHARS).chain("...".chars()).collect() }
}

/// The keys of one `config.json`, with errors that name file, key, expected and got.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
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
            got: got.map_or("nothing".to_string(), |v| shortened(v.to_string())),
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

    fn size(&self, key: &str, max: usize) -> Result<usize, PlanError> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) if (1..=max as u64).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, &format!("a whole number from 1 to {max}"))),
        }
    }

    /// The size, `default` where the key is missing, `None` where it is `null`.
    fn size_or_default(&self, key: &str, default: Option<usize>, max: usize) -> Result<Option<usize>, PlanError> {
        match self.map.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size(key, max).map(Some),
        }
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
        // transformers 5 has everything in rope_parameters, transformers 4 splits it over two keys. An empty table is
        // none, and where both are there the older one counts.
        let in_use = |key: &&str| self.get(key).is_some_and(|v| v.as_object().is_none_or(|t| !t.is_empty()));
        let table_key = ["rope_scaling", "rope_parameters"].into_iter().find(in_use);
        let Some(table_key) = table_key else {
            return Ok((self.positive("rope_theta", self.get("rope_theta"), Some(10_000.0))?, RopeScaling::Default));
        };
        let table = self.get(table_key).and_then(Value::as_object);
        let table = table.ok_or_else(|| self.error(table_key, "an object"))?;
        let number = |key: &str, default: Option<f64>| -> Result<f64, PlanError> {
            self.positive(&format!("{table_key}.{key}"), table.get(key), default)
        };
        let theta = match table.get("rope_theta") {
            None => self.positive("rope_theta", self.get("rope_theta"), Some(10_000.0))?,
            _ => number("rope_theta", None)?,
        };
        if number("partial_rotary_factor", Some(1.0))? != 1.0 {
            let key = format!("{table_key}.partial_rotary_factor");
            return Err(self.error_got(&key, "1 (partial rotation is not built)", table.get("partial_rotary_factor")));
        }
        // Older files say `type`.
        let kind = table.get("rope_type").or_else(|| table.get("type"));
        let scaling = match kind.map(Value::as_str) {
            // A table for each layer type has neither of these keys.
            None if table.contains_key("rope_theta") => RopeScaling::Default,
            Some(Some("default")) => RopeScaling::Default,
            Some(Some("linear")) => RopeScaling::Linear { factor: number("factor", None)? },
            Some(Some("llama3")) => {
                let low_freq_factor = number("low_freq_factor", None)?;
                let high_freq_factor = number("high_freq_factor", None)?;
                if high_freq_factor <= low_freq_factor {
                    let key = format!("{table_key}.high_freq_factor");
                    let expected = format!("a number above low_freq_factor = {low_freq_factor}");
                    return Err(self.error_got(&key, &expected, table.get("high_freq_factor")));
                }
                RopeScaling::Llama3 {
                    factor: number("factor", None)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: number("original_max_position_embeddings", None)?,
                }
            }
            _ => {
                let key = format!("{table_key}.rope_type");
                return Err(self.error_got(&key, "one of default, linear, llama3", kind));
            }
        };
        Ok((theta, scaling))
    }

    /// `value` of `key`, or `default` where there is none.
    fn positive(&self, key: &str, value: Option<&Value>, default: Option<f64>) -> Result<f64, PlanError> {
        match (value, default) {
            (None, Some(default)) => Ok(default),
            _ => value
                .and_then(Value::as_f64)
                .filter(|x| *x > 0.0)
                .ok_or_else(|| self.error_got(key, "a number above 0", value)),
        }
    }

    /// For each block, the window of its attention.
    fn sliding_windows(&self, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>, PlanError> {
        let in_use = match family {
            Family::Llama => false,
            Family::Mistral => true,
            Family::Qwen2 | Family::Qwen3 => self.bool_or("use_sliding_window", false)?,
        };
        if !in_use {
            return Ok(vec![None; num_layers]);
        }
        let window = self.size_or_default("sliding_window", Some(DEFAULT_SLIDING_WINDOW), MAX_POSITIONS)?;
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
        let num_full = match self.get("max_window_layers") {
            None => DEFAULT_MAX_WINDOW_LAYERS,
            Some(v) => v.as_u64().ok_or_else(|| self.error("max_window_layers", "a whole number"))? as usize,
        };
        Ok((0..num_layers).map(|i| if i < num_full { None } else { window }).collect())
    }
}
