//! JSON lines.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::Duration;

use fsdp_tests_behaviour::job::Job;
use rustix::fs::{CWD, FileType, mknodat};

use super::{Case, Change, File, Refused, Works, run};
use crate::tally::Tally;

const DATA: &str = "train.jsonl";

/// Row 23: each of them.
pub fn json_lines(tally: &mut Tally, n: usize) {
    run(tally, n.saturating_sub(1), CASES, Job::new, |_| false);
    tally.check("a bad line that no check has seen", beyond_the_check);
}

/// A run finds it when it comes to it.
fn beyond_the_check() {
    let job = Job::new();
    let line = format!("{{\"text\": \"{}\"}}\n", "w1 ".repeat(1 << 18));
    job.write(DATA, line.repeat(90) + "{\"text\": \"w1\n");
    assert_eq!(job.run(2, &["check"]).status, 0);
    let ended = job.run(2, &["--set", "training.epochs=1"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    let named = ended
        .stderr
        .lines()
        .any(|line| line.starts_with("fsdp-launch: rank ") && line.contains("train.jsonl:91:12: not JSON: EOF"));
    assert!(named, "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);
}

fn replace_data(job: &Job, make: impl FnOnce(&std::path::Path) -> std::io::Result<()>) {
    fs::remove_file(job.path(DATA)).expect("the job's data");
    make(&job.path(DATA)).expect("a folder of the test");
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    // Lines.
    Case::new("a cut last line", File(DATA, b"{\"text\":\"w1\"}\n{\"text\":\"w2"), Refused(&["train.jsonl:2:11: not JSON: EOF"])),
    Case::new("a line of no JSON", File(DATA, b"{\"text\" \"w1\"}\n"), Refused(&["train.jsonl:1:9: not JSON: expected `:`"])),
    Case::new("two objects on a line", File(DATA, b"{\"text\":\"w1\"}{\"text\":\"w1\"}\n"), Refused(&["train.jsonl:1:14: not JSON: trailing"])),
    Case::new("an object over lines", File(DATA, b"{\n  \"text\": \"w1\"\n}\n"), Refused(&["train.jsonl:1:1: not JSON: EOF", "one complete JSON object"])),
    Case::new("a comma behind the object", File(DATA, b"{\"text\":\"w1\"},\n"), Refused(&["train.jsonl:1:14: not JSON"])),
    Case::new("a bare word", File(DATA, b"{\"text\":NaN}\n"), Refused(&["train.jsonl:1:9: not JSON"])),
    Case::new("deep brackets", Change(|job| job.write(DATA, format!("{{\"text\":\"w1\",\"more\":{}", "[".repeat(1_000_000)))), Refused(&["train.jsonl:1:1000020: not JSON"])),
    Case::new("not UTF-8", File(DATA, b"{\"text\":\"w1\"}\r\n{\"text\":\"\xe9\"}\r\n"), Refused(&["train.jsonl:2:10: not UTF-8", "iconv"])),
    Case::new("UTF-16", File(DATA, b"\xff\xfe{\0\"\0t\0"), Refused(&["train.jsonl:1:4: NUL byte", "UTF-16"])),
    Case::new("a NUL", File(DATA, b"{\"text\":\"w1\"}\n{\"text\":\"w1\0\"}\n"), Refused(&["train.jsonl:2:12: NUL byte"])),
    Case::new("two marks of byte order", File(DATA, b"\xef\xbb\xbf\xef\xbb\xbf{\"text\":\"w1\"}\n"), Refused(&["train.jsonl:1:1: expected a JSON object"])),
    Case::new("a line of 1 GiB", Change(|job| {
        job.write(DATA, "{\"text\":\"w1\"}\n{\"text\":\"");
        fs::File::options().write(true).open(job.path(DATA)).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
    }), Refused(&["train.jsonl:2", "longer than 16777216 bytes"])),
    Case::new("a line of 1 GiB that is blank but for its end", Change(|job| replace_data(job, |path| {
        let mut file = fs::File::create(path)?;
        let blank = vec![b' '; 1 << 20];
        (0..1 << 10).try_for_each(|_| file.write_all(&blank))?;
        file.write_all(b"{}\n")
    })), Refused(&["train.jsonl:1", "longer than 16777216 bytes"])),
    Case::new("a line that is just too long", Change(|job| job.write(DATA, format!("\n{{\"text\":\"{}\"}}\r\n", "w".repeat((16 << 20) - 11)))), Refused(&["train.jsonl:2", "longer than 16777216 bytes"])),
    Case::new("a line that is just not too long", Change(|job| job.write(DATA, format!("{{\"text\":\"{}\"}}\n", "w1 ".repeat(5_592_401)))), Works(&["1 samples", "1 are cut"])),
    // What is on them.
    Case::new("an array", File(DATA, b"[\"w1\"]\n"), Refused(&["train.jsonl:1:1: expected a JSON object, got an array"])),
    Case::new("a string", File(DATA, b"{\"text\":\"w1\"}\n\n  \"w1\"\n"), Refused(&["train.jsonl:3:3: expected a JSON object, got a string"])),
    Case::new("null", File(DATA, b"null\n"), Refused(&["train.jsonl:1:1: expected a JSON object, got null"])),
    Case::new("columns with commas", File(DATA, b"prompt,completion\nw1,w2\n"), Refused(&["train.jsonl:1:1: expected a JSON object"])),
    Case::new("a missing field", File(DATA, b"{\"prompt\":\"w1\",\"completion\":\"w2\"}\n{\"prompt\":\"w1\"}\n"), Refused(&["train.jsonl:2:15: missing field `completion`"])),
    Case::new("a field twice", File(DATA, b"{\"text\":\"w1\",\"text\":\"w2\"}\n"), Refused(&["train.jsonl:1:19: duplicate field `text`"])),
    Case::new("a field of another type", File(DATA, b"{\"text\":[1]}\n"), Refused(&["train.jsonl:1:", "invalid type: sequence, expected a string"])),
    Case::new("fields that nobody knows", File(DATA, b"{\"question\":\"w1\",\"answer\":\"w2\"}\n"), Refused(&["train.jsonl:1: cannot tell the format", "\"answer\", \"question\""])),
    Case::new("another format further down", File(DATA, b"{\"text\":\"w1\"}\n{\"input_ids\":[1,2]}\n"), Refused(&["train.jsonl:2:", "missing field `text`"])),
    Case::new("a fractional token", File(DATA, b"{\"input_ids\":[1.5]}\n"), Refused(&["train.jsonl:1:", "`1.5`"])),
    Case::new("a token beyond 64 bits", File(DATA, b"{\"input_ids\":[18446744073709551616]}\n"), Refused(&["train.jsonl:1:", "input", "i64"])),
    Case::new("a token beyond the vocabulary", File(DATA, b"{\"input_ids\":[1,48]}\n"), Refused(&["train.jsonl:1", "input_ids[1] is 48", "0 to 47"])),
    Case::new("a negative token", File(DATA, b"{\"input_ids\":[-9223372036854775808]}\n"), Refused(&["train.jsonl:1", "input_ids[0] is -9223372036854775808"])),
    Case::new("a label of -1", File(DATA, b"{\"input_ids\":[1,2],\"labels\":[-100,-1]}\n"), Refused(&["train.jsonl:1", "labels[1] is -1", "-100 (no loss)"])),
    Case::new("a label too few", File(DATA, b"{\"input_ids\":[1,2],\"labels\":[1]}\n"), Refused(&["train.jsonl:1", "1 labels for 2 input_ids"])),
    Case::new("no tokens", File(DATA, b"{\"input_ids\":[]}\n"), Refused(&["train.jsonl:1", "is empty"])),
    Case::new("no loss anywhere", File(DATA, b"{\"input_ids\":[1,2],\"labels\":[1,-100]}\n"), Refused(&["train.jsonl", "tokens to learn from"])),
    // Files.
    Case::new("no bytes", File(DATA, b""), Refused(&["train.jsonl", "no sample", "0 bytes"])),
    Case::new("blank lines alone", File(DATA, b"\n \r\n\t\n"), Refused(&["train.jsonl", "no sample", "6 bytes"])),
    Case::new("1 GiB of NULs", Change(|job| replace_data(job, |path| fs::File::create(path)?.set_len(1 << 30))), Refused(&["train.jsonl:1", "longer than 16777216 bytes"])),
    Case::new("a FIFO", Change(|job| replace_data(job, |path| Ok(mknodat(CWD, path, FileType::Fifo, 0o600.into(), 0)?))), Refused(&["train.jsonl", "is a FIFO", "regular file"])),
    Case::new("a folder", Change(|job| replace_data(job, |path| fs::create_dir(path))), Refused(&["train.jsonl", "is a directory"])),
    Case::new("a device", Change(|job| replace_data(job, |path| symlink("/dev/zero", path))), Refused(&["train.jsonl", "is a device"])),
    Case::new("a link to nothing", Change(|job| replace_data(job, |path| symlink("nowhere", path))), Refused(&["train.jsonl", "No such file"])),
    // What is odd, and right.
    Case::new("a mark of byte order, line ends of all kinds, blank lines, no last line end", File(DATA, "\u{feff}{\"text\":\"w1 w2\"}\r\n\r\n  \t\n {\"text\":\"w2 w3\"} \n\n\n{\"id\":1e5,\"text\":\"w3 w4\"}".as_bytes()), Works(&["3 samples"])),
    Case::new("fields that nobody asks for", File(DATA, b"{\"meta\":{\"a\":[null,true,1e300]},\"text\":\"w1 w2\"}\n{\"text\":\"\",\"labels\":7}\n"), Works(&["2 samples"])),
];
