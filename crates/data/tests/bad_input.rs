//! Each bad input is an error that says the place, what is wrong and what to do.

mod common;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use common::{EOS, Folder, ids};
use fsdp_data::{CheckReport, DataError, DataSpec, Dataset, Format, Loader, MAX_LINE_BYTES, check};

fn error_of(spec: &DataSpec) -> String {
    check(spec, u64::MAX).expect_err("must be refused").to_string()
}

/// (name, format, contents, place after the file's name, part of the message)
#[rustfmt::skip]
const BAD_LINES: &[(&str, Format, &[u8], &str, &str)] = &[
    ("cut last line", Format::Text, b"{\"text\":\"a\"}\n{\"text\":\"b", ":2:10: ", "not JSON: EOF while parsing a string"),
    ("malformed", Format::Text, b"{\"text\" \"a\"}\n", ":1:9: ", "not JSON: expected `:`"),
    ("two objects", Format::Text, b"{\"text\":\"a\"}{\"text\":\"a\"}\n", ":1:13: ", "not JSON: trailing characters"),
    ("pretty-printed", Format::Text, b"{\n  \"text\": \"a\"\n}\n", ":1:1: ", "each line must be one complete JSON object"),
    ("array", Format::Text, b"[\"a\"]\n", ":1:1: ", "expected a JSON object, got an array"),
    ("string", Format::Text, b"{\"text\":\"a\"}\n\n  \"a\"\n", ":3:3: ", "got a string"),
    ("number", Format::Auto, b"12\n", ":1:1: ", "got a number"),
    ("null", Format::Auto, b"null\n", ":1:1: ", "got null"),
    ("a CSV file", Format::Auto, b"prompt,completion\n", ":1:1: ", "got something else"),
    ("missing field", Format::Completion, b"{\"prompt\":\"a\"}\n", ":1:14: ", "missing field `completion`; a line of format \"completion\" must be like {\"prompt\":\"...\",\"completion\":\"...\"}"),
    ("missing output", Format::Alpaca, b"{\"instruction\":\"a\"}\n", ":1:19: ", "missing field `output`"),
    ("duplicate field", Format::Text, b"{\"text\":\"a\",\"text\":\"b\"}\n", ":1:18: ", "duplicate field `text`"),
    ("text of wrong type", Format::Text, b"{\"text\":[1]}\n", ":1:", "invalid type: sequence, expected a string"),
    ("null text", Format::Text, b"{\"text\":null}\n", ":1:", "invalid type: null, expected a string"),
    ("tokens of wrong type", Format::Tokens, b"{\"input_ids\":\"1 2\"}\n", ":1:", "expected a sequence"),
    ("fractional token", Format::Tokens, b"{\"input_ids\":[1.5]}\n", ":1:", "invalid type: floating point `1.5`, expected i64"),
    ("huge token", Format::Tokens, b"{\"input_ids\":[99999999999999999999]}\n", ":1:", "expected i64"),
    ("nested batch", Format::Tokens, b"{\"input_ids\":[[1,2]]}\n", ":1:", "expected i64"),
    ("token beyond vocabulary", Format::Tokens, b"{\"input_ids\":[1,2]}\n\n{\"input_ids\":[1,5,75,2]}\n", ":3: ", "input_ids[2] is 75, expected 0 to 72"),
    ("negative token", Format::Tokens, b"{\"input_ids\":[-1]}\n", ":1: ", "input_ids[0] is -1"),
    ("label beyond vocabulary", Format::Tokens, b"{\"input_ids\":[1,2],\"labels\":[1,73]}\n", ":1: ", "labels[1] is 73, expected -100 (no loss) or 0 to 72"),
    ("label -1", Format::Tokens, b"{\"input_ids\":[1,2],\"labels\":[-100,-1]}\n", ":1: ", "labels[1] is -1"),
    ("too few labels", Format::Tokens, b"{\"input_ids\":[1,2,3],\"labels\":[1,2]}\n", ":1: ", "2 labels for 3 input_ids"),
    ("no tokens", Format::Tokens, b"{\"input_ids\":[]}\n", ":1: ", "\"input_ids\" is empty"),
    ("too many tokens", Format::Tokens, b"{\"input_ids\":[1,2,3,4,5,6,7,8,9]}\n", ":1: ", "9 tokens, but training.seq_len is 8"),
    ("not UTF-8", Format::Text, b"{\"text\":\"a\"}\r\n{\"text\":\"\xe9t\xe9\"}\r\n", ":2:10: ", "not UTF-8; convert"),
    ("UTF-16", Format::Auto, b"\xff\xfe{\0\"\0t\0e\0", ":1:4: ", "NUL byte; is this a binary or UTF-16 file?"),
    ("NUL in the middle", Format::Text, b"{\"text\":\"a\"}\n{\"text\":\"a\0b\"}\n", ":2:11: ", "NUL byte"),
    ("lone surrogate", Format::Text, b"{\"text\":\"\\ud800\"}\n", ":1:", "not JSON"),
    ("unknown keys", Format::Auto, b"{\"question\":\"a\",\"answer\":\"b\"}\n", ":1: ", "cannot tell the format from the keys [\"answer\", \"question\"]"),
    ("chat", Format::Auto, b"{\"messages\":[]}\n", ":1: ", "keys [\"messages\"]"),
    ("other keys later", Format::Auto, b"{\"text\":\"a\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n", ":2:", "missing field `text`"),
];

#[test]
fn bad_lines_are_refused_with_their_place() {
    let folder = Folder::with_tokenizer();
    for (name, format, contents, place, message) in BAD_LINES {
        let file = folder.write("bad.jsonl", contents);
        let error = error_of(&folder.spec(&[file], *format, 8));
        assert!(error.contains(&format!("bad.jsonl{place}")), "{name}: place of {error}");
        assert!(error.contains(message), "{name}: {error}");
    }
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    let folder = Folder::with_tokenizer();
    let line = format!("{{\"text\":\"a\",\"more\":{}", "[".repeat(1_000_000));
    let file = folder.write("deep.jsonl", line);
    for format in [Format::Text, Format::Auto] {
        let error = error_of(&folder.spec(std::slice::from_ref(&file), format, 8));
        assert!(error.contains("deep.jsonl:1:1000019: not JSON: EOF"), "{error}");
    }
}

#[test]
fn files_without_samples_and_things_that_are_no_files_are_refused() {
    let folder = Folder::with_tokenizer();
    let empty = folder.write("empty.jsonl", "");
    let blank = folder.write("blank.jsonl", "\n \r\n\t\n");
    let only_bom = folder.write("bom.jsonl", "\u{feff}\n");
    let fifo = folder.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let cases = [
        (empty, "empty.jsonl: holds no sample (0 bytes"),
        (blank, "blank.jsonl: holds no sample (6 bytes"),
        (only_bom, "bom.jsonl: holds no sample (4 bytes"),
        (fifo, "fifo: is a FIFO, expected a regular file"),
        (folder.path().to_owned(), ": is a directory, expected"),
        ("/dev/null".into(), "/dev/null: is a device, expected"),
        (folder.path().join("none.jsonl"), "none.jsonl: cannot open: No such file or directory"),
    ];
    for (path, message) in cases {
        let error = error_of(&folder.spec(&[path], Format::Auto, 8));
        assert!(error.contains(message), "{error}");
    }
    assert!(matches!(check(&folder.spec(&[], Format::Auto, 8), 1), Err(DataError::NoFiles)));
}

#[test]
fn a_line_at_the_bound_is_read_and_one_byte_more_is_refused() {
    let folder = Folder::with_tokenizer();
    let room = MAX_LINE_BYTES as usize - "{\"text\":\"\"}".len();
    for (len, refused) in [(room, false), (room + 1, true)] {
        let file = folder.write("long.jsonl", format!("\n{{\"text\":\"{}\"}}\r\n", "a".repeat(len - 1)));
        match check(&folder.spec(&[file], Format::Text, 8), u64::MAX) {
            Ok(report) => assert!(!refused && report.cut == 1),
            Err(e) => {
                assert!(refused && e.to_string().contains("long.jsonl:2: line is longer than 16777216 bytes"), "{e}");
            }
        }
    }
}

#[test]
fn byte_order_mark_line_ends_and_blank_lines_are_no_errors() {
    let folder = Folder::with_tokenizer();
    let contents = "\u{feff}{\"text\":\"a\"}\r\n\r\n  \t\n {\"text\":\"b\"} \n\n\n{\"id\":7,\"text\":\"c\"}";
    let file = folder.write("odd.jsonl", contents);
    let dataset = Dataset::open(&folder.spec(&[file], Format::Auto, 4)).unwrap();
    assert_eq!(dataset.num_samples(), 3);
    let batch = &Loader::new(dataset, 0, 1, 3, 1).next_step().unwrap()[0];
    for (row, text) in batch.targets.chunks(4).zip(["a", "b", "c"]) {
        assert_eq!(row, [ids(text)[0], EOS, -100, -100]);
    }
}

#[test]
fn a_file_that_changes_after_it_was_opened_is_refused() {
    type Change = fn(&mut File);
    let changes: [(&str, Change); 3] = [
        ("append", |file| file.write_all_at(b"\n", file.metadata().unwrap().len()).unwrap()),
        ("shorten", |file| file.set_len(30).unwrap()),
        ("overwrite", |file| file.write_all(b"{\"input_ids\":[5").unwrap()),
    ];
    let folder = Folder::new();
    for (name, change) in changes {
        let spec = common::numbered(&folder, 10, false, 0);
        let mut loader = Loader::new(Dataset::open(&spec).unwrap(), 0, 1, 2, 1);
        let digest = loader.dataset().digest();
        loader.next_step().unwrap();
        std::thread::sleep(Duration::from_millis(20)); // a tick of the file system's clock
        change(&mut OpenOptions::new().write(true).open(&spec.files[0]).unwrap());
        for _ in 0..2 {
            let error = loader.next_step().unwrap_err();
            assert!(matches!(error, DataError::Changed { .. }), "{name}: {error}");
            assert!(error.to_string().contains("numbered.jsonl: was changed while in use"));
        }
        // What a resumed run compares.
        assert_ne!(Dataset::open(&spec).map_or(String::new(), |data| data.digest()), digest, "{name}");
    }
}

#[test]
fn the_digest_is_that_of_the_contents() {
    let folder = Folder::with_tokenizer();
    let text = "{\"text\":\"a\"}\n";
    let [a, same, other] = [("a", text), ("same", text), ("other", "{\"text\":\"b\"}\n")]
        .map(|(name, contents)| folder.write(name, contents));
    let digest = |files: &[&PathBuf]| {
        let files: Vec<PathBuf> = files.iter().map(|f| f.to_path_buf()).collect();
        Dataset::open(&folder.spec(&files, Format::Auto, 8)).unwrap().digest()
    };
    assert_eq!(digest(&[&a]), digest(&[&same]));
    assert_ne!(digest(&[&a]), digest(&[&other]));
    assert_ne!(digest(&[&a, &other]), digest(&[&other, &a]));
    assert_ne!(digest(&[&a]), digest(&[&a, &same]));
}

#[test]
fn the_check_reads_whole_lines_up_to_its_limit() {
    let folder = Folder::new();
    let line = format!("{{\"input_ids\":[{}1]}}\n", "1,".repeat(504));
    assert_eq!(line.len(), 1026);
    let file = folder.write("big.jsonl", line.repeat(3000) + "broken");
    let spec = folder.spec(&[file], Format::Auto, 512);
    let report = check(&spec, 1 << 20).unwrap();
    let expected = CheckReport {
        samples: (1 << 20) / 1026,
        bytes_checked: 1 << 20,
        max_tokens: 505,
        valid_tokens: report.samples * 504,
        cut: 0,
        without_loss: 0,
        dropped_chars: 0,
        format: Format::Tokens,
    };
    assert_eq!(report, expected);
    assert!(error_of(&spec).contains("big.jsonl:3001:1: "));
}

#[test]
fn the_check_counts_what_is_cut_and_what_has_no_loss() {
    let folder = Folder::with_tokenizer();
    let lines = [("ab", "cd"), ("abc", "defg"), ("abcdefgh", "i")]
        .map(|(prompt, completion)| format!("{{\"prompt\":\"{prompt}\",\"completion\":\"{completion}\"}}\n"));
    let file = folder.write("pairs.jsonl", lines.concat());
    let report = check(&folder.spec(&[file], Format::Auto, 8), u64::MAX).unwrap();
    assert_eq!((report.samples, report.max_tokens, report.valid_tokens), (3, 11, 3 + 4));
    assert_eq!((report.cut, report.without_loss), (2, 1));
}
