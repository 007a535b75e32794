//! Everything that can be wrong with data, said with file, line and what to do.

use std::path::PathBuf;

/// An input that cannot be used. All variants but `Io` are the user's to repair; none is worth a retry.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A line cannot become a sample. `line` counts from 1, blank lines included; `byte` is the position in the line,
    /// from 1, where the reason is known that exactly.
    #[error("{}:{line}{}: {problem}", path.display(), byte.map(|b| format!(":{b}")).unwrap_or_default())]
    Line { path: PathBuf, line: u64, byte: Option<u64>, problem: LineProblem },
    #[error("no data file is given; name at least one JSON lines file")]
    NoFiles,
    #[error("{}: is {kind}, expected a regular file of JSON lines", path.display())]
    NotAFile { path: PathBuf, kind: &'static str },
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("{}: holds no sample ({len_bytes} bytes, no line that is not blank); remove it from the list or fill it", path.display())]
    NoSamples { path: PathBuf, len_bytes: u64 },
    #[error("{}: was changed while in use; leave data files alone during a run and start again", path.display())]
    Changed { path: PathBuf },
    #[error("{}: this format is text and needs a tokenizer, but no model folder is given; give one, or tokenise the data and use format \"tokens\"", path.display())]
    NoTokenizer { path: PathBuf },
    #[error("{}: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error(
        "{}: the tokenizer's token {token:?} has id {max_id}, but the model's embedding has only {vocab_size} rows \
         (vocab_size in config.json); use the tokenizer that belongs to the model",
        path.display()
    )]
    VocabularyTooLarge { path: PathBuf, token: String, max_id: u32, vocab_size: usize },
    #[error(
        "cannot go to sample {sample} of an epoch: the data has only {num_samples} samples; it is not the data of the saved run"
    )]
    PositionOutside { sample: u64, num_samples: u64 },
}

/// What is wrong with one line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    #[error("line is longer than {max_bytes} bytes; split the record, or check that the file has line ends")]
    TooManyBytes { max_bytes: u64 },
    #[error("NUL byte; is this a binary or UTF-16 file? Expected JSON lines in UTF-8")]
    Nul,
    #[error("not UTF-8; convert the file to UTF-8 (iconv -t UTF-8)")]
    NotUtf8,
    #[error("not JSON: {0}; each line must be one complete JSON object")]
    NotJson(String),
    #[error("expected a JSON object, got {got}; each line must be like {expected}")]
    NotAnObject { got: &'static str, expected: &'static str },
    #[error("{reason}; a line of format \"{format}\" must be like {expected}")]
    WrongFields { format: &'static str, reason: String, expected: &'static str },
    #[error(
        "cannot tell the format from the keys {keys:?}; known lines: {{\"input_ids\"}}, {{\"prompt\",\"completion\"}}, \
         {{\"instruction\",\"input\",\"output\"}}, {{\"text\"}}. Rename the keys"
    )]
    UnknownKeys { keys: Vec<String> },
    #[error("\"input_ids\" is empty; remove the line")]
    NoTokens,
    #[error(
        "{num_tokens} tokens, but training.seq_len is {seq_len}; format \"tokens\" is never cut: split the line or raise seq_len"
    )]
    TooManyTokens { num_tokens: usize, seq_len: usize },
    #[error(
        "input_ids[{index}] is {id}, expected 0 to {} (the model's vocabulary); was the data made for another tokenizer?",
        vocab_size - 1
    )]
    TokenOutOfRange { index: usize, id: i64, vocab_size: usize },
    #[error(
        "labels[{index}] is {label}, expected -100 (no loss) or 0 to {} (the model's vocabulary)",
        vocab_size - 1
    )]
    LabelOutOfRange { index: usize, label: i64, vocab_size: usize },
    #[error("{num_labels} labels for {num_tokens} input_ids; give one label for each token (-100 = no loss)")]
    LabelsLength { num_labels: usize, num_tokens: usize },
    #[error("the tokenizer fails on this text: {0}")]
    Tokenizer(String),
}
