//! The end of a training step: the global loss and gradient norm, and the update of the shards, or none.

use fsdp_comm::ReduceOp;
use fsdp_torch_ext as ext;
use tch::{Kind, Tensor};

use crate::engine::{Pass, timed};
use crate::optimizer::clip_divisor;
use crate::{Engine, EngineError, LossScaler, MicroBatch, StepReport};

impl Engine {
    /// Global mean loss, and the global norm of the unscaled gradients; padding is no part of any piece.
    pub(crate) fn loss_and_grad_norm(&mut self, pass: &mut Pass<'_>) -> Result<(f64, f64), EngineError> {
        let square_sum: f64 = self.grad_norms()?.iter().map(|n| n * n).sum();
        let sums = Tensor::from_slice(&[square_sum, pass.loss_sum]);
        pass.comm_time += timed(|| Ok(self.pg.all_reduce(&sums, ReduceOp::Sum)?))?;
        let norm = sums.f_double_value(&[0])?.sqrt() / self.loss_scale();
        Ok((sums.f_double_value(&[1])? / pass.num_tokens as f64, norm))
    }

    /// The norm of each of this rank's pieces of the (scaled) gradient.
    pub(crate) fn grad_norms(&self) -> Result<Vec<f64>, EngineError> {
        // libtorch adds the squares of a tensor one by one in fp32, which over millions of them loses digits.
        const MAX_NUMEL: i64 = 1 << 16;
        let pieces = self.piece_views(&self.optimizer.grad_shards)?;
        let parts = pieces.iter().map(|view| view.f_split(MAX_NUMEL, 0)).collect::<Result<Vec<_>, _>>()?;
        if parts.is_empty() {
            return Ok(vec![]);
        }
        let norms = ext::foreach_norm(&parts.iter().flatten().collect::<Vec<_>>())?;
        let norms = Vec::<f64>::try_from(Tensor::f_stack(&norms, 0)?.f_to_kind(Kind::Double)?)?;
        let mut norms = norms.into_iter();
        Ok(parts.iter().map(|p| norms.by_ref().take(p.len()).map(|n| n * n).sum::<f64>().sqrt()).collect())
    }

    /// Updates the shards, or with fp16 backs off; `false` if nothing was updated.
    pub(crate) fn optimizer_step(
        &mut self,
        report: &StepReport,
        batches: &[MicroBatch],
        lr: f64,
    ) -> Result<bool, EngineError> {
        if !report.loss.is_finite() {
            return Err(EngineError::NonFinite(self.find_non_finite(batches)?));
        }
        if !report.grad_norm.is_finite() {
            let can_back_off = self.scaler.as_mut().is_some_and(LossScaler::back_off);
            return if can_back_off { Ok(false) } else { Err(EngineError::NonFinite(self.find_non_finite(batches)?)) };
        }
        let grad_scale =
            self.loss_scale() * self.config.max_grad_norm.map_or(1.0, |max| clip_divisor(report.grad_norm, max));
        self.optimizer.step(lr, grad_scale)?;
        if let Some(scaler) = &mut self.scaler {
            scaler.grow();
        }
        Ok(true)
    }

    /// What the loss is multiplied by before backward.
    pub(crate) fn loss_scale(&self) -> f64 {
        self.scaler.map_or(1.0, |s| s.scale)
    }
}
