//! `tokenizer.json`, and a text for it.

use std::fs;

use fsdp_data::{DataError, DataSpec, Format, TextTokenizer, check};
use serde_json::json;
use tempfile::TempDir;

use crate::safetensors::scratch_folder;
use crate::within::memory_bound;

/// Behind the tokenizer, before the text.
const SEPARATOR: u8 = 0;
const TEXT: &str = "a b, ab. é日本 1234\n";

/// A tokenizer, which a NUL separates from a text; without one, there is a text of its own.
///
/// Nothing panics, also where the library does; each id is in the vocabulary of the tokenizer; a refusal names the tokenizer
/// or the line.
pub fn tokenizer(data: &[u8]) {
    thread_local! {
        static FOLDER: TempDir = scratch_folder();
    }
    let mut parts = data.splitn(2, |byte| *byte == SEPARATOR);
    let tokenizer = parts.next().unwrap_or_default();
    let text = parts.next().map_or(TEXT.into(), String::from_utf8_lossy);
    FOLDER.with(|folder| {
        let folder = folder.path();
        fs::write(folder.join("tokenizer.json"), tokenizer).expect("a folder of the target");
        fs::write(folder.join("text.jsonl"), json!({"text": text}).to_string()).expect("a folder of the target");
        memory_bound(data.len(), || match TextTokenizer::open(folder) {
            Ok(tokenizer) => {
                assert!(tokenizer.vocab_size() >= 1);
                match tokenizer.encode_prompt(&text, Format::Text) {
                    Ok(ids) => {
                        let known = 0..tokenizer.vocab_size() as i64;
                        assert!(ids.iter().all(|id| known.contains(id)), "{ids:?} of {known:?}");
                        // It may have no text for them; what counts is that it does not panic.
                        let _ = tokenizer.decode(&ids);
                    }
                    Err(error) => assert!(error.to_string().contains("tokenizer.json"), "{error}"),
                }
                if tokenizer.check_fits(1 << 20).is_ok() {
                    let spec = DataSpec {
                        files: vec![folder.join("text.jsonl")],
                        format: Format::Text,
                        tokenizer_dir: Some(folder.to_owned()),
                        vocab_size: 1 << 20,
                        seq_len: 8,
                        shuffle: false,
                        seed: 0,
                    };
                    match check(&spec, u64::MAX) {
                        Ok(report) => {
                            assert!(report.samples == 1 && report.dropped_chars <= text.chars().count() as u64);
                        }
                        Err(DataError::Line { line, .. }) => assert_eq!(line, 1),
                        Err(error) => panic!("it has opened before: {error}"),
                    }
                }
            }
            Err(error) => assert!(error.to_string().contains("tokenizer.json"), "{error}"),
        });
    });
}
