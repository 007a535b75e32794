//! Files for the tests: a tokenizer with one id for each character, and data.
#![allow(dead_code)] // each test binary uses its own part

use std::fs;
use std::path::{Path, PathBuf};

use fsdp_data::{DataSpec, Format};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const PAD: i64 = 0;
pub const BOS: i64 = 1;
pub const EOS: i64 = 2;
pub const VOCAB: usize = 3 + CHARACTERS.len();
const CHARACTERS: &str = " \n\"#,.:?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// The ids of `text` in the character tokenizer.
pub fn ids(text: &str) -> Vec<i64> {
    text.chars().map(|c| 3 + CHARACTERS.find(c).expect("in the vocabulary") as i64).collect()
}

/// tokenizer.json: `<pad>`, `<s>`, `</s>`, then the characters.
pub fn character_tokenizer() -> Value {
    let mut vocab = json!({"<pad>": PAD, "<s>": BOS, "</s>": EOS});
    for (i, c) in CHARACTERS.chars().enumerate() {
        vocab[c.to_string()] = json!(3 + i);
    }
    let special = |id: i64, content: &str| {
        json!({"id": id, "content": content, "special": true,
               "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    json!({
        "version": "1.0",
        "added_tokens": [special(PAD, "<pad>"), special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": false},
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<pad>"}
    })
}

pub struct Folder {
    dir: TempDir,
}

impl Folder {
    pub fn new() -> Self {
        Folder { dir: TempDir::new().unwrap() }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    }

    /// A folder with a tokenizer that adds `<s>` to texts.
    pub fn with_tokenizer() -> Self {
        let folder = Folder::new();
        folder.write("tokenizer.json", character_tokenizer().to_string());
        folder.write(
            "tokenizer_config.json",
            json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": true}).to_string(),
        );
        folder
    }

    pub fn spec(&self, files: &[PathBuf], format: Format, seq_len: usize) -> DataSpec {
        DataSpec {
            files: files.to_vec(),
            format,
            tokenizer_dir: Some(self.path().to_owned()),
            vocab_size: VOCAB,
            seq_len,
            shuffle: false,
            seed: 7,
        }
    }
}

/// Sample i is the one token i, then `filler` so that it has a target: which samples a batch holds is seen in its first
/// column.
pub fn numbered(folder: &Folder, num_samples: u64, shuffle: bool, seed: u64) -> DataSpec {
    let lines: String = (0..num_samples).map(|i| format!("{{\"input_ids\":[{i},{i}]}}\n")).collect();
    let file = folder.write("numbered.jsonl", lines);
    DataSpec {
        vocab_size: num_samples as usize,
        tokenizer_dir: None,
        shuffle,
        seed,
        ..folder.spec(&[file], Format::Tokens, 2)
    }
}
