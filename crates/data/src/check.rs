//! Looks at data before a job starts.

use crate::IGNORED;
use crate::dataset::{DataSpec, Dataset};
use crate::error::DataError;
use crate::format::Format;

/// What [`check`] saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckReport {
    /// Samples that were read.
    pub samples: u64,
    pub bytes_checked: u64,
    /// Tokens of the longest sample before the cut to the sequence length; of a text far longer than that, a part.
    pub max_tokens: usize,
    /// Tokens with a loss, over all samples that were read.
    pub valid_tokens: u64,
    /// Samples that are longer than the sequence length and so are cut.
    pub cut: u64,
    /// Samples with no such token.
    pub without_loss: u64,
    /// Characters, white space apart, that no token stands for, so that the model never sees them.
    pub dropped_chars: u64,
    /// As [`Dataset::format`].
    pub format: Format,
}

/// Parses and tokenises the lines in the first `limit_bytes_per_file` bytes of each file. A line that passes here cannot
/// fail for its contents in training.
pub fn check(spec: &DataSpec, limit_bytes_per_file: u64) -> Result<CheckReport, DataError> {
    let dataset = Dataset::open_first_bytes(spec, limit_bytes_per_file)?;
    let mut report = CheckReport {
        samples: dataset.num_samples(),
        bytes_checked: dataset.scanned_bytes(),
        max_tokens: 0,
        valid_tokens: 0,
        cut: 0,
        without_loss: 0,
        dropped_chars: 0,
        format: dataset.format(),
    };
    for index in 0..dataset.num_samples() {
        let (sample, dropped_chars) = dataset.sample_and_dropped(index)?;
        report.dropped_chars += dropped_chars;
        report.max_tokens = report.max_tokens.max(sample.num_tokens_uncut);
        // The first position is nobody's target.
        let valid_tokens = sample.labels.iter().skip(1).filter(|l| **l != IGNORED).count() as u64;
        report.valid_tokens += valid_tokens;
        report.without_loss += u64::from(valid_tokens == 0);
    }
    report.cut = dataset.num_cut();
    Ok(report)
}
