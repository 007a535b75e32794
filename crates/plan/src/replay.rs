//! Replays a program over byte counts: peak memory by category, bytes moved, operations.
//!
//! Static buffers (master, optimizer, gradient shards, slots, gradient buffers) are what the engine allocates, to the
//! byte. Activations and the head's working memory follow the formulas of [`crate::costs`].

use fsdp_config::Offload;

use crate::costs::{Moment, UnitCosts};
use crate::program::{Keep, Step};
use crate::slots::is_block;
use crate::{DeviceKind, Dtype, Group, Plan};

/// Bytes of one rank by category. Slots are mapped once per host where ranks share memory, but every rank counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub master: u64,
    pub optimizer: u64,
    /// What offloading keeps on the device: buffers through which the state passes, shards in the param dtype.
    pub offload_buffers: u64,
    pub grad_shards: u64,
    pub slots: u64,
    pub grad_buffers: u64,
    /// Kept inputs and activations, and the working memory of the unit that is computed.
    pub activations: u64,
    /// The head's chunk of logits and its gradients.
    pub head: u64,
    /// Master weights and optimizer state in the host's memory; in no sum of the device's.
    pub offloaded: u64,
}

impl Memory {
    /// What is allocated once, at start.
    pub fn static_bytes(&self) -> u64 {
        self.master + self.optimizer + self.offload_buffers + self.grad_shards + self.slots + self.grad_buffers
    }

    pub fn total_bytes(&self) -> u64 {
        self.static_bytes().saturating_add(self.activations).saturating_add(self.head)
    }
}

/// What one training step takes, for one rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Replay {
    /// At the step of the program where the sum is largest.
    pub peak: Memory,
    pub peak_step: usize,
    /// The most block slots that hold parameters at once.
    pub max_live_block_slots: usize,
    /// Bytes that the rank receives in all-gathers, and in reduce-scatters.
    pub all_gather_bytes: u64,
    pub reduce_scatter_bytes: u64,
    /// Bytes that it receives from other replicas when gradient shards are summed over them, by a ring.
    pub all_reduce_bytes: u64,
    pub num_all_gathers: usize,
    /// Floating-point operations of matrix products and attention, and those of recomputing among them.
    pub flops: f64,
    pub recompute_flops: f64,
}

/// Sizes of one microbatch on one rank.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    pub micro_batch_size: usize,
    pub seq_len: usize,
}

impl Batch {
    pub fn num_tokens(self) -> u64 {
        (self.micro_batch_size * self.seq_len) as u64
    }
}

/// Logits are made for so many tokens at a time: on CPUs about 4 Mi logits, which stay in the cache, on GPUs 256 Mi, by
/// which the products run at full rate.
pub fn head_chunk_tokens(vocab_size: usize, device: DeviceKind) -> usize {
    match device {
        DeviceKind::Cpu => ((4 << 20) / vocab_size).clamp(64, 4096),
        DeviceKind::Gpu => ((256 << 20) / vocab_size).clamp(64, 16384),
    }
}

/// Elements of each tensor of offloaded state that are on the device at a time; two such chunks are under way.
pub const OFFLOAD_CHUNK_NUMEL: usize = 16 << 20;

/// Memory that is allocated once, at start: sums over the layout.
pub fn static_memory(plan: &Plan) -> Memory {
    let fp32_bytes = fp32_shard_bytes(plan);
    let shard_elements = fp32_bytes as usize / Dtype::Fp32.size_bytes();
    let param_bytes: usize = plan
        .layouts
        .iter()
        .flat_map(|l| &l.groups)
        .map(|g| g.shard_numel(plan.num_shards) * g.param_dtype.size_bytes())
        .sum();
    let chunk_bytes = (shard_elements.min(OFFLOAD_CHUNK_NUMEL) * Dtype::Fp32.size_bytes()) as u64;
    let (master, optimizer, offload_buffers) = match plan.offload {
        Offload::None => (fp32_bytes, 2 * fp32_bytes, 0),
        Offload::Optimizer => (fp32_bytes, 0, 2 * 2 * chunk_bytes),
        Offload::Master => (0, 0, 2 * 3 * chunk_bytes + param_bytes as u64),
    };
    Memory {
        master,
        optimizer,
        offload_buffers,
        offloaded: (3 - (master + optimizer) / fp32_bytes.max(1)) * host_bytes(plan, fp32_bytes),
        grad_shards: fp32_bytes,
        slots: plan.slots.slot_bytes.iter().sum::<usize>() as u64,
        grad_buffers: plan.slots.grad_bytes.iter().sum::<usize>() as u64,
        ..Memory::default()
    }
}

/// A copy of a rank's master weights and moments in the host's memory.
pub fn checkpoint_copy_bytes(plan: &Plan) -> u64 {
    3 * host_bytes(plan, fp32_shard_bytes(plan))
}

/// One fp32 tensor as large as all shards of a rank.
fn fp32_shard_bytes(plan: &Plan) -> u64 {
    let groups = plan.layouts.iter().flat_map(|l| &l.groups);
    groups.map(|g| g.shard_numel(plan.num_shards) * Dtype::Fp32.size_bytes()).sum::<usize>() as u64
}

/// What a tensor takes in the host's memory: next to a GPU it is pinned, which comes in powers of two.
fn host_bytes(plan: &Plan, tensor_bytes: u64) -> u64 {
    if plan.device == DeviceKind::Gpu { tensor_bytes.next_power_of_two() } else { tensor_bytes }
}

/// Walks `steps`, a program of `plan`. Sizes too large for 64 bits count as the largest number.
pub fn replay(plan: &Plan, steps: &[Step], batch: Batch) -> Replay {
    let num_units = plan.units.len();
    let costs: Vec<_> = (0..num_units).map(|u| UnitCosts::new(plan, u, batch)).collect();
    let static_memory = static_memory(plan);
    let mut out = Replay { peak: static_memory, ..Replay::default() };
    let mut kept = vec![Keep::Nothing; num_units];
    let mut kept_per_token: u64 = 0;
    let mut num_live_blocks = 0;
    for (i, step) in steps.iter().enumerate() {
        // Only computations add to what is kept, so the peak is in one of them.
        let mut consider = |moments: &[Moment], kept_per_token: u64| {
            for m in moments {
                let activations = batch.num_tokens().saturating_mul(kept_per_token + m.per_token);
                let activations = activations.saturating_add(m.fixed);
                let now = Memory { activations, head: m.head, ..static_memory };
                if now.total_bytes() > out.peak.total_bytes() {
                    (out.peak, out.peak_step) = (now, i);
                }
            }
        };
        match *step {
            Step::StartUnshard(u) => {
                num_live_blocks += usize::from(is_block(u, num_units).is_some());
                out.max_live_block_slots = out.max_live_block_slots.max(num_live_blocks);
                out.all_gather_bytes += received_bytes(plan, u, |g| g.param_dtype);
                out.num_all_gathers += 1;
            }
            Step::Release(u) => num_live_blocks -= usize::from(is_block(u, num_units).is_some()),
            Step::StartReduce(u) => out.reduce_scatter_bytes += received_bytes(plan, u, |g| g.reduce_dtype),
            Step::Forward { unit, keep, .. } => {
                consider(&costs[unit].forward, kept_per_token);
                kept[unit] = keep;
                kept_per_token += costs[unit].kept_per_token(keep);
                out.flops += costs[unit].forward_flops;
            }
            Step::Loss { unit, .. } => {
                consider(&costs[unit].backward, kept_per_token);
                out.flops += costs[unit].forward_flops + costs[unit].backward_flops;
            }
            Step::Backward { unit, .. } => {
                // What this unit kept is part of its own moments.
                kept_per_token -= costs[unit].kept_per_token(kept[unit]);
                if kept[unit] == Keep::Input {
                    consider(&costs[unit].recompute, kept_per_token);
                    out.flops += costs[unit].recompute_flops;
                    out.recompute_flops += costs[unit].recompute_flops;
                }
                consider(&costs[unit].backward, kept_per_token);
                out.flops += costs[unit].backward_flops;
            }
            Step::StartAllReduce(u) => out.all_reduce_bytes += replica_bytes(plan, u),
            Step::CountTokens
            | Step::WaitUnshard(_)
            | Step::WaitReduce { .. }
            | Step::WaitAllReduce(_)
            | Step::ClipGrads
            | Step::OptimizerStep => {}
        }
    }
    out
}

/// Bytes of a unit's gradient shard that come from other replicas: twice all but one of their parts.
fn replica_bytes(plan: &Plan, unit: usize) -> u64 {
    let numel: usize = plan.layouts[unit].groups.iter().map(|g| g.shard_numel(plan.num_shards)).sum();
    (2 * numel * Dtype::Fp32.size_bytes() * (plan.num_replicas - 1) / plan.num_replicas) as u64
}

/// Bytes of a unit's groups, in the dtype that `of` picks, that come from other ranks.
fn received_bytes(plan: &Plan, unit: usize, of: impl Fn(&Group) -> Dtype) -> u64 {
    let bytes: usize = plan.layouts[unit].groups.iter().map(|g| g.numel * of(g).size_bytes()).sum();
    (bytes / plan.num_shards * (plan.num_shards - 1)) as u64
}
