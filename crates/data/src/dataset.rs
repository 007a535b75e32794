//! The data files of a job as one list of samples.

use std::cell::Cell;
use std::path::PathBuf;

use crate::error::DataError;
use crate::format::{Format, LineFormat, Located, Record};
use crate::line_file::LineFile;
use crate::sample::{Sample, SampleBuilder};
use crate::tokenizer::TextTokenizer;

/// What to read and how.
#[derive(Debug, Clone)]
pub struct DataSpec {
    pub files: Vec<PathBuf>,
    pub format: Format,
    /// The model folder with tokenizer.json. Not looked at if all files are `tokens`.
    pub tokenizer_dir: Option<PathBuf>,
    /// Rows of the model's embedding.
    pub vocab_size: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Whether each epoch has an order of its own; else it is that of the files.
    pub shuffle: bool,
    pub seed: u64,
}

/// Open files whose lines are known. Sample i is the i-th line that is not blank over all files in turn.
#[derive(Debug)]
pub struct Dataset {
    files: Vec<DataFile>,
    builder: SampleBuilder,
    num_samples: u64,
    num_cut: Cell<u64>,
    pub(crate) shuffle: bool,
    pub(crate) seed: u64,
}

#[derive(Debug)]
struct DataFile {
    lines: LineFile,
    format: LineFormat,
    /// Samples in the files before this one.
    first_sample: u64,
}

impl Dataset {
    /// Opens and reads all files once, to find their lines and their digest, and opens the tokenizer if one is needed.
    /// Lines are parsed later, as they are used.
    pub fn open(spec: &DataSpec) -> Result<Self, DataError> {
        Self::open_first_bytes(spec, u64::MAX)
    }

    /// As `open`, but with the lines in the first `limit_bytes` bytes of each file only.
    pub(crate) fn open_first_bytes(spec: &DataSpec, limit_bytes: u64) -> Result<Self, DataError> {
        assert!(spec.seq_len > 0 && spec.vocab_size > 0, "checked with the config");
        let mut files = Vec::new();
        let mut num_samples = 0;
        for path in &spec.files {
            let lines = LineFile::open(path, limit_bytes)?;
            let format = spec.format.resolve(&lines.read(0)?).map_err(|problem| lines.error(0, problem))?;
            let first_sample = num_samples;
            num_samples += lines.num_lines();
            files.push(DataFile { lines, format, first_sample });
        }
        if files.is_empty() {
            return Err(DataError::NoFiles);
        }
        let tokenizer = match files.iter().find(|f| f.format.needs_tokenizer()) {
            Some(file) => {
                let dir = spec
                    .tokenizer_dir
                    .as_ref()
                    .ok_or_else(|| DataError::NoTokenizer { path: file.lines.path().to_owned() })?;
                let tokenizer = TextTokenizer::open(dir)?;
                tokenizer.check_fits(spec.vocab_size)?;
                Some(tokenizer)
            }
            None => None,
        };
        Ok(Dataset {
            files,
            builder: SampleBuilder { tokenizer, vocab_size: spec.vocab_size, seq_len: spec.seq_len },
            num_samples,
            num_cut: Cell::new(0),
            shuffle: spec.shuffle,
            seed: spec.seed,
        })
    }

    /// Samples of an epoch, over all files and ranks.
    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    /// What the first file holds: a prompt gets the text around it that this format's samples have.
    pub fn format(&self) -> Format {
        match self.files[0].format {
            LineFormat::Tokens => Format::Tokens,
            LineFormat::Text => Format::Text,
            LineFormat::Completion => Format::Completion,
            LineFormat::Alpaca => Format::Alpaca,
        }
    }

    /// Size and xxh3-128 digest of each file in turn; equal exactly if the data is the same.
    pub fn digest(&self) -> String {
        let digests: Vec<String> = self.files.iter().map(|f| f.lines.digest()).collect();
        digests.join(",")
    }

    /// Lines cut to the sequence length so far, among those that this process has used; a line counts in each epoch.
    pub fn num_cut(&self) -> u64 {
        self.num_cut.get()
    }

    pub(crate) fn seq_len(&self) -> usize {
        self.builder.seq_len
    }

    pub(crate) fn pad_id(&self) -> i64 {
        self.builder.tokenizer.as_ref().map_or(0, TextTokenizer::pad_id)
    }

    pub(crate) fn scanned_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.lines.scanned_bytes()).sum()
    }

    /// File and line of sample `index` of the files' order, as `train.jsonl:18`.
    pub(crate) fn place(&self, index: u64) -> Result<String, DataError> {
        let DataFile { lines, first_sample, .. } = &self.files[self.file_of(index)];
        Ok(format!("{}:{}", lines.path().display(), lines.number(index - first_sample)?))
    }

    fn file_of(&self, index: u64) -> usize {
        self.files.partition_point(|f| f.first_sample <= index) - 1
    }

    /// Reads, parses and tokenises sample `index` of the files' order.
    pub(crate) fn sample(&self, index: u64) -> Result<Sample, DataError> {
        self.build(index, self.record(index)?)
    }

    /// Sample `index` and the characters of it that the tokenizer leaves out.
    pub(crate) fn sample_and_dropped(&self, index: u64) -> Result<(Sample, u64), DataError> {
        let record = self.record(index)?;
        let num_dropped = self.builder.num_dropped(&record).map_err(|problem| self.error(index, (problem, None)))?;
        Ok((self.build(index, record)?, num_dropped))
    }

    fn record(&self, index: u64) -> Result<Record, DataError> {
        let DataFile { lines, format, first_sample } = &self.files[self.file_of(index)];
        let line = lines.read(index - first_sample)?;
        format.parse(&line).map_err(|problem| self.error(index, problem))
    }

    fn build(&self, index: u64, record: Record) -> Result<Sample, DataError> {
        let sample = self.builder.build(record).map_err(|problem| self.error(index, (problem, None)))?;
        if sample.num_tokens_uncut > sample.input_ids.len() {
            self.num_cut.set(self.num_cut.get() + 1);
        }
        Ok(sample)
    }

    fn error(&self, index: u64, problem: Located) -> DataError {
        let DataFile { lines, first_sample, .. } = &self.files[self.file_of(index)];
        lines.error(index - first_sample, problem)
    }
}
