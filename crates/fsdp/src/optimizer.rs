//! AdamW over shards, and how far gradients are clipped.

use fsdp_plan::UnitLayout;
use fsdp_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::EngineError;

/// AdamW's constants (Loshchilov and Hutter, arXiv:1711.05101), named as in `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Acts on tensors of two or more dimensions only.
    pub weight_decay: f64,
}

/// This rank's shards of everything that training changes, each one flat fp32 tensor, and the views that the
/// optimizer works on.
#[derive(Debug)]
pub struct Optimizer {
    config: AdamWConfig,
    pub master: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    pub grad_shards: Tensor,
    /// Optimizer steps taken.
    pub num_steps: u64,
    /// Ranges (start, length) with and without weight decay.
    decayed: Vec<(i64, i64)>,
    undecayed: Vec<(i64, i64)>,
}

impl Optimizer {
    /// `shard_starts[unit][group]` is where a group's shard starts in the flat tensors of `numel` elements.
    pub fn new(
        config: AdamWConfig,
        layouts: &[UnitLayout],
        shard_starts: &[Vec<usize>],
        numel: usize,
        (rank, world_size): (usize, usize),
    ) -> Result<Self, EngineError> {
        let (mut decayed, mut undecayed) = (Vec::new(), Vec::new());
        for (layout, starts) in layouts.iter().zip(shard_starts) {
            for (group, &start) in layout.groups.iter().zip(starts) {
                let decay = group.shard_decay_numel(rank, world_size);
                let rest = group.shard_numel(world_size) - decay;
                let push = |ranges: &mut Vec<(i64, i64)>, start: usize, len: usize| match ranges.last_mut() {
                    _ if len == 0 => {}
                    // Neighbouring groups of one class are one range.
                    Some((s, l)) if *s + *l == start as i64 => *l += len as i64,
                    _ => ranges.push((start as i64, len as i64)),
                };
                push(&mut decayed, start, decay);
                push(&mut undecayed, start + decay, rest);
            }
        }
        let zeros = || Tensor::f_zeros([numel as i64], (Kind::Float, Device::Cpu));
        Ok(Optimizer {
            config,
            master: zeros()?,
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
            grad_shards: zeros()?,
            num_steps: 0,
            decayed,
            undecayed,
        })
    }

    /// One AdamW step. Gradients are divided by `grad_scale` on the way, which un-scales and clips them.
    pub fn step(&mut self, lr: f64, grad_scale: f64) -> Result<(), EngineError> {
        self.num_steps += 1;
        let step = Tensor::from(self.num_steps as f32);
        let grad_scale = Tensor::from(grad_scale as f32);
        let found_inf = Tensor::from(0.0f32);
        for (ranges, weight_decay) in [(&self.decayed, self.config.weight_decay), (&self.undecayed, 0.0)] {
            let views = |t: &Tensor| -> Result<Vec<Tensor>, EngineError> {
                ranges.iter().map(|&(start, len)| Ok(t.f_narrow(0, start, len)?)).collect()
            };
            let (params, grads) = (views(&self.master)?, views(&self.grad_shards)?);
            let (exp_avgs, exp_avg_sqs) = (views(&self.exp_avg)?, views(&self.exp_avg_sq)?);
            let steps = vec![&step; params.len()];
            let AdamWConfig { beta1, beta2, eps, .. } = self.config;
            let constants = ext::AdamW { lr, beta1, beta2, eps, weight_decay };
            ext::fused_adamw(
                &refs(&params),
                &refs(&grads),
                &refs(&exp_avgs),
                &refs(&exp_avg_sqs),
                &steps,
                &constants,
                Some(&grad_scale),
                &found_inf,
            )?;
        }
        Ok(())
    }
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

/// The factor by which gradients are divided so that their norm does not exceed `max_norm`: torch's
/// `clip_grad_norm_` multiplies by `min(1, max_norm / (norm + 1e-6))`.
pub fn clip_divisor(norm: f64, max_norm: f64) -> f64 {
    ((norm + 1e-6) / max_norm).max(1.0)
}
