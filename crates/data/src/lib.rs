//! Training data: JSON lines files -> tokenised, masked, resumable batches of one rank.
//!
//! Nothing of a file but the offset of each line stays in memory. A line is read, parsed and tokenised when its batch
//! is built, by the one rank that needs it. Which line comes when is a function of (seed, epoch) alone, so it does not
//! depend on the number of ranks, and [`Position`] is all that a checkpoint has to hold.
//!
//! ```text
//! dataset.rs     Dataset: the files of a job as one list of samples
//! loader.rs      Loader: one rank's microbatches of each step; Position
//! order.rs       the order of samples in an epoch
//! sample.rs      parsed line -> input ids and labels
//! format.rs      bytes of a line -> parsed line; detection by keys; the Alpaca prompt
//! line_file.rs   a file's line offsets, digest and positioned reads
//! tokenizer.rs   TextTokenizer: the `tokenizers` crate behind a wall against panics
//! check.rs       check: the first bytes of each file, before any rank starts
//! job.rs         a job's config -> DataSpec
//! error.rs       DataError
//! ```
#![forbid(unsafe_code)]

mod check;
mod dataset;
mod error;
mod format;
mod job;
mod line_file;
mod loader;
mod order;
mod sample;
mod tokenizer;

pub use check::{CheckReport, check};
pub use dataset::{DataSpec, Dataset};
pub use error::{DataError, LineProblem};
pub use format::Format;
pub use line_file::MAX_LINE_BYTES;
pub use loader::{Loader, MicroBatch, Position};
pub use tokenizer::{TextTokenizer, tokenizer_digest};

/// The label and target of a position that takes no part in the loss.
pub const IGNORED: i64 = -100;
