//! `tokenizer.json`, the files beside it, and texts.

use std::fs;
use std::os::unix::fs::symlink;

use fsdp_tests_behaviour::job::Job;
use rustix::fs::{CWD, FileType, mknodat};

use super::{Case, Change, File, Refused, Tokenizer, Works, run};
use crate::tally::Tally;

const TOKENIZER: &str = "model/tokenizer.json";
const CONFIG: &str = "model/tokenizer_config.json";
const DATA: &str = "train.jsonl";
const FAILS: &[&str] = &["train.jsonl:1", "the tokenizer fails on this text"];
const UNUSABLE: &[&str] = &["model/tokenizer.json", "not a usable tokenizer"];

/// Row 22: each of them.
pub fn tokenizers(tally: &mut Tally, n: usize) {
    run(tally, n, CASES, text_job, |name| name.ends_with(".json"));
}

/// A job on 30 lines of text.
fn text_job() -> Job {
    let job = Job::new();
    job.write(DATA, "{\"text\": \"w1 w2 abab w3 unknown\"}\n".repeat(30));
    job
}

/// Puts `value` in the place of the one that `key` has in a tokenizer of `fsdp_tests_behaviour`.
pub fn set(job: &Job, key: &str, value: &str) {
    let text = job.read(TOKENIZER);
    let (start, rest) = text.split_once(&format!("\"{key}\": ")).expect("a key of the tokenizer");
    let len = match key {
        // The last one.
        "model" => rest.rfind('}'),
        "pre_tokenizer" => rest.find('}').map(|at| at + 1),
        _ => rest.find(','),
    };
    job.write(TOKENIZER, [start, "\"", key, "\": ", value, &rest[len.expect("an end")..]].concat());
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    // Files.
    Case::new("no tokenizer", Change(|job| fs::remove_file(job.path(TOKENIZER)).expect("the job's tokenizer")), Refused(&["model/tokenizer.json", "missing"])),
    Case::new("no bytes", File(TOKENIZER, b""), Refused(UNUSABLE)),
    Case::new("bytes of no text", File(TOKENIZER, b"\0\xff\0\xff"), Refused(UNUSABLE)),
    Case::new("an array", File(TOKENIZER, b"[]"), Refused(UNUSABLE)),
    Case::new("a cut file", File(TOKENIZER, b"{\"version\": \"1.0\", \"model\": {\"type\""), Refused(UNUSABLE)),
    Case::new("deep brackets", Change(|job| job.write(TOKENIZER, "[".repeat(1_000_000))), Refused(UNUSABLE)),
    Case::new("a FIFO", Change(|job| {
        fs::remove_file(job.path(TOKENIZER)).expect("the job's tokenizer");
        mknodat(CWD, job.path(TOKENIZER), FileType::Fifo, 0o600.into(), 0).expect("a folder of the test");
    }), Refused(&["model/tokenizer.json", "regular file"])),
    Case::new("a device", Change(|job| {
        fs::remove_file(job.path(TOKENIZER)).expect("the job's tokenizer");
        symlink("/dev/zero", job.path(TOKENIZER)).expect("a folder of the test");
    }), Refused(&["model/tokenizer.json", "regular file"])),
    Case::new("a config of no JSON", File(CONFIG, b"{\"bos_token\":"), Refused(&[CONFIG, "not JSON"])),
    Case::new("a config with a long list", Change(|job| job.write(CONFIG, format!("[{}0]", "0,".repeat(15_000_000)))), Refused(&[CONFIG, "at most 4194304 bytes"])),
    Case::new("a config of tokens that there are not", File(CONFIG, b"{\"bos_token\": \"<s>\", \"eos_token\": [], \"pad_token\": {\"content\": 7}, \"add_bos_token\": true}"), Works(&["30 samples"])),
    // Models.
    Case::new("an unheard model", Tokenizer("model", "{\"type\": \"Oracle\"}"), Refused(UNUSABLE)),
    Case::new("another version", Tokenizer("version", "\"9.9\""), Refused(UNUSABLE)),
    Case::new("no vocabulary", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {}, "unk_token": "x"}"#), Refused(&["model/tokenizer.json", "vocabulary is empty"])),
    Case::new("a negative id", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}"#), Refused(UNUSABLE)),
    Case::new("an id beyond 32 bits", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {"a": 4294967296}, "unk_token": "a"}"#), Refused(UNUSABLE)),
    Case::new("the largest id", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}"#), Refused(&["model/tokenizer.json", "id 4294967295", "48 rows"])),
    Case::new("an id just beyond the embedding", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {"a": 48}, "unk_token": "a"}"#), Refused(&["model/tokenizer.json", "id 48", "48 rows"])),
    Case::new("an added token beyond the embedding", Tokenizer("added_tokens", r#"[{"id": 48, "content": "w1", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}, {"id": 900, "content": "x", "special": false, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]"#), Refused(&["model/tokenizer.json", "48 rows"])),
    Case::new("an added token of nothing", Tokenizer("added_tokens", r#"[{"id": 47, "content": "", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]"#), Works(&["30 samples"])),
    Case::new("an unknown token that is none", Tokenizer("model", r#"{"type": "WordLevel", "vocab": {"w1": 0}, "unk_token": "none"}"#), Refused(FAILS)),
    Case::new("a merge of what is not there", Tokenizer("model", r#"{"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]]}"#), Refused(UNUSABLE)),
    Case::new("a merge amid a character", Tokenizer("model", r#"{"type": "BPE", "vocab": {"a": 0, "é": 1, "ab": 2}, "merges": [["a", "é"]], "continuing_subword_prefix": "x"}"#), Refused(UNUSABLE)),
    Case::new("merges dropped at random", Tokenizer("model", r#"{"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 0.5}"#), Refused(UNUSABLE)),
    Case::new("an unknown piece outside", Tokenizer("model", r#"{"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5}"#), Refused(UNUSABLE)),
    Case::new("pieces without an unknown one", Tokenizer("model", r#"{"type": "Unigram", "vocab": [["a", -1.0]]}"#), Refused(FAILS)),
    // What comes before the model, and after it.
    Case::new("pieces of no length", Tokenizer("pre_tokenizer", r#"{"type": "FixedLength", "length": 0}"#), Refused(FAILS)),
    Case::new("a table that is cut", Tokenizer("normalizer", r#"{"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}"#), Refused(FAILS)),
    Case::new("half a regex", Tokenizer("pre_tokenizer", r#"{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}"#), Refused(UNUSABLE)),
    Case::new("a regex of a million states", Tokenizer("pre_tokenizer", r#"{"type": "Split", "pattern": {"Regex": "(?:\\p{L}{1000}){1000}"}, "behavior": "Isolated", "invert": false}"#), Refused(UNUSABLE)),
    Case::new("a regex that tries all ways", Change(|job| {
        set(job, "pre_tokenizer", r#"{"type": "Split", "pattern": {"Regex": "(?:a|b|ab)*(?=c)"}, "behavior": "Isolated", "invert": false}"#);
        job.write(CONFIG, r#"{"eos_token": "w9"}"#);
        job.write(DATA, format!("{{\"text\": \"w1 {}\"}}\n", "ab".repeat(60)).repeat(30));
    }), Works(&["30 samples"])),
    Case::new("a regex that looks back at all ways", Change(|job| {
        set(job, "pre_tokenizer", r#"{"type": "Split", "pattern": {"Regex": "((a*)*)\\1b"}, "behavior": "Isolated", "invert": false}"#);
        job.write(CONFIG, r#"{"eos_token": "w9"}"#);
        job.write(DATA, format!("{{\"text\": \"{}\"}}\n", "a".repeat(120)).repeat(30));
    }), Works(&["30 samples"])),
    Case::new("a template of what is not there", Tokenizer("post_processor", r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [], "special_tokens": {}}"#), Refused(UNUSABLE)),
    Case::new("a template with ids beyond the embedding", Tokenizer("post_processor", r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"x": {"id": "x", "ids": [4000000000], "tokens": ["x"]}}}"#), Works(&["30 samples"])),
    Case::new("padding to a length of 60 bits", Tokenizer("padding", r#"{"strategy": {"Fixed": 1152921504606846976}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 900, "pad_type_id": 0, "pad_token": "x"}"#), Works(&["30 samples"])),
    Case::new("a cut to one token", Tokenizer("truncation", r#"{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}"#), Works(&["30 samples", "the longest has 5"])),
    // Texts.
    Case::new("characters without a token", Tokenizer("model", r#"{"type": "BPE", "vocab": {"w": 0, "1": 1, "2": 2, "a": 3, "b": 4}, "merges": []}"#), Works(&["30 samples", "210 characters have no token"])),
    Case::new("characters of all kinds", File(DATA, "{\"text\": \"w1\\u0000\\u0001\\u007f \u{feff}\u{202e}\u{200d}\u{301}\u{1f469}\u{200d}\u{1f680}\u{10ffff}\u{fffd} w2\"}\n".as_bytes()), Works(&["1 samples"])),
    Case::new("half a surrogate", File(DATA, b"{\"text\": \"w1 w2\"}\n{\"text\": \"\\ud83d\"}\n"), Refused(&["train.jsonl:2:", "not JSON"])),
    Case::new("one word of 256 KiB", Change(|job| job.write(DATA, format!("{{\"text\": \"w1 w2 {}\"}}\n", "é".repeat(1 << 17)))), Works(&["1 samples"])),
    Case::new("8 MiB of words", Change(|job| job.write(DATA, format!("{{\"text\": \"{}\"}}\n", "w1 ".repeat(8 << 20 >> 2)))), Works(&["1 are cut"])),
];
