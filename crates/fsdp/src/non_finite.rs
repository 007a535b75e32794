//! Where a NaN or infinity first appears, for the person who has to find its cause.

use std::fmt;

use fsdp_comm::ReduceOp;
use fsdp_plan::UnitId;
use tch::Tensor;

use crate::pass::{HeadMode, Pass, to_device};
use crate::{Engine, EngineError, MicroBatch};

/// The first place of the model, in forward order, that is not finite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NonFinite {
    /// Weights are not finite already.
    Weight { rank: usize, unit: String, param: String },
    /// Weights are finite, the output of a unit's forward pass is not.
    Output { unit: String, at: Sequences },
    /// Outputs are finite, what a unit's backward pass hands on is not.
    OutputGradient { unit: String, at: Sequences },
    /// Only a parameter's gradient is not finite, summed over ranks; that of the unit nearest to the loss is named, and a
    /// rank that holds its shard.
    Gradient { rank: usize, unit: String, param: String },
    /// Computed again over the same weights and tokens, all is finite; or with fp16 at its last loss scale.
    Gone,
}

/// Sequences of one rank's microbatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    pub rank: usize,
    pub microbatch: usize,
    /// Indices in the microbatch, below 63; empty where nobody knows.
    pub sequences: Vec<usize>,
}

/// Where on this rank a unit's output, or what its backward hands on, is not finite.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BadFlow {
    pub unit: UnitId,
    pub microbatch: usize,
    /// A bit for each of the first 63 sequences.
    pub sequences: i64,
}

impl BadFlow {
    /// `None` where all of `flow` (`[N, D]`) is finite. Waits for the device.
    pub fn find(flow: &Tensor, unit: UnitId, microbatch: usize, seq_len: usize) -> Result<Option<Self>, EngineError> {
        if is_finite(flow)? {
            return Ok(None);
        }
        let by_sequence = flow.f_isfinite()?.f_reshape([-1, seq_len as i64 * flow.size()[1]])?.f_all_dim(1, false)?;
        let by_sequence = Vec::<bool>::try_from(by_sequence)?;
        let bad = by_sequence.iter().take(63).enumerate().filter(|(_, finite)| !**finite);
        Ok(Some(BadFlow { unit, microbatch, sequences: bad.fold(0, |bits, (i, _)| bits | 1 << i) }))
    }
}

impl NonFinite {
    /// The rank that has it, where one has.
    pub fn rank(&self) -> Option<usize> {
        match self {
            NonFinite::Weight { rank, .. } | NonFinite::Gradient { rank, .. } => Some(*rank),
            NonFinite::Output { at, .. } | NonFinite::OutputGradient { at, .. } => Some(at.rank),
            NonFinite::Gone => None,
        }
    }

    /// The sequences that the person should look at.
    pub fn sequences(&self) -> Option<&Sequences> {
        match self {
            NonFinite::Output { at, .. } | NonFinite::OutputGradient { at, .. } => Some(at),
            NonFinite::Weight { .. } | NonFinite::Gradient { .. } | NonFinite::Gone => None,
        }
    }
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NonFinite::Weight { rank, unit, param } => write!(
                f,
                "loss is not finite: rank {rank} holds NaN or infinity in the weight {param} of unit {unit}: \
                 the last updates overflowed (lower [optimizer] lr?), or the model's file holds them"
            ),
            NonFinite::Output { unit, at } => write!(
                f,
                "loss is not finite: on rank {} the output of unit {unit} is the first that is NaN or infinite",
                at.rank
            ),
            NonFinite::OutputGradient { unit, at } => write!(
                f,
                "gradient is not finite: on rank {} the backward pass of unit {unit} is the first that gives NaN or infinity",
                at.rank
            ),
            NonFinite::Gradient { rank, unit, param } => write!(
                f,
                "gradient is not finite: in the shard of rank {rank} that of parameter {param}, unit {unit}, is NaN or \
                 infinite"
            ),
            NonFinite::Gone => write!(
                f,
                "a gradient was not finite, and is finite when it is computed again: with fp16 the loss scale is at its \
                 end (use bf16); else a device computes wrongly"
            ),
        }
    }
}

impl Engine {
    /// Names the first place that is not finite, the same on all ranks. Collective.
    pub(crate) fn find_non_finite(&mut self, batches: &[MicroBatch]) -> Result<NonFinite, EngineError> {
        // Weights first, then outputs in forward order, then gradients from the loss backwards.
        let mut bad_weight = None;
        for (i, piece) in self.pieces.iter().enumerate() {
            if !is_finite(&piece.view(&self.optimizer.master)?)? {
                bad_weight = Some(i);
                break;
            }
        }
        let name = |engine: &Self, (rank, unit, index): (usize, UnitId, usize)| {
            let unit = &engine.plan.units[unit];
            (rank, unit.name.clone(), unit.params[index].name.clone())
        };
        let place = |engine: &Self, piece: Option<usize>| piece.map(|i| engine.place_of_piece(i));
        if let Some(found) = self.first_over_ranks(place(self, bad_weight), false)? {
            let (rank, unit, param) = name(self, found);
            return Ok(NonFinite::Weight { rank, unit, param });
        }
        for (microbatch, batch) in batches.iter().enumerate() {
            let bad_output = self.first_non_finite_output(batch)?.map(|bad| BadFlow { microbatch, ..bad });
            if let Some((unit, at)) = self.first_flow_over_ranks(bad_output, false)? {
                return Ok(NonFinite::Output { unit, at });
            }
        }
        // The next step may have begun to overwrite them.
        let mut pass = Pass::new(batches, self.units.len(), HeadMode::Loss, self.device)?;
        pass.find_non_finite = true;
        let _ = self.backward_pass(&mut pass, false)?;
        if let Some((unit, at)) = self.first_flow_over_ranks(pass.first_non_finite, true)? {
            return Ok(NonFinite::OutputGradient { unit, at });
        }
        let bad_grad = self.grad_parts.last_non_finite()?;
        let found = self.first_over_ranks(place(self, bad_grad), true)?;
        Ok(found.map_or(NonFinite::Gone, |found| {
            let (rank, unit, param) = name(self, found);
            NonFinite::Gradient { rank, unit, param }
        }))
    }

    /// (unit, index of the parameter in it) of a piece.
    fn place_of_piece(&self, piece: usize) -> (UnitId, usize) {
        let piece = &self.pieces[piece];
        let params = &self.plan.units[piece.unit].params;
        (piece.unit, params.iter().position(|p| p.name == piece.name).expect("pieces are of the plan's parameters"))
    }

    /// The unit and sequences of the first of the ranks' places in forward order, or of the last one. Collective.
    fn first_flow_over_ranks(
        &mut self,
        flow: Option<BadFlow>,
        last: bool,
    ) -> Result<Option<(String, Sequences)>, EngineError> {
        let found = self.first_over_ranks(flow.map(|flow| (flow.unit, 0)), last)?;
        let Some((rank, unit, _)) = found else { return Ok(None) };
        let of_ranks = self.all_gather(&flow.map_or([0, 0], |flow| [flow.microbatch as i64, flow.sequences]))?;
        let (microbatch, bits) = (of_ranks[2 * rank] as usize, of_ranks[2 * rank + 1]);
        let sequences = (0..63).filter(|i| bits >> i & 1 == 1).collect();
        Ok(Some((self.units[unit].name.clone(), Sequences { rank, microbatch, sequences })))
    }

    /// (rank, unit, index) of the first place over all ranks in forward order, or of the last one.
    fn first_over_ranks(
        &mut self,
        place: Option<(UnitId, usize)>,
        last: bool,
    ) -> Result<Option<(usize, UnitId, usize)>, EngineError> {
        // One number that orders by place, then rank; 0 is none. Max is what all_reduce has.
        const BITS: u32 = 20;
        let limit = (1i64 << BITS) - 1;
        let own_rank = self.groups.world().rank() as i64;
        let key = place.map_or(0, |(unit, index)| {
            let order = |n: usize| if last { n as i64 + 1 } else { limit - n as i64 };
            (order(unit) << (2 * BITS)) | (order(index) << BITS) | (limit - own_rank)
        });
        let key = to_device(&[key], self.device)?;
        self.groups.world().all_reduce(&key, ReduceOp::Max)?;
        let key = key.f_int64_value(&[0])?;
        let back = |n: i64| (if last { n - 1 } else { limit - n }) as usize;
        Ok((key != 0).then(|| ((limit - (key & limit)) as usize, back(key >> (2 * BITS)), back((key >> BITS) & limit))))
    }
}

/// Whether all elements are finite.
pub(crate) fn is_finite(t: &Tensor) -> Result<bool, EngineError> {
    Ok(t.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
