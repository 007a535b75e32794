//! Validation loss, and greedy answers to prompts. Every rank runs the same number of forward passes.

use fsdp::{Engine, MicroBatch};
use fsdp_config::JobConfig;
use fsdp_control::stop::StopFlag;
use fsdp_data::{DataSpec, Dataset, Format, IGNORED, Loader, TextTokenizer};
use serde::Serialize;

use crate::error::TrainError;

/// What is validated, open for the whole run.
#[derive(Debug)]
pub struct Validator {
    loader: Option<Loader>,
    tokenizer: Option<TextTokenizer>,
    /// Each prompt, and its token ids.
    prompts: Vec<(String, Vec<i64>)>,
    max_new_tokens: usize,
    micro_batch_size: usize,
    seq_len: usize,
    rank: usize,
    world_size: usize,
}

/// The model's answer to a prompt after some steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    pub step: u64,
    pub prompt: String,
    pub answer: String,
}

impl Validator {
    /// `format` is the training data's: a prompt gets the text around it that the model learnt.
    pub fn open(
        config: &JobConfig,
        format: Format,
        vocab_size: usize,
        (rank, world_size): (usize, usize),
    ) -> Result<Self, TrainError> {
        let micro_batch_size = config.training.micro_batch_size as usize;
        let seq_len = config.training.seq_len as usize;
        let loader = match DataSpec::for_validation(config, vocab_size) {
            Some(spec) => Some(Loader::new(Dataset::open(&spec)?, rank, world_size, micro_batch_size, 1)),
            None => None,
        };
        let wanted = config.validation.as_ref().filter(|v| !v.prompts.is_empty());
        let tokenizer = match wanted {
            Some(_) => {
                let tokenizer = TextTokenizer::open(config.model.path.as_ref())?;
                tokenizer.check_fits(vocab_size)?;
                Some(tokenizer)
            }
            None => None,
        };
        let mut prompts = Vec::new();
        if let (Some(validation), Some(tokenizer)) = (wanted, &tokenizer) {
            for prompt in &validation.prompts {
                let ids = tokenizer.encode_prompt(prompt, format)?;
                if ids.is_empty() || ids.len() >= seq_len {
                    return Err(TrainError::BadInput(format!(
                        "[validation] prompts: {prompt:?} has {} tokens; expected 1 to {} (less than [training] seq_len)",
                        ids.len(),
                        seq_len - 1
                    )));
                }
                prompts.push((prompt.clone(), ids));
            }
        }
        let max_new_tokens = config.validation.as_ref().map_or(0, |v| v.max_new_tokens as usize);
        Ok(Validator { loader, tokenizer, prompts, max_new_tokens, micro_batch_size, seq_len, rank, world_size })
    }

    pub fn has_prompts(&self) -> bool {
        !self.prompts.is_empty()
    }

    /// Mean loss over all valid tokens of the validation data, and their number; inner `None` without data, outer if a
    /// rank was asked to stop. Collective.
    pub fn loss(&mut self, engine: &mut Engine, stop: &StopFlag) -> Result<Option<Option<(f64, u64)>>, TrainError> {
        let Some(loader) = &mut self.loader else { return Ok(Some(None)) };
        let start = loader.position();
        let (mut loss_sum, mut num_tokens) = (0.0, 0);
        for _ in 0..loader.steps_per_epoch() {
            for batch in loader.next_step()? {
                let batch = MicroBatch::new(&batch.input_ids, &batch.targets, batch.num_valid_tokens, engine.device())?;
                let (sum, tokens) = engine.evaluate(&batch)?;
                loss_sum += sum;
                num_tokens += tokens;
            }
            if engine.any_rank(stop.is_set())? {
                loader.seek(start)?;
                return Ok(None);
            }
        }
        if num_tokens == 0 {
            return Err(TrainError::BadInput("[validation] data: no token has a label, there is no loss".to_string()));
        }
        Ok(Some(Some((loss_sum / num_tokens as f64, num_tokens))))
    }

    /// Greedy answers to all prompts, in order, on every rank; `None` if a rank was asked to stop. Collective.
    pub fn answers(&self, engine: &mut Engine, step: u64, stop: &StopFlag) -> Result<Option<Vec<Answer>>, TrainError> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(Some(vec![])) };
        let mut answers = Vec::new();
        // A round answers one microbatch of prompts on each rank; a rank without any runs along on dummies.
        for round in self.prompts.chunks(self.micro_batch_size * self.world_size) {
            let own = round.iter().skip(self.rank * self.micro_batch_size).take(self.micro_batch_size);
            let mut sequences: Vec<Vec<i64>> = own.map(|(_, ids)| ids.clone()).collect();
            let lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
            for _ in 0..self.max_new_tokens {
                let next = self.next_tokens(engine, &sequences)?;
                let mut is_busy = false;
                for (sequence, next) in sequences.iter_mut().zip(next) {
                    let ended = sequence.len() == self.seq_len || sequence.last().copied() == tokenizer.eos_id();
                    if !ended {
                        sequence.push(next);
                        is_busy = true;
                    }
                }
                if engine.any_rank(stop.is_set())? {
                    return Ok(None);
                }
                if !engine.any_rank(is_busy)? {
                    break;
                }
            }
            let own: Vec<Vec<i64>> = sequences.iter().zip(&lens).map(|(s, &len)| s[len..].to_vec()).collect();
            for (ids, (prompt, _)) in self.gather(engine, &own)?.into_iter().zip(round) {
                let ids: Vec<i64> = ids.into_iter().take_while(|id| Some(*id) != tokenizer.eos_id()).collect();
                answers.push(Answer { step, prompt: prompt.clone(), answer: tokenizer.decode(&ids)? });
            }
        }
        Ok(Some(answers))
    }

    /// One more token for each of this rank's sequences (at most a microbatch).
    fn next_tokens(&self, engine: &mut Engine, sequences: &[Vec<i64>]) -> Result<Vec<i64>, TrainError> {
        let mut ids = vec![0i64; self.micro_batch_size * self.seq_len];
        let mut rows = vec![0i64; self.micro_batch_size];
        for (i, sequence) in sequences.iter().enumerate() {
            let start = i * self.seq_len;
            ids[start..start + sequence.len()].copy_from_slice(sequence);
            rows[i] = (start + sequence.len() - 1) as i64;
        }
        let targets = vec![IGNORED; ids.len()];
        let batch = MicroBatch::new(&ids, &targets, 0, engine.device())?;
        let tokens = engine.next_tokens(&batch, &rows)?;
        Ok(tokens.into_iter().take(sequences.len()).collect())
    }

    /// The answers of all ranks, in order of the prompts of the round.
    fn gather(&self, engine: &mut Engine, own: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, TrainError> {
        // Rows of equal length, -1 behind an answer's end.
        let width = self.max_new_tokens;
        let mut rows = vec![-1i64; self.micro_batch_size * width];
        for (row, ids) in rows.chunks_mut(width).zip(own) {
            row[..ids.len()].copy_from_slice(ids);
        }
        let all = engine.all_gather(&rows)?;
        Ok(all.chunks(width).map(|row| row.iter().copied().take_while(|id| *id >= 0).collect()).collect())
    }
}
