//! Memory is bounded by an index of 8 bytes a line, whatever the files hold. One test: the peak is the process's.

mod common;

use std::fs::{self, File};
use std::io::Write;

use common::Folder;
use fsdp_data::{DataSpec, Dataset, Format, Loader, check};

#[test]
fn files_are_not_held_in_memory() {
    let folder = Folder::with_tokenizer();

    // A line of 1 GiB, without its end.
    let path = folder.path().join("line.jsonl");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"{\"text\":\"a\"}\n{\"text\":\"").unwrap();
    file.set_len(1 << 30).unwrap();
    let spec = folder.spec(&[path], Format::Text, 64);
    let (peak, error) = peak_growth_bytes(|| check(&spec, u64::MAX).unwrap_err().to_string());
    assert!(error.contains("line.jsonl:2: line is longer than"), "{error}");
    assert!(peak < 16 << 20, "{peak}");

    // Lines just below the bound, of text far longer than a sequence.
    let file = folder.write("text.jsonl", format!("{{\"text\":\"{}\"}}\n", "ab ".repeat(5 << 20)));
    let spec = folder.spec(&[file], Format::Text, 64);
    let (peak, report) = peak_growth_bytes(|| check(&spec, u64::MAX).unwrap());
    assert_eq!(report.cut, 1);
    assert!(peak < 64 << 20, "{peak}");

    // The same with few tokens: a word of 20 characters is one.
    let words = format!("{} ", "unknown".repeat(3)).repeat(700_000);
    let text = folder.write("words.jsonl", format!("{{\"text\":\"{words}\"}}\n"));
    let mut tokenizer = common::character_tokenizer();
    tokenizer["pre_tokenizer"] = serde_json::json!({"type": "WhitespaceSplit"});
    folder.write("tokenizer.json", tokenizer.to_string());
    let spec = folder.spec(&[text], Format::Text, 64);
    let (peak, report) = peak_growth_bytes(|| check(&spec, u64::MAX).unwrap());
    assert_eq!(report.cut, 1);
    assert!(peak < 64 << 20, "{peak}");

    // 128 MiB of lines of 1 KiB, read through.
    let line = format!("{{\"input_ids\":[{}1]}}\n", "1,".repeat(504));
    let file = folder.write("many.jsonl", "");
    let mut out = File::create(&file).unwrap();
    let block = line.repeat(1024);
    for _ in 0..128 {
        out.write_all(block.as_bytes()).unwrap();
    }
    let spec = DataSpec { shuffle: true, ..folder.spec(&[file], Format::Tokens, 512) };
    let (peak, ()) = peak_growth_bytes(|| {
        let mut loader = Loader::new(Dataset::open(&spec).unwrap(), 0, 2, 16, 1);
        for _ in 0..100 {
            loader.next_step().unwrap();
        }
    });
    assert!(peak < 16 << 20, "{peak}");
}

/// How far `run` takes the process's peak memory above what it holds before.
fn peak_growth_bytes<T>(run: impl FnOnce() -> T) -> (u64, T) {
    let before = status_bytes("VmRSS:");
    fs::write("/proc/self/clear_refs", "5").unwrap(); // resets the peak
    let result = run();
    (status_bytes("VmHWM:").saturating_sub(before), result)
}

fn status_bytes(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}
