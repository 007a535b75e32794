//! The engine's training state as flat tensors and pieces of parameters: what is loaded, saved and exported.

use std::ops::Range;

use fsdp_comm::ProcessGroup;
use fsdp_plan::{Init, Memory, Plan, UnitId};
use tch::Tensor;

use crate::{Engine, EngineError, LossScaler};

/// A contiguous piece of one parameter in this rank's flat state tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    pub unit: UnitId,
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
    /// First element inside the flattened parameter.
    pub start: usize,
    /// Elements in the rank's flat state tensors.
    pub flat: Range<usize>,
}

/// The flat fp32 tensors that make up a rank's training state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateKind {
    Param,
    ExpAvg,
    ExpAvgSq,
}

/// What the trainer reads and writes: state by pieces, the group, the account of memory.
impl Engine {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn process_group(&mut self) -> &mut ProcessGroup {
        &mut self.pg
    }

    /// This rank's pieces of parameters, in the order of the flat state tensors.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// A flat fp32 state tensor of this rank; [`Piece::flat`] indexes it.
    pub fn state(&self, kind: StateKind) -> &Tensor {
        match kind {
            StateKind::Param => &self.optimizer.master,
            StateKind::ExpAvg => &self.optimizer.exp_avg,
            StateKind::ExpAvgSq => &self.optimizer.exp_avg_sq,
        }
    }

    pub fn state_mut(&mut self, kind: StateKind) -> &mut Tensor {
        match kind {
            StateKind::Param => &mut self.optimizer.master,
            StateKind::ExpAvg => &mut self.optimizer.exp_avg,
            StateKind::ExpAvgSq => &mut self.optimizer.exp_avg_sq,
        }
    }

    /// Views of this rank's pieces in a flat tensor, in their order.
    pub(crate) fn piece_views(&self, flat: &Tensor) -> Result<Vec<Tensor>, EngineError> {
        let view = |p: &Piece| Ok(flat.f_narrow(0, p.flat.start as i64, p.flat.len() as i64)?);
        self.pieces.iter().map(view).collect()
    }

    /// Optimizer steps taken, and the loss scaler: what a checkpoint holds besides the flat state.
    pub fn progress(&self) -> (u64, Option<LossScaler>) {
        (self.optimizer.num_steps, self.scaler)
    }

    pub fn set_progress(&mut self, num_steps: u64, scaler: Option<LossScaler>) {
        self.optimizer.num_steps = num_steps;
        self.scaler = scaler.or(self.scaler);
    }

    /// Bytes that the engine has allocated for as long as it lives, read off its tensors and buffers.
    pub fn allocated(&self) -> Memory {
        let tensor = |t: &Tensor| (t.numel() * 4) as u64;
        let o = &self.optimizer;
        Memory {
            master: tensor(&o.master),
            optimizer: tensor(&o.exp_avg) + tensor(&o.exp_avg_sq),
            grad_shards: tensor(&o.grad_shards),
            slots: self.slots.iter().map(|s| s.len_bytes() as u64).sum(),
            grad_buffers: self.grad_buffers.iter().map(|b| b.len_bytes() as u64).sum(),
            ..Memory::default()
        }
    }
}
