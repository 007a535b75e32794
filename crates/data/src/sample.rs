//! Parsed line -> input ids and labels.

use crate::IGNORED;
use crate::error::LineProblem;
use crate::format::Record;
use crate::tokenizer::TextTokenizer;

/// One sequence, not padded. `labels[i]` is `input_ids[i]`, another id, or [`IGNORED`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) input_ids: Vec<i64>,
    pub(crate) labels: Vec<i64>,
    /// Tokens before the cut to the sequence length; only more than that length if the text is far longer.
    pub(crate) num_tokens_uncut: usize,
}

/// What turns records into samples.
#[derive(Debug)]
pub(crate) struct SampleBuilder {
    /// None only if no file needs one.
    pub(crate) tokenizer: Option<TextTokenizer>,
    pub(crate) vocab_size: usize,
    pub(crate) seq_len: usize,
}

impl SampleBuilder {
    /// The sample of `record`: at most `seq_len` tokens, all below `vocab_size`.
    pub(crate) fn build(&self, record: Record) -> Result<Sample, LineProblem> {
        match record {
            Record::Tokens { input_ids, labels } => self.check_tokens(input_ids, labels),
            Record::Text(text) => {
                let tokenizer = self.tokenizer();
                let mut ids = tokenizer.bos();
                ids.extend(tokenizer.encode_first(&text, self.seq_len).map_err(LineProblem::Tokenizer)?);
                ids.extend(tokenizer.eos_id());
                Ok(self.cut(ids, 0))
            }
            Record::Completion { prompt, completion } => {
                let tokenizer = self.tokenizer();
                let (text_ids, prompt_len) =
                    encode_pair(tokenizer, &prompt, &completion, self.seq_len).map_err(LineProblem::Tokenizer)?;
                let mut ids = tokenizer.bos();
                let num_masked = ids.len() + prompt_len;
                ids.extend(text_ids);
                ids.extend(tokenizer.eos_id());
                Ok(self.cut(ids, num_masked))
            }
        }
    }

    /// Characters of a record's texts that the tokenizer leaves out.
    pub(crate) fn num_dropped(&self, record: &Record) -> Result<u64, LineProblem> {
        let count = |text| self.tokenizer().num_dropped(text, self.seq_len).map_err(LineProblem::Tokenizer);
        match record {
            Record::Tokens { .. } => Ok(0),
            Record::Text(text) => count(text),
            Record::Completion { prompt, completion } => Ok(count(prompt)? + count(completion)?),
        }
    }

    fn tokenizer(&self) -> &TextTokenizer {
        self.tokenizer.as_ref().expect("opened with the data set if a file is text")
    }

    fn check_tokens(&self, input_ids: Vec<i64>, labels: Option<Vec<i64>>) -> Result<Sample, LineProblem> {
        let vocab_size = self.vocab_size;
        let in_vocabulary = |id: i64| (0..vocab_size as i64).contains(&id);
        let num_tokens = input_ids.len();
        if num_tokens == 0 {
            return Err(LineProblem::NoTokens);
        }
        if num_tokens > self.seq_len {
            return Err(LineProblem::TooManyTokens { num_tokens, seq_len: self.seq_len });
        }
        if let Some(index) = input_ids.iter().position(|id| !in_vocabulary(*id)) {
            return Err(LineProblem::TokenOutOfRange { index, id: input_ids[index], vocab_size });
        }
        let labels = labels.unwrap_or_else(|| input_ids.clone());
        if labels.len() != num_tokens {
            return Err(LineProblem::LabelsLength { num_labels: labels.len(), num_tokens });
        }
        if let Some(index) = labels.iter().position(|l| *l != IGNORED && !in_vocabulary(*l)) {
            return Err(LineProblem::LabelOutOfRange { index, label: labels[index], vocab_size });
        }
        Ok(Sample { input_ids, labels, num_tokens_uncut: num_tokens })
    }

    /// The first `seq_len` of `ids`, with no loss on the first `num_masked`.
    fn cut(&self, mut ids: Vec<i64>, num_masked: usize) -> Sample {
        let num_tokens_uncut = ids.len();
        ids.truncate(self.seq_len);
        let mut labels = ids.clone();
        let num_masked = num_masked.min(labels.len());
        labels[..num_masked].fill(IGNORED);
        Sample { input_ids: ids, labels, num_tokens_uncut }
    }
}

/// The ids of `prompt` followed by `completion`, and how many of them are the prompt's. Beyond `seq_len` they may be
/// incomplete.
///
/// They begin with exactly the ids that the prompt has alone, as it stands at generation. Where the two texts in one
/// piece are tokenised that way, the completion has its ids from there, else those that it has alone.
fn encode_pair(
    tokenizer: &TextTokenizer,
    prompt: &str,
    completion: &str,
    seq_len: usize,
) -> Result<(Vec<i64>, usize), String> {
    let mut prompt_ids = tokenizer.encode_first(prompt, seq_len)?;
    let prompt_len = prompt_ids.len();
    let both = tokenizer.encode_first(&format!("{prompt}{completion}"), seq_len)?;
    if both.starts_with(&prompt_ids) {
        return Ok((both, prompt_len));
    }
    prompt_ids.extend(tokenizer.encode_first(completion, seq_len)?);
    Ok((prompt_ids, prompt_len))
}
