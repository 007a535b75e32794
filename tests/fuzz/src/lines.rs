//! JSON lines of each format.

use std::fs;
use std::path::Path;

use fsdp_data::{CheckReport, DataError, DataSpec, Dataset, Format, Loader, check};
use serde::de::IgnoredAny;
use tempfile::TempDir;

use crate::safetensors::scratch_folder;
use crate::within::memory_bound;

const VOCAB_SIZE: usize = 100;
const SEQ_LEN: usize = 8;
const FORMATS: [Format; 4] = [Format::Tokens, Format::Text, Format::Completion, Format::Alpaca];

/// Words with one id each; what is no word is id 0.
const TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2, ".": 99}, "unk_token": "<unk>"}}"#;

/// The whole of a data file, read in the format that it seems to have, and in one of all.
///
/// Each line of an accepted file is one JSON object, blank ones apart, and is one sample, whose ids and targets are in the
/// vocabulary; training does not fail on it. A refusal names the file, and a line and a byte of it.
pub fn json_lines(data: &[u8]) {
    thread_local! {
        static FOLDER: TempDir = {
            let folder = scratch_folder();
            fs::write(folder.path().join("tokenizer.json"), TOKENIZER).expect("a folder of the target");
            folder
        };
    }
    FOLDER.with(|folder| {
        let path = folder.path().join("train.jsonl");
        fs::write(&path, data).expect("a folder of the target");
        // Opening the tokenizer takes most of the time, so not in all of them.
        for format in [Format::Auto, FORMATS[data.len() % FORMATS.len()]] {
            check_as(format, folder.path(), &path, data);
        }
    });
}

fn check_as(format: Format, folder: &Path, path: &Path, data: &[u8]) {
    let spec = DataSpec {
        files: vec![path.to_path_buf()],
        format,
        tokenizer_dir: Some(folder.to_owned()),
        vocab_size: VOCAB_SIZE,
        seq_len: SEQ_LEN,
        shuffle: false,
        seed: 0,
    };
    match memory_bound(data.len(), || check(&spec, u64::MAX)) {
        Ok(report) => {
            let lines = lines(data);
            for line in &lines {
                let is_json = serde_json::from_slice::<IgnoredAny>(line).is_ok();
                assert!(is_json && line.trim_ascii().starts_with(b"{"), "{:?}", String::from_utf8_lossy(line));
            }
            assert_eq!(report.samples, lines.len() as u64);
            assert!(report.format == format || (format == Format::Auto && FORMATS.contains(&report.format)));
            train(&spec, report);
        }
        Err(error) => {
            assert!(error.to_string().contains("train.jsonl"), "{error}");
            if let DataError::Line { line, byte, .. } = error {
                let all: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
                let named = all.get(line as usize - 1).expect("a line of the file");
                assert!(byte.is_none_or(|byte| byte <= named.len() as u64 + 1), "byte {byte:?} of {}", named.len());
            }
        }
    }
}

/// Those of a file that are not blank.
fn lines(data: &[u8]) -> Vec<&[u8]> {
    let text = data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data);
    text.split(|byte| *byte == b'\n').filter(|line| !line.iter().all(u8::is_ascii_whitespace)).collect()
}

/// One epoch.
fn train(spec: &DataSpec, report: CheckReport) {
    let dataset = Dataset::open(spec).expect("checked");
    let num_steps = dataset.num_samples().div_ceil(2);
    let mut loader = Loader::new(dataset, 0, 1, 2, 1);
    let mut num_valid = 0;
    for _ in 0..num_steps {
        for batch in loader.next_step().expect("checked") {
            assert_eq!((batch.input_ids.len(), batch.targets.len()), (2 * SEQ_LEN, 2 * SEQ_LEN));
            let known = 0..VOCAB_SIZE as i64;
            assert!(batch.input_ids.iter().all(|id| known.contains(id)), "{batch:?}");
            assert!(batch.targets.iter().all(|id| known.contains(id) || *id == fsdp_data::IGNORED), "{batch:?}");
            num_valid += batch.num_valid_tokens;
        }
    }
    assert_eq!(num_valid, report.valid_tokens);
}
