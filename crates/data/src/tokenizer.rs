//! A model folder's tokenizer.
//!
//! `tokenizer.json` is input: a hostile or broken one makes the `tokenizers` crate panic (a regex that backtracks
//! without end, for one). Each call into it therefore runs behind `catch_unwind`, and a panic becomes an error.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::{Path, PathBuf};
use std::sync::Once;

use serde_json::Value;
use tokenizers::{ModelWrapper, PostProcessorWrapper, Tokenizer};

use crate::error::DataError;
use crate::format::Format;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// The largest tokenizer.json is about 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Of the files beside it. In memory a value takes tens of times the bytes of its text.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// More than nearly any text has.
const BYTES_PER_TOKEN: usize = 16;

/// `tokenizer.json` with the special tokens that `tokenizer_config.json` and `special_tokens_map.json` name.
#[derive(Debug)]
pub struct TextTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    largest: (String, u32),
    /// Put before a text; none if the tokenizer does not do so.
    bos_id: Option<i64>,
    eos_id: Option<i64>,
    pad_id: i64,
    /// Of a character that it does not know, nothing may be left.
    drops_characters: bool,
}

/// xxh3-128 digest of a model folder's tokenizer files, as 32 hexadecimal digits; of nothing where there are none.
///
/// # Errors
/// One is there and cannot be read.
pub fn tokenizer_digest(dir: &Path) -> Result<String, DataError> {
    let mut digest = xxhash_rust::xxh3::Xxh3::new();
    for (name, max_bytes) in
        [(TOKENIZER, MAX_FILE_BYTES), (TOKENIZER_CONFIG, MAX_CONFIG_BYTES), (SPECIAL_TOKENS, MAX_CONFIG_BYTES)]
    {
        if let Some(bytes) = read_bounded(&dir.join(name), max_bytes)? {
            digest.update(&bytes);
        }
    }
    Ok(format!("{:032x}", digest.digest128()))
}

impl TextTokenizer {
    /// Opens the tokenizer of a model folder.
    ///
    /// The beginning of sequence is added to texts if `add_bos_token` in tokenizer_config.json says so or, where that
    /// is silent, if the post-processor of tokenizer.json does.
    pub fn open(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join(TOKENIZER);
        let bytes = read_bounded(&path, MAX_FILE_BYTES)?.ok_or_else(|| DataError::Tokenizer {
            path: path.clone(),
            reason: "is missing; the model folder needs it (transformers writes it: \
                     AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
                .to_owned(),
        })?;
        let broken = |reason: String| DataError::Tokenizer {
            path: path.clone(),
            reason: format!("is not a usable tokenizer: {reason}"),
        };
        let mut tokenizer = guarded(|| {
            let mut tokenizer = Tokenizer::from_bytes(&bytes)?;
            // Lengths are this crate's business; a file may ask for absurd ones.
            tokenizer.with_truncation(None)?;
            tokenizer.with_padding(None);
            Ok(tokenizer)
        })
        .map_err(broken)?;
        drop(bytes);
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_some_and(|share| share > 0.0)
        {
            let reason = "its model drops merges at random, so that no run is like another; set model.dropout to null";
            return Err(broken(reason.to_owned()));
        }
        let largest = tokenizer
            .get_vocab(true)
            .into_iter()
            .max_by_key(|(_, id)| *id)
            .ok_or_else(|| broken("its vocabulary is empty".to_owned()))?;

        let config = read_json(&dir.join(TOKENIZER_CONFIG))?;
        let map = read_json(&dir.join(SPECIAL_TOKENS))?;
        let special = |key: &str| {
            let token = token_text(&config[key]).or_else(|| token_text(&map[key]))?;
            tokenizer.token_to_id(token).map(i64::from)
        };
        let bos = special("bos_token");
        let eos_id = special("eos_token");
        let pad_id = special("pad_token").unwrap_or(0);
        let adds_bos = match &config["add_bos_token"] {
            Value::Bool(add) => *add,
            _ => {
                let empty = guarded(|| tokenizer.encode_fast("", true)).map_err(broken)?;
                let first = empty.get_ids().first().map(|id| i64::from(*id));
                first.is_some() && first == bos
            }
        };
        let bos_id = bos.filter(|_| adds_bos);
        // What it adds is known now; from here on, this crate adds it.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        // No vocabulary has the last character of Unicode. A tokenizer that fails on it fails on texts, too.
        let drops_characters = num_dropped(&tokenizer, "\u{10ffff}").is_ok_and(|num| num > 0);
        Ok(TextTokenizer { path, tokenizer, largest, bos_id, eos_id, pad_id, drops_characters })
    }

    /// The ids of a user's prompt as a model trained on `format` should see it: the format's prompt text around it,
    /// the beginning of sequence before it if the tokenizer adds one, no end of sequence.
    pub fn encode_prompt(&self, prompt: &str, format: Format) -> Result<Vec<i64>, DataError> {
        let mut ids = self.bos();
        ids.extend(self.encode(&format.apply_prompt(prompt)).map_err(|e| self.error(e))?);
        Ok(ids)
    }

    /// The text of `ids`, special tokens left out. An id that the tokenizer does not know has no text.
    pub fn decode(&self, ids: &[i64]) -> Result<String, DataError> {
        let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
        guarded(|| self.tokenizer.decode(&ids, true)).map_err(|e| self.error(e))
    }

    pub fn eos_id(&self) -> Option<i64> {
        self.eos_id
    }

    /// The largest id + 1: the rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.largest.1 as usize + 1
    }

    /// The error for an embedding with fewer rows than this tokenizer has ids.
    pub fn check_fits(&self, vocab_size: usize) -> Result<(), DataError> {
        if self.vocab_size() <= vocab_size {
            return Ok(());
        }
        Err(DataError::VocabularyTooLarge {
            path: self.path.clone(),
            token: self.largest.0.clone(),
            max_id: self.largest.1,
            vocab_size,
        })
    }

    pub(crate) fn pad_id(&self) -> i64 {
        self.pad_id
    }

    /// The beginning of sequence, or nothing.
    pub(crate) fn bos(&self) -> Vec<i64> {
        self.bos_id.into_iter().collect()
    }

    /// The ids of `text` alone, nothing added; all of them, or well more than `num_tokens`. Of a text far longer than
    /// that only the beginning is tokenised, which takes hundreds of bytes of memory for each byte of text.
    pub(crate) fn encode_first(&self, text: &str, num_tokens: usize) -> Result<Vec<i64>, String> {
        let mut num_bytes = num_tokens.saturating_mul(BYTES_PER_TOKEN);
        loop {
            let beginning = beginning(text, num_bytes);
            let ids = self.encode(beginning)?;
            // How the beginning ends is not how the text goes on, but that shows only in its last few ids.
            if beginning.len() == text.len() || ids.len() > 2 * num_tokens + 64 {
                return Ok(ids);
            }
            num_bytes = num_bytes.saturating_mul(4);
        }
    }

    /// Characters of about the first `num_tokens` tokens of `text` that no token stands for, white space apart. Only tokenizers with neither bytes nor an unknown token leave any out.
    pub(crate) fn num_dropped(&self, text: &str, num_tokens: usize) -> Result<u64, String> {
        if !self.drops_characters {
            return Ok(0);
        }
        num_dropped(&self.tokenizer, beginning(text, num_tokens.saturating_mul(BYTES_PER_TOKEN)))
    }

    /// The error is the reason, without a path.
    fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
        let encoding = guarded(|| self.tokenizer.encode_fast(text, false))?;
        match encoding.get_ids().iter().find(|id| **id > self.largest.1) {
            Some(id) => Err(format!("it gives id {id}, which is not in its vocabulary")),
            None => Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect()),
        }
    }

    fn error(&self, reason: String) -> DataError {
        DataError::Tokenizer { path: self.path.clone(), reason: format!("the tokenizer fails: {reason}") }
    }
}

/// The first `num_bytes` of `text`, or a few less.
fn beginning(text: &str, num_bytes: usize) -> &str {
    let mut end = text.len().min(num_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Characters of `text` that are in no token and are no white space.
fn num_dropped(tokenizer: &Tokenizer, text: &str) -> Result<u64, String> {
    let encoding = guarded(|| tokenizer.encode(text, false))?;
    // For each byte, how many tokens begin there less those that end there.
    let mut changes = vec![0i64; text.len() + 1];
    for &(start, end) in encoding.get_offsets() {
        if start < end && end <= text.len() {
            changes[start] += 1;
            changes[end] -= 1;
        }
    }
    let mut num_open = 0;
    let covered: Vec<bool> = changes
        .iter()
        .map(|change| {
            num_open += change;
            num_open > 0
        })
        .collect();
    Ok(text.char_indices().filter(|(at, c)| !c.is_whitespace() && !covered[*at]).count() as u64)
}

/// `"<s>"` or `{"content": "<s>", ...}`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// A JSON file of the model folder; null if there is none.
fn read_json(path: &Path) -> Result<Value, DataError> {
    let Some(bytes) = read_bounded(path, MAX_CONFIG_BYTES)? else {
        return Ok(Value::Null);
    };
    serde_json::from_slice(&bytes)
        .map_err(|e| DataError::Tokenizer { path: path.to_owned(), reason: format!("is not JSON: {e}") })
}

fn read_bounded(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), action: "read", source };
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    if !metadata.is_file() || metadata.len() > max_bytes {
        return Err(DataError::Tokenizer {
            path: path.to_owned(),
            reason: format!("expected a regular file of at most {max_bytes} bytes"),
        });
    }
    std::fs::read(path).map(Some).map_err(io)
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a call into the `tokenizers` crate; a panic in it is an error like any other and prints nothing.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                report(info);
            }
        }));
    });
    GUARDED.set(true);
    // The tokenizer's only state is a cache behind a lock, which a panic poisons at worst: then each call fails.
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(false);
    match result {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "it panics".to_owned())),
    }
}
