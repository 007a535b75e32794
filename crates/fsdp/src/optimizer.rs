//! AdamW over shards. The host waits for nothing: learning rate aside, all that a step depends on is on the device.

use fsdp_plan::{Offload as Offloaded, UnitLayout};
use fsdp_torch_ext::{self as ext, pinned};
use tch::{Device, Kind, Tensor};

use crate::EngineError;
use crate::offload::Offload;

/// AdamW's constants (Loshchilov and Hutter, arXiv:1711.05101), named as in `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Acts on tensors of two or more dimensions only.
    pub weight_decay: f64,
}

/// This rank's shards of everything that training changes, each one flat fp32 tensor of n elements.
#[derive(Debug)]
pub struct Optimizer {
    config: AdamWConfig,
    /// In the host's memory where it is offloaded, as the moments are; else on the device.
    pub master: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    pub grad_shards: Tensor,
    /// Optimizer steps taken: f32 `[]` on the device.
    pub num_steps: Tensor,
    place: Place,
}

/// Where the moments are, and with them how they are updated.
#[derive(Debug)]
enum Place {
    /// Views of all ranges with weight decay, and of all without.
    Device([Tensors; 2]),
    Host(Offload),
}

/// What a step depends on besides the gradients.
#[derive(Debug)]
pub struct Update<'a> {
    pub lr: f64,
    /// Gradients are divided by this on the way, which un-scales and clips them. f32 `[]`
    pub grad_scale: &'a Tensor,
    /// Where it is 1 and not 0, nothing changes. f32 `[]`
    pub found_inf: &'a Tensor,
}

impl Optimizer {
    /// `shard_starts[unit][group]` is where a group's shard starts in the flat tensors of `numel` elements; `rank` is
    /// the one in the group that shards.
    pub fn new(
        config: AdamWConfig,
        layouts: &[UnitLayout],
        shard_starts: &[Vec<usize>],
        numel: usize,
        (rank, num_shards): (usize, usize),
        device: Device,
        offloaded: Offloaded,
    ) -> Result<Self, EngineError> {
        let mut ranges: Vec<(usize, usize, bool)> = Vec::new();
        for (layout, starts) in layouts.iter().zip(shard_starts) {
            for (group, &start) in layout.groups.iter().zip(starts) {
                let decay = group.shard_decay_numel(rank, num_shards);
                let rest = group.shard_numel(num_shards) - decay;
                for (start, len, decays) in [(start, decay, true), (start + decay, rest, false)] {
                    match ranges.last_mut() {
                        _ if len == 0 => {}
                        // Neighbouring groups of one class are one range.
                        Some((s, l, d)) if *s + *l == start && *d == decays => *l += len,
                        _ => ranges.push((start, len, decays)),
                    }
                }
            }
        }
        let on_device = || Tensor::f_zeros([numel as i64], (Kind::Float, device));
        let on_host = || -> Result<Tensor, EngineError> {
            let mut tensor = pinned::empty(&[numel as i64], Kind::Float)?;
            let _ = tensor.f_zero_()?;
            Ok(tensor)
        };
        let grad_shards = on_device()?;
        let (master, exp_avg, exp_avg_sq) = match offloaded {
            Offloaded::None => (on_device()?, on_device()?, on_device()?),
            Offloaded::Optimizer => (on_device()?, on_host()?, on_host()?),
            Offloaded::Master => (on_host()?, on_host()?, on_host()?),
        };
        let place = match offloaded {
            Offloaded::None => {
                let of = |decays: bool| -> Result<Tensors, EngineError> {
                    let views = |t: &Tensor| -> Result<Vec<Tensor>, EngineError> {
                        let ranges = ranges.iter().filter(|(.., d)| *d == decays);
                        ranges.map(|&(start, len, _)| view(t, start, len)).collect()
                    };
                    Ok(Tensors {
                        params: views(&master)?,
                        grads: views(&grad_shards)?,
                        exp_avgs: views(&exp_avg)?,
                        exp_avg_sqs: views(&exp_avg_sq)?,
                    })
                };
                Place::Device([of(true)?, of(false)?])
            }
            Offloaded::Optimizer => Place::Host(Offload::new(&ranges, numel, 2, device)?),
            Offloaded::Master => Place::Host(Offload::new(&ranges, numel, 3, device)?),
        };
        let num_steps = Tensor::f_zeros([1i64; 0], (Kind::Float, device))?;
        Ok(Optimizer { config, master, exp_avg, exp_avg_sq, grad_shards, num_steps, place })
    }

    /// One AdamW step. `master_changed(start, master)` hears of each piece of master weights that came through the
    /// device, as f32 on it; nothing where they are there anyway.
    pub fn step(
        &mut self,
        update: &Update<'_>,
        mut master_changed: impl FnMut(usize, &Tensor) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let _ = self.num_steps.f_add_(&update.found_inf.f_neg()?.f_add_scalar(1.0)?)?;
        let (config, num_steps, grad_shards, master) = (&self.config, &self.num_steps, &self.grad_shards, &self.master);
        match &mut self.place {
            Place::Device([decayed, undecayed]) => {
                decayed.step(config, config.weight_decay, num_steps, update)?;
                undecayed.step(config, 0.0, num_steps, update)
            }
            Place::Host(offload) => offload.pass(&[&self.exp_avg, &self.exp_avg_sq, master], |chunk, buffers| {
                let (start, len) = (chunk.flat.start, chunk.flat.len());
                let param = match buffers.get(2) {
                    Some(came) => came.shallow_clone(),
                    None => view(master, start, len)?,
                };
                let of = Tensors {
                    params: vec![param],
                    grads: vec![view(grad_shards, start, len)?],
                    exp_avgs: vec![buffers[0].shallow_clone()],
                    exp_avg_sqs: vec![buffers[1].shallow_clone()],
                };
                of.step(config, if chunk.decays { config.weight_decay } else { 0.0 }, num_steps, update)?;
                buffers.get(2).map_or(Ok(()), |came| master_changed(start, came))
            }),
        }
    }

    /// Bytes on the device through which offloaded state passes.
    pub fn offload_bytes(&self) -> u64 {
        match &self.place {
            Place::Device(_) => 0,
            Place::Host(offload) => offload.allocated_bytes(),
        }
    }
}

/// Lists of tensors of equal lengths: an element of each belongs to one range.
#[derive(Debug)]
struct Tensors {
    params: Vec<Tensor>,
    grads: Vec<Tensor>,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
}

impl Tensors {
    fn step(
        &self,
        &AdamWConfig { beta1, beta2, eps, .. }: &AdamWConfig,
        weight_decay: f64,
        num_steps: &Tensor,
        update: &Update<'_>,
    ) -> Result<(), EngineError> {
        ext::fused_adamw(
            &refs(&self.params),
            &refs(&self.grads),
            &refs(&self.exp_avgs),
            &refs(&self.exp_avg_sqs),
            &vec![num_steps; self.params.len()],
            &ext::AdamW { lr: update.lr, beta1, beta2, eps, weight_decay },
            Some(update.grad_scale),
            update.found_inf,
        )?;
        Ok(())
    }
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

fn view(t: &Tensor, start: usize, len: usize) -> Result<Tensor, EngineError> {
    Ok(t.f_narrow(0, start as i64, len as i64)?)
}
