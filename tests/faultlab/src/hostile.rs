//! Input that is made to break what reads it: real runs refuse it, or train on it as on any other.

use std::process::{Command, Stdio};
use std::time::Duration;

use fsdp_tests_behaviour::job::{Ended, Job};

use crate::tally::Tally;

mod lines;
mod model_files;
mod tokenizers;

pub use lines::json_lines;
pub use model_files::model_files;
pub use tokenizers::tokenizers;

/// What may be held beside a file, of which nothing says that it fits into memory.
const EXTRA_BYTES: u64 = 64 << 20;

/// No file here takes longer to be looked at.
const PATIENCE: Duration = Duration::from_secs(20);

/// One input.
#[derive(Debug)]
struct Case {
    what: &'static str,
    /// Makes the input of a job that is right otherwise.
    make: Make,
    expected: Expected,
}

/// An input: the whole of a file, or any change of a job.
#[derive(Debug)]
enum Make {
    /// A header in JSON, and so many bytes behind it, as the job's weights.
    Weights(&'static str, usize),
    /// File and contents.
    File(&'static str, &'static [u8]),
    /// A piece of `model/config.json`, and what stands in its place.
    ModelConfig(&'static str, &'static str),
    /// A key of the tokenizer, and its value in JSON.
    Tokenizer(&'static str, &'static str),
    Change(fn(&Job)),
}

/// What comes of it.
#[derive(Debug)]
enum Expected {
    /// It is refused in one message with all of this.
    Refused(&'static [&'static str]),
    /// Nothing wrong is found, and this is said of it; a run trains on it.
    Works(&'static [&'static str]),
}

use Expected::{Refused, Works};
use Make::{Change, File, ModelConfig, Tokenizer, Weights};

impl Case {
    const fn new(what: &'static str, make: Make, expected: Expected) -> Self {
        Case { what, make, expected }
    }
}

impl Make {
    fn apply(&self, job: &Job) {
        match *self {
            Weights(header, num_bytes) => job.write("model/model.safetensors", weights(header, num_bytes)),
            File(name, contents) => job.write(name, contents),
            ModelConfig(from, to) => job.replace("model/config.json", from, to),
            Tokenizer(key, value) => tokenizers::set(job, key, value),
            Change(change) => change(job),
        }
    }
}

/// A safetensors file with this header, and zeros behind it.
fn weights(header: &str, num_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + num_bytes, 0);
    bytes
}

/// All of `cases`, and again up to `n`: by `fsdp-launch check` in bounded memory, then by a run. `prepare` makes the job;
/// `is_in_memory` names those files that may be held as a whole.
fn run(tally: &mut Tally, n: usize, cases: &[Case], prepare: fn() -> Job, is_in_memory: fn(&str) -> bool) {
    let base_bytes = base_bytes(prepare);
    for case in cases.iter().cycle().take(n.max(cases.len())) {
        tally.check(case.what, || {
            let job = prepare();
            case.make.apply(&job);
            let max_bytes = base_bytes + EXTRA_BYTES + held_bytes(&job, is_in_memory);
            judge(case, &job, &job.spawn(bounded_check(&job, max_bytes)).wait());
            let ended = job.run(2, &["--set", "training.steps=2"]);
            judge(case, &job, &ended);
            let has_started = job.path("out/logs/rank-0.log").exists();
            assert_eq!(has_started, matches!(case.expected, Works(_)), "{ended:?}");
            job.assert_no_survivors(Duration::ZERO);
        });
    }
    tally.note(format!("a check takes {} MiB of address space, at most 64 MiB more", base_bytes >> 20));
}

fn judge(case: &Case, job: &Job, ended: &Ended) {
    let messages = ended.stderr.lines().filter(|line| line.starts_with("fsdp-launch: "));
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    assert!(ended.took < PATIENCE, "{ended:?}");
    match case.expected {
        Refused(says) => {
            assert_eq!((ended.status, messages.count()), (2, 1), "{ended:?}");
            assert!(says.iter().all(|part| ended.stderr.contains(part)), "not all of {says:?} in {ended:?}");
            assert!(job.steps().is_empty(), "{ended:?}");
        }
        Works(says) => {
            assert_eq!(ended.status, 0, "{ended:?}");
            let is_check = ended.stdout.contains("nothing wrong was found");
            assert!(!is_check || says.iter().all(|part| ended.stdout.contains(part)), "not {says:?} in {ended:?}");
            assert!(is_check || job.steps().len() == 2, "{ended:?}");
        }
    }
}

/// Bytes of the files that may be held.
fn held_bytes(job: &Job, is_in_memory: fn(&str) -> bool) -> u64 {
    let folders = [job.path(""), job.path("model")];
    let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
    let held = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_in_memory));
    held.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// `fsdp-launch check` with no more than `max_bytes` of address space, which is more than what it holds in memory.
fn bounded_check(job: &Job, max_bytes: u64) -> Command {
    let plain = job.command(2, &["check"]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v \"$0\" && exec \"$@\"", &(max_bytes >> 10).to_string()]);
    command.arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
    if let Some(dir) = plain.get_current_dir() {
        command.current_dir(dir);
    }
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// Address space that the check of a job takes which is right.
fn base_bytes(prepare: fn() -> Job) -> u64 {
    let job = prepare();
    let (mut too_few, mut enough) = (0, 1 << 30);
    while enough - too_few > 1 << 20 {
        let middle = (too_few + enough) / 2;
        match job.spawn(bounded_check(&job, middle)).wait().status {
            0 => enough = middle,
            _ => too_few = middle,
        }
    }
    assert!(enough < 1 << 29, "a check takes {enough} bytes");
    enough
}
