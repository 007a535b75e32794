//! All of the plan for one job, and its text form.

use std::fmt;

use fsdp_config::Offload;

use crate::program::{ProgramInput, Step, forward_only, training};
use crate::replay::{Batch, Replay, replay};
use crate::units::units;
use crate::{Architecture, Dtype, SlotMap, Strategy, Unit, UnitLayout};

/// What a plan is made from, besides the architecture and the dtypes of parameters.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput {
    /// Ranks that a unit is sharded over: all of them; with `hybrid_shard` those of one group, with `no_shard` 1.
    pub num_shards: usize,
    /// Groups of so many ranks; above 1 with `hybrid_shard` and `no_shard` only.
    pub num_replicas: usize,
    pub strategy: Strategy,
    /// With `full_shard` and `hybrid_shard` so many first blocks (all, if there are fewer) have a slot each and stay
    /// unsharded from forward to backward; with the others all blocks do.
    pub resident_units: usize,
    pub prefetch: usize,
    pub recompute: bool,
    pub accumulation: usize,
    pub micro_batch_size: usize,
    pub seq_len: usize,
    /// Dtype of activations: the default param dtype.
    pub compute_dtype: Dtype,
    pub device: DeviceKind,
    pub offload: Offload,
}

/// What computes; sizes of working memory follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Gpu,
}

/// Units, layout, slots, programs and their replay.
#[derive(Debug, Clone)]
pub struct Plan {
    pub arch: Architecture,
    pub units: Vec<Unit>,
    pub layouts: Vec<UnitLayout>,
    pub slots: SlotMap,
    /// See [`PlanInput`]. Rank r has shard `r % num_shards` of replica `r / num_shards`.
    pub num_shards: usize,
    pub num_replicas: usize,
    pub compute_dtype: Dtype,
    pub device: DeviceKind,
    pub offload: Offload,
    /// The copy of a rank's state from which a checkpoint is written behind the steps, in the host's memory; 0 without.
    pub checkpoint_copy_bytes: u64,
    pub training: Vec<Step>,
    pub forward_only: Vec<Step>,
    pub replay: Replay,
}

impl Plan {
    /// `dtypes` gives (param dtype, reduce dtype) of a parameter by its name.
    ///
    /// # Panics
    /// If `no_shard` comes with more than one rank to shard over, or another strategy with replicas.
    pub fn new(arch: Architecture, input: &PlanInput, dtypes: impl Fn(&str) -> (Dtype, Dtype)) -> Self {
        assert!(input.strategy != Strategy::NoShard || input.num_shards == 1);
        assert!(input.num_replicas == 1 || input.strategy.has_replicas());
        let units = units(&arch);
        let layouts: Vec<_> = units.iter().map(|u| UnitLayout::new(u, input.num_shards, &dtypes)).collect();
        let tied = arch.tie_word_embeddings;
        let slots = SlotMap::new(
            &layouts,
            input.strategy.num_resident(input.resident_units, arch.num_layers),
            input.prefetch,
            tied,
        );
        let program = ProgramInput {
            num_units: units.len(),
            tied,
            slots: &slots,
            prefetch: input.prefetch,
            recompute: input.recompute,
            accumulation: input.accumulation,
            has_replicas: input.num_replicas > 1,
        };
        let (training, forward_only) = (training(&program), forward_only(&program));
        let mut plan = Plan {
            arch,
            units,
            layouts,
            slots,
            num_shards: input.num_shards,
            num_replicas: input.num_replicas,
            compute_dtype: input.compute_dtype,
            device: input.device,
            offload: input.offload,
            checkpoint_copy_bytes: 0,
            training,
            forward_only,
            replay: Replay::default(),
        };
        let batch = Batch { micro_batch_size: input.micro_batch_size, seq_len: input.seq_len };
        plan.replay = replay(&plan, &plan.training, batch);
        plan
    }

    pub fn world_size(&self) -> usize {
        self.num_shards * self.num_replicas
    }

    pub fn num_params(&self) -> usize {
        self.units.iter().map(Unit::num_params).sum()
    }

    /// The units with their buffers, and the training step's list of steps, which names units by number.
    pub fn steps_text(&self) -> String {
        let mut text = format!("{:>4}  {:<14}{:>14}{:>6}{:>17}\n", "unit", "", "parameters", "slot", "gradient buffer");
        for (id, unit) in self.units.iter().enumerate() {
            let (slot, grad) = (self.slots.slot_of_unit[id], self.slots.grad_of_unit[id]);
            text += &format!("{id:>4}  {:<14}{:>14}{slot:>6}{grad:>17}\n", unit.name, unit.num_params());
        }
        text.push('\n');
        for (i, step) in self.training.iter().enumerate() {
            text += &format!("{i:>4}  {step}\n");
        }
        text
    }
}

/// Bytes for people: at most four digits and a binary unit.
pub fn format_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            let digits = if unit == "B" || value >= 100.0 { 0 } else { 1 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.2} TiB")
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.replay.peak;
        writeln!(f, "parameters        {:>12}  in {} units", self.num_params(), self.units.len())?;
        match self.num_replicas {
            1 => writeln!(f, "ranks             {:>12}", self.num_shards)?,
            replicas => {
                let (world_size, num_shards) = (self.world_size(), self.num_shards);
                writeln!(f, "ranks             {world_size:>12}  in {replicas} replicas of {num_shards} shards")?;
            }
        }
        writeln!(f)?;
        writeln!(f, "memory of one rank at the peak (step {} of {})", self.replay.peak_step, self.training.len())?;
        for (name, bytes) in [
            ("master weights", m.master),
            ("optimizer state", m.optimizer),
            ("offload buffers", m.offload_buffers),
            ("gradient shards", m.grad_shards),
            ("slots", m.slots),
            ("gradient buffers", m.grad_buffers),
            ("activations", m.activations),
            ("head", m.head),
            ("total", m.total_bytes()),
        ] {
            if bytes > 0 || name != "offload buffers" {
                writeln!(f, "  {name:<16}{:>12}", format_bytes(bytes))?;
            }
        }
        if m.offloaded > 0 {
            writeln!(f, "  offloaded       {:>12}  in the host's memory", format_bytes(m.offloaded))?;
        }
        if self.checkpoint_copy_bytes > 0 {
            let bytes = format_bytes(self.checkpoint_copy_bytes);
            writeln!(f, "  checkpoint copy {bytes:>12}  in the host's memory besides, from the first checkpoint on")?;
        }
        writeln!(f)?;
        writeln!(f, "one training step of one rank")?;
        writeln!(f, "  all-gathers     {:>12}", self.replay.num_all_gathers)?;
        writeln!(f, "  received        {:>12}  in all-gathers", format_bytes(self.replay.all_gather_bytes))?;
        writeln!(f, "  received        {:>12}  in reduce-scatters", format_bytes(self.replay.reduce_scatter_bytes))?;
        if self.num_replicas > 1 {
            let bytes = format_bytes(self.replay.all_reduce_bytes);
            writeln!(f, "  received        {bytes:>12}  in all-reduces between replicas")?;
        }
        writeln!(
            f,
            "  operations      {:>12.4e}  of which {:.4e} recomputing",
            self.replay.flops, self.replay.recompute_flops
        )
    }
}
