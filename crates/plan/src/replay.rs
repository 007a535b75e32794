//! Replays a program over byte counts: peak memory by category, bytes moved, operations.
//!
//! Static buffers (master, optimizer, gradient shards, slots, gradient buffers) are what the engine allocates, to the
//! byte. Activations and the head's working memory follow the formulas below, which mirror the model's code.

use crate::program::{Keep, Step};
use crate::slots::is_block;
use crate::{Architecture, Dtype, Plan};

/// Bytes of one rank by category. Slots are mapped once per host where ranks share memory, but every rank counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub master: u64,
    pub optimizer: u64,
    pub grad_shards: u64,
    pub slots: u64,
    pub grad_buffers: u64,
    /// Kept inputs and activations, and the working memory of the block that is computed.
    pub activations: u64,
    /// The head's chunk of logits and its gradients.
    pub head: u64,
}

impl Memory {
    /// What is allocated once, at start.
    pub fn static_bytes(&self) -> u64 {
        self.master + self.optimizer + self.grad_shards + self.slots + self.grad_buffers
    }

    pub fn total_bytes(&self) -> u64 {
        self.static_bytes() + self.activations + self.head
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
    pub num_all_gathers: usize,
    /// Floating-point operations of matrix products and attention that are executed, and those of recomputing among them.
    pub flops: u64,
    pub recompute_flops: u64,
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

/// Logits are made for so many tokens at a time: about 4 Mi logits, at least 64 tokens.
pub fn head_chunk_tokens(vocab_size: usize) -> usize {
    ((4 << 20) / vocab_size).clamp(64, 4096)
}

/// Memory that is allocated once, at start: sums over the layout.
pub fn static_memory(plan: &Plan) -> Memory {
    let shard_elements: usize =
        plan.layouts.iter().flat_map(|l| &l.groups).map(|g| g.shard_numel(plan.world_size)).sum();
    let fp32_bytes = (shard_elements * Dtype::Fp32.size_bytes()) as u64;
    Memory {
        master: fp32_bytes,
        optimizer: 2 * fp32_bytes,
        grad_shards: fp32_bytes,
        slots: plan.slots.slot_bytes.iter().sum::<usize>() as u64,
        grad_buffers: plan.slots.grad_bytes.iter().sum::<usize>() as u64,
        ..Memory::default()
    }
}

pub fn replay(plan: &Plan, steps: &[Step], batch: Batch) -> Replay {
    let costs = BlockCosts::new(&plan.arch, plan.compute_dtype, batch);
    let static_memory = static_memory(plan);
    let num_units = plan.units.len();
    let mut out = Replay { peak: static_memory, ..Replay::default() };
    let mut kept: u64 = 0;
    // The gradient that travels from unit to unit in backward has the size of a unit's output.
    let mut flowing: u64 = 0;
    let mut kept_by: Vec<u64> = vec![0; num_units];
    let mut live = vec![false; num_units];
    for (i, step) in steps.iter().enumerate() {
        let mut now = static_memory;
        match *step {
            Step::StartUnshard(u) => {
                live[u] = true;
                let bytes = unit_bytes(plan, u, |g| g.param_dtype);
                out.all_gather_bytes += others(bytes, plan.world_size);
                out.num_all_gathers += 1;
            }
            Step::Release(u) => live[u] = false,
            Step::StartReduce(u) => {
                let bytes = unit_bytes(plan, u, |g| g.reduce_dtype);
                out.reduce_scatter_bytes += others(bytes, plan.world_size);
            }
            Step::Forward { unit, keep, .. } => {
                let block = is_block(unit, num_units).is_some();
                out.flops += if block { costs.forward_flops } else { 0 };
                let left = match keep {
                    Keep::Nothing => 0,
                    Keep::Input if block => costs.hidden_bytes,
                    Keep::Input => 0,
                    Keep::Activations => costs.activation_bytes,
                };
                // Input, output and what the unit works on stand beside what is kept.
                now.activations = kept + if block { costs.activation_bytes } else { 0 } + 2 * costs.hidden_bytes;
                kept += left;
                kept_by[unit] = left;
            }
            Step::Loss { .. } => {
                out.flops += 3 * costs.head_flops;
                now.activations = kept + 3 * costs.hidden_bytes;
                now.head = costs.head_bytes;
                flowing = costs.hidden_bytes;
            }
            Step::Backward { unit, .. } if is_block(unit, num_units).is_some() => {
                out.flops += 2 * costs.forward_flops;
                let mut alive = kept + flowing + costs.backward_bytes;
                if kept_by[unit] == costs.hidden_bytes {
                    alive += costs.activation_bytes;
                    out.flops += costs.recompute_flops;
                    out.recompute_flops += costs.recompute_flops;
                }
                now.activations = alive;
                kept -= kept_by[unit];
            }
            Step::Backward { .. } => {
                now.activations = kept + 2 * flowing;
                flowing = 0;
            }
            _ => now.activations = kept + flowing,
        }
        out.max_live_block_slots = out
            .max_live_block_slots
            .max((0..num_units).filter(|&u| live[u] && is_block(u, num_units).is_some()).count());
        if now.total_bytes() > out.peak.total_bytes() {
            out.peak = now;
            out.peak_step = i;
        }
    }
    out
}

/// Bytes of a unit's groups in the dtype that `of` picks.
fn unit_bytes(plan: &Plan, unit: usize, of: impl Fn(&crate::Group) -> Dtype) -> u64 {
    plan.layouts[unit].groups.iter().map(|g| (g.numel * of(g).size_bytes()) as u64).sum()
}

/// The part of `bytes` that the other ranks of `world_size` hold.
fn others(bytes: u64, world_size: usize) -> u64 {
    bytes / world_size as u64 * (world_size as u64 - 1)
}

/// Bytes and operations of one block, and of the head, for one microbatch.
struct BlockCosts {
    hidden_bytes: u64,
    /// All that backward reads of a block.
    activation_bytes: u64,
    /// Gradients of activations that are alive at once inside a block's backward.
    backward_bytes: u64,
    head_bytes: u64,
    forward_flops: u64,
    recompute_flops: u64,
    head_flops: u64,
}

impl BlockCosts {
    fn new(arch: &Architecture, compute: Dtype, batch: Batch) -> Self {
        let e = compute.size_bytes() as u64;
        let n = batch.num_tokens();
        let (d, f) = (arch.hidden_size as u64, arch.intermediate_size as u64);
        let q = (arch.num_heads * arch.head_dim) as u64;
        let kv = (arch.num_kv_heads * arch.head_dim) as u64;
        let hidden_bytes = n * d * e;
        // x, h1, r, h2; q, attention output; k, v; gate, up; and per token two norms' and each head's statistics.
        // Kept or not, s = silu(gate) * up is made again.
        let mut activation_bytes = n * e * (4 * d + 2 * q + 2 * kv + 2 * f) + 4 * n * (2 + arch.num_heads as u64);
        if arch.qk_norm {
            activation_bytes += n * e * (q + kv) + 4 * n * (arch.num_heads + arch.num_kv_heads) as u64;
        }
        let backward_bytes = n * e * (2 * d).max(2 * q) + n * e * (3 * f).max(2 * q + 2 * kv);
        let chunk = (head_chunk_tokens(arch.vocab_size) as u64).min(n);
        let v = arch.vocab_size as u64;
        let head_bytes = chunk * v * e + v * d * e;
        // Causal attention computes about half of the T x T products: two in forward.
        let attention = 2 * n * q * batch.seq_len as u64;
        let down = 2 * n * d * f;
        let forward_flops = 2 * n * (d * (2 * q + 2 * kv) + 2 * d * f) + down + attention;
        BlockCosts {
            hidden_bytes,
            activation_bytes,
            backward_bytes,
            head_bytes,
            forward_flops,
            // The product that only yields the block's output is not needed again.
            recompute_flops: forward_flops - down,
            head_flops: 2 * n * v * d,
        }
    }
}
