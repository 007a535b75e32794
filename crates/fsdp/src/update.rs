//! The end of a training step: the global loss and gradient norm, and the update of the shards, or none. All of it on the
//! device; scalars are f64 `[]`.

use fsdp_comm::ReduceOp;
use fsdp_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::engine::timed;
use crate::optimizer::Update;
use crate::pass::{Pass, to_device};
use crate::{Engine, EngineError, Pace, Piece};

impl Engine {
    /// Updates the shards, or leaves them where something is not finite. Returns what the host has to know, in its memory
    /// once the stream is there: loss, gradient norm, tokens, `num_stops`, whether no smaller loss scale helps, the ranks' peak memory, then each
    /// rank's `pace` (busy, data, in microseconds); f64 `[6 + 2 * ranks]`.
    pub(crate) fn update(
        &mut self,
        pass: &mut Pass<'_>,
        num_stops: &Tensor,
        pace: Pace,
        lr: f64,
    ) -> Result<Tensor, EngineError> {
        let loss_scale = self.loss_scale()?;
        let (loss, grad_norm) = self.loss_and_grad_norm(pass, &loss_scale)?;

        let as_flag = |is_finite: &Tensor| is_finite.f_logical_not()?.f_to_kind(Kind::Float);
        let loss_bad = as_flag(&loss.f_isfinite()?)?;
        let bad = as_flag(&loss.f_isfinite()?.f_logical_and(&grad_norm.f_isfinite()?)?)?;
        // With fp16 an overflow of gradients is part of the course, as long as the loss scale can fall.
        let is_fatal = match &self.scaler {
            Some(scaler) => bad.f_mul(&scaler.is_at_end()?)?.f_maximum(&loss_bad)?,
            None => bad.shallow_clone(),
        };
        if !self.config.skip_non_finite {
            self.halted = self.halted.f_maximum(&is_fatal)?;
        }
        let found_inf = bad.f_maximum(&self.halted)?;
        let divisor = match self.config.max_grad_norm {
            Some(max) => clip_divisor(&grad_norm, max)?.f_mul(&loss_scale)?,
            None => loss_scale.shallow_clone(),
        };
        let update = Update { lr, grad_scale: &divisor.f_to_kind(Kind::Float)?, found_inf: &found_inf };
        let param_shards = &self.param_shards;
        self.optimizer.step(&update, |start, master| param_shards.iter().try_for_each(|p| p.take(start, master)))?;
        self.groups.shards().shards_changed()?;

        if let Some(scaler) = &mut self.scaler {
            // What no smaller scale mends does not make it smaller.
            scaler.update(&bad.f_sub(&is_fatal)?)?;
        }
        let (rank, world_size) = (self.groups.world().rank(), self.groups.world().world_size());
        let mut of_ranks = vec![0; 1 + 2 * world_size];
        of_ranks[0] = self.peak_memory_bytes()? as i64;
        of_ranks[1 + 2 * rank..][..2].copy_from_slice(&[pace.busy, pace.data].map(|time| time.as_micros() as i64));
        let of_ranks = to_device(&of_ranks, self.device)?;
        pass.comm_time += timed(|| Ok(self.groups.world().all_reduce(&of_ranks, ReduceOp::Max)?))?;
        let of_all =
            Tensor::f_stack(&[&loss, &grad_norm, &pass.num_tokens, num_stops, &is_fatal.f_to_kind(Kind::Double)?], 0)?;
        Self::to_host(&Tensor::f_cat(&[of_all, of_ranks.f_to_kind(Kind::Double)?], 0)?)
    }

    /// Global mean loss, and the global norm of the unscaled gradients; padding is no part of any piece.
    fn loss_and_grad_norm(
        &mut self,
        pass: &mut Pass<'_>,
        loss_scale: &Tensor,
    ) -> Result<(Tensor, Tensor), EngineError> {
        // Each replica has the whole gradient.
        let square_sum = self.grad_parts.square_sum()?.f_div_scalar(self.plan.num_replicas as f64)?;
        let sums = Tensor::f_stack(&[&square_sum, &pass.loss_sum], 0)?;
        pass.comm_time += timed(|| Ok(self.groups.world().all_reduce(&sums, ReduceOp::Sum)?))?;
        Ok((sums.f_get(1)?.f_div(&pass.num_tokens)?, sums.f_get(0)?.f_sqrt()?.f_div(loss_scale)?))
    }
}

/// Views of this rank's pieces of the gradient, cut so that norms of them can be added up.
#[derive(Debug)]
pub(crate) struct GradParts {
    parts: Vec<Tensor>,
    /// By part, the piece that it is of.
    piece_of: Vec<usize>,
    device: Device,
}

impl GradParts {
    pub fn new(pieces: &[Piece], grad_shards: &Tensor) -> Result<Self, EngineError> {
        // On CPUs libtorch adds the squares of a tensor one by one in fp32, which over millions of them loses digits.
        let max_numel = if grad_shards.device() == Device::Cpu { 1 << 16 } else { i64::MAX };
        let (mut parts, mut piece_of) = (vec![], vec![]);
        for (i, piece) in pieces.iter().enumerate() {
            let of_piece = piece.view(grad_shards)?.f_split(max_numel, 0)?;
            piece_of.extend(of_piece.iter().map(|_| i));
            parts.extend(of_piece);
        }
        Ok(GradParts { parts, piece_of, device: grad_shards.device() })
    }

    /// The square of the norm of all of them: f64 `[]`.
    fn square_sum(&self) -> Result<Tensor, EngineError> {
        // A sum of more elements is shared out between threads, and depends on their number.
        const MAX_NUMEL: i64 = 1 << 14;
        let mut sums = self.norms()?.f_square()?;
        while sums.numel() > 1 {
            let parts = sums.f_split(MAX_NUMEL, 0)?;
            let of = |part: &Tensor| part.f_sum(Kind::Double);
            sums = Tensor::f_stack(&parts.iter().map(of).collect::<Result<Vec<_>, _>>()?, 0)?;
        }
        Ok(sums.f_sum(Kind::Double)?)
    }

    /// The last piece whose norm is not finite. Waits for the device.
    pub fn last_non_finite(&self) -> Result<Option<usize>, EngineError> {
        let norms = Vec::<f64>::try_from(self.norms()?)?;
        Ok(norms.iter().rposition(|norm| !norm.is_finite()).map(|part| self.piece_of[part]))
    }

    /// f64 `[parts]`
    fn norms(&self) -> Result<Tensor, EngineError> {
        if self.parts.is_empty() {
            return Ok(Tensor::f_zeros([0], (Kind::Double, self.device))?);
        }
        let norms = ext::foreach_norm(&self.parts.iter().collect::<Vec<_>>())?;
        Ok(Tensor::f_stack(&norms, 0)?.f_to_kind(Kind::Double)?)
    }
}

/// The factor by which gradients are divided so that their norm does not exceed `max_norm`: torch's
/// `clip_grad_norm_` multiplies by `min(1, max_norm / (norm + 1e-6))`.
fn clip_divisor(norm: &Tensor, max_norm: f64) -> Result<Tensor, EngineError> {
    Ok(norm.f_add_scalar(1e-6)?.f_div_scalar(max_norm)?.f_clamp_min(1.0)?)
}
