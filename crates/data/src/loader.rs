//! One rank's view of the data: the microbatches of each optimizer step.
//!
//! Shapes: B sequences of a microbatch, T tokens of a sequence.

use serde::{Deserialize, Serialize};

use crate::IGNORED;
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::order::EpochOrder;

/// Gives one rank its microbatches. All ranks get the same number of them in each step.
///
/// A step takes the next B * accumulation * world_size samples of the epoch's order, a global batch. Microbatch m of
/// rank r is its samples (m * world_size + r) * B and the B - 1 after it. Where an epoch ends inside a global batch,
/// the missing sequences are fully masked, and the next step begins the next epoch.
#[derive(Debug)]
pub struct Loader {
    dataset: Dataset,
    rank: usize,
    world_size: usize,
    micro_batch_size: usize,
    accumulation: usize,
    position: Position,
    order: EpochOrder,
}

/// Where the next step begins. The same for all ranks, and valid for any number of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub epoch: u64,
    /// Index in the epoch's order of the next global batch's first sample.
    pub sample: u64,
}

/// What one rank feeds to the model at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    pub input_ids: Vec<i64>, // [B, T]
    /// The id that each position shall predict: the label of the next position, -100 for none.
    pub targets: Vec<i64>, // [B, T]
    /// B
    pub batch: usize,
    /// T
    pub seq_len: usize,
    /// Targets that are not -100.
    pub num_valid_tokens: u64,
}

impl Loader {
    /// A loader at the beginning of epoch 0.
    pub fn new(dataset: Dataset, rank: usize, world_size: usize, micro_batch_size: usize, accumulation: usize) -> Self {
        assert!(rank < world_size && micro_batch_size > 0 && accumulation > 0);
        let order = order_of(&dataset, 0);
        Loader {
            dataset,
            rank,
            world_size,
            micro_batch_size,
            accumulation,
            position: Position { epoch: 0, sample: 0 },
            order,
        }
    }

    /// This rank's microbatches of the next step: `accumulation` of them. After an error the position is unchanged.
    pub fn next_step(&mut self) -> Result<Vec<MicroBatch>, DataError> {
        let mut micro_batches = Vec::with_capacity(self.accumulation);
        for m in 0..self.accumulation {
            let first = (m * self.world_size + self.rank) * self.micro_batch_size;
            micro_batches.push(self.micro_batch(self.position.sample + first as u64)?);
        }
        let sample = self.position.sample + self.global_batch();
        if sample < self.dataset.num_samples() {
            self.position.sample = sample;
        } else {
            self.go_to(self.position.epoch + 1, 0);
        }
        Ok(micro_batches)
    }

    /// Where the samples come from that rank `rank` has in these sequences of its microbatch of the step at `position`, as
    /// `train.jsonl:18`; masked sequences have none.
    pub fn places(
        &self,
        position: Position,
        rank: usize,
        microbatch: usize,
        sequences: &[usize],
    ) -> Result<Vec<String>, DataError> {
        let order = order_of(&self.dataset, position.epoch);
        let first = position.sample + ((microbatch * self.world_size + rank) * self.micro_batch_size) as u64;
        let indices = sequences.iter().map(|sequence| first + *sequence as u64);
        indices
            .filter(|index| *index < self.dataset.num_samples())
            .map(|index| self.dataset.place(order.sample(index)))
            .collect()
    }

    /// Optimizer steps that an epoch takes from its beginning, the last of them perhaps with masked sequences.
    pub fn steps_per_epoch(&self) -> u64 {
        self.dataset.num_samples().div_ceil(self.global_batch())
    }

    pub fn position(&self) -> Position {
        self.position
    }

    /// Makes `position`, from a loader over the same data, the next step's beginning.
    pub fn seek(&mut self, position: Position) -> Result<(), DataError> {
        let num_samples = self.dataset.num_samples();
        if position.sample >= num_samples {
            return Err(DataError::PositionOutside { sample: position.sample, num_samples });
        }
        self.go_to(position.epoch, position.sample);
        Ok(())
    }

    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    fn go_to(&mut self, epoch: u64, sample: u64) {
        if epoch != self.position.epoch {
            self.order = order_of(&self.dataset, epoch);
        }
        self.position = Position { epoch, sample };
    }

    /// Sequences of a step over all ranks.
    pub fn global_batch(&self) -> u64 {
        (self.micro_batch_size * self.accumulation * self.world_size) as u64
    }

    /// The samples from `first` on in the epoch's order.
    fn micro_batch(&self, first: u64) -> Result<MicroBatch, DataError> {
        let (batch, seq_len) = (self.micro_batch_size, self.dataset.seq_len());
        let mut input_ids = vec![self.dataset.pad_id(); batch * seq_len];
        let mut targets = vec![IGNORED; batch * seq_len];
        for b in 0..batch {
            let index = first + b as u64;
            if index >= self.dataset.num_samples() {
                break;
            }
            let sample = self.dataset.sample(self.order.sample(index))?;
            let row = b * seq_len;
            let len = sample.input_ids.len();
            input_ids[row..row + len].copy_from_slice(&sample.input_ids);
            if len > 1 {
                targets[row..row + len - 1].copy_from_slice(&sample.labels[1..]);
            }
        }
        let num_valid_tokens = targets.iter().filter(|t| **t != IGNORED).count() as u64;
        Ok(MicroBatch { input_ids, targets, batch, seq_len, num_valid_tokens })
    }
}

fn order_of(dataset: &Dataset, epoch: u64) -> EpochOrder {
    if dataset.shuffle { EpochOrder::shuffled(dataset.seed, epoch, dataset.num_samples()) } else { EpochOrder::File }
}
