//! The engine's training state as flat tensors and pieces of parameters: what is loaded, saved and exported.

use std::ops::Range;

use fsdp_comm::ProcessGroup;
use fsdp_plan::{Init, Memory, Offload, Plan, UnitId};
use fsdp_torch_ext as ext;
use tch::{Device, Tensor};

use crate::scaler::DeviceScaler;
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

impl Piece {
    /// The piece in a flat tensor.
    pub(crate) fn view(&self, flat: &Tensor) -> Result<Tensor, EngineError> {
        Ok(flat.f_narrow(0, self.flat.start as i64, self.flat.len() as i64)?)
    }
}

/// `t` itself where it is in the host's memory, else a copy.
pub(crate) fn on_host(t: &Tensor) -> Result<Tensor, EngineError> {
    Ok(t.f_to_device(Device::Cpu)?)
}

/// A rank's place among the ranks of its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub shard: usize,
    pub num_shards: usize,
    pub replica: usize,
}

/// A group's shard in the param dtype, on the device, where its master weights are in the host's memory.
#[derive(Debug)]
pub(crate) struct ParamShard {
    /// Elements in the rank's flat state tensors.
    pub flat: Range<usize>,
    pub tensor: Tensor,
}

impl ParamShard {
    /// Takes over what is its own of `master` (fp32), which starts at element `start` of the flat tensor.
    pub fn take(&self, start: usize, master: &Tensor) -> Result<(), EngineError> {
        let both = self.flat.start.max(start)..self.flat.end.min(start + master.numel());
        if !both.is_empty() {
            let part = |t: &Tensor, start: usize| t.f_narrow(0, (both.start - start) as i64, both.len() as i64);
            part(&self.tensor, self.flat.start)?.f_copy_(&part(master, start)?)?;
        }
        Ok(())
    }
}

/// The flat fp32 tensors that make up a rank's training state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateKind {
    Param,
    ExpAvg,
    ExpAvgSq,
}

impl StateKind {
    pub const ALL: [StateKind; 3] = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq];
}

/// What the trainer reads and writes: state by pieces, the group, the account of memory.
impl Engine {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The group of all ranks.
    pub fn process_group(&mut self) -> &mut ProcessGroup {
        self.groups.world()
    }

    /// This rank's shard, of so many, and its replica. Ranks of other replicas hold the same state.
    pub fn place(&mut self) -> Place {
        let pg = self.groups.shards();
        let (shard, num_shards) = (pg.rank(), pg.world_size());
        Place { shard, num_shards, replica: self.groups.world().rank() / num_shards }
    }

    /// This rank's pieces of parameters, in the order of the flat state tensors.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Gives each piece of this rank, in their order, with its elements in the flat state `kind` to `f`. Waits for the
    /// device.
    pub fn read_state<E: From<EngineError>>(
        &self,
        kind: StateKind,
        f: impl FnMut(&Piece, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.live_state()?.read(kind, f)
    }

    /// The same to change the elements: they hold what is there, and what `f` leaves goes there. Waits for the device.
    pub fn write_state<E: From<EngineError>>(
        &mut self,
        kind: StateKind,
        mut f: impl FnMut(&Piece, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.synchronize()?;
        for piece in &self.pieces {
            let mut there = piece.view(self.state(kind))?;
            let mut here = on_host(&there)?;
            ext::with_f32_slice_mut(&mut here, |elements| f(piece, elements)).map_err(EngineError::from)??;
            if there.device() != Device::Cpu {
                there.f_copy_(&here).map_err(EngineError::from)?;
            }
        }
        if kind == StateKind::Param {
            self.param_shards.iter().try_for_each(|shard| shard.take(0, &self.optimizer.master))?;
            self.groups.shards().shards_changed().map_err(EngineError::from)?;
        }
        Ok(self.synchronize()?)
    }

    pub(crate) fn state(&self, kind: StateKind) -> &Tensor {
        match kind {
            StateKind::Param => &self.optimizer.master,
            StateKind::ExpAvg => &self.optimizer.exp_avg,
            StateKind::ExpAvgSq => &self.optimizer.exp_avg_sq,
        }
    }

    pub(crate) fn synchronize(&self) -> Result<(), EngineError> {
        if self.device != Device::Cpu {
            ext::accelerator::synchronize(self.device)?;
        }
        Ok(self.groups.check()?)
    }

    /// Optimizer steps taken, and the loss scaler: what a checkpoint holds besides the flat state. Waits for the device.
    pub fn progress(&self) -> Result<(u64, Option<LossScaler>), EngineError> {
        let num_steps = self.optimizer.num_steps.f_double_value(&[])? as u64;
        Ok((num_steps, self.scaler.as_ref().map(DeviceScaler::read).transpose()?))
    }

    pub fn set_progress(&mut self, num_steps: u64, scaler: Option<LossScaler>) -> Result<(), EngineError> {
        let _ = self.optimizer.num_steps.f_fill_(num_steps as f64)?;
        if let (Some(_), Some(saved)) = (&self.scaler, scaler) {
            self.scaler = Some(DeviceScaler::new(saved, self.device)?);
        }
        Ok(())
    }

    /// Bytes that the engine has allocated for as long as it lives, read off its tensors and buffers.
    pub fn allocated(&self) -> Memory {
        let tensor = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u64;
        let o = &self.optimizer;
        let (master, moments) = (tensor(&o.master), tensor(&o.exp_avg) + tensor(&o.exp_avg_sq));
        let offload = self.plan.offload;
        let offloaded_moments = if offload == Offload::None { 0 } else { moments };
        let offloaded_master = if offload == Offload::Master { master } else { 0 };
        Memory {
            master: master - offloaded_master,
            optimizer: moments - offloaded_moments,
            offloaded: offloaded_master + offloaded_moments,
            offload_buffers: o.offload_bytes() + self.param_shards.iter().map(|p| tensor(&p.tensor)).sum::<u64>(),
            grad_shards: tensor(&o.grad_shards),
            slots: self.slots.iter().map(|s| s.len_bytes() as u64).sum(),
            grad_buffers: self.grad_buffers.iter().map(|b| b.len_bytes() as u64).sum(),
            ..Memory::default()
        }
    }
}
