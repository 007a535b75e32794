//! Which buffer holds a unit's unsharded parameters, and which its gradients: a static map, so few buffers are
//! allocated once and never freed.
//!
//! Two classes: *blocks* share a small number of slots in turn; *ends* (embedding, head) have their own, since a
//! vocabulary-sized unit must not size the blocks' slots. Untied, embedding and head never live at once and share one
//! end slot; tied, the embedding's weight stays from the embedding's forward to the head, so both have one.

use crate::{UnitId, UnitLayout};

/// How parameters are sharded; the slot map follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Parameters, gradients and optimizer state sharded; blocks that are not resident share `1 + prefetch` slots.
    FullShard,
    /// Parameters stay unsharded from forward to backward: a slot for each block.
    ShardGradOp,
    /// Shards inside a group of ranks, replicas across groups; gradients all-reduced across them.
    HybridShard,
    /// Every rank holds everything (DDP): hybrid with a shard size of 1.
    NoShard,
}

impl Strategy {
    /// Gradients are also all-reduced across replicas.
    pub fn has_replicas(self) -> bool {
        matches!(self, Strategy::HybridShard | Strategy::NoShard)
    }

    /// How many of `num_blocks` blocks have a slot of their own where `resident_units` are asked for.
    pub fn num_resident(self, resident_units: usize, num_blocks: usize) -> usize {
        match self {
            Strategy::FullShard | Strategy::HybridShard => resident_units.min(num_blocks),
            Strategy::ShardGradOp | Strategy::NoShard => num_blocks,
        }
    }
}

/// The number of gradient buffers for blocks: one is reduced while the next unit's backward fills the other.
const NUM_BLOCK_GRAD_BUFFERS: usize = 2;

/// Bytes of every slot and gradient buffer, and the one that each unit uses.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotMap {
    pub slot_bytes: Vec<usize>,
    pub slot_of_unit: Vec<usize>,
    pub grad_bytes: Vec<usize>,
    pub grad_of_unit: Vec<usize>,
    /// The first so many slots are the blocks'.
    pub num_block_slots: usize,
}

impl SlotMap {
    /// `layouts` in unit order: embedding, blocks, head. The first `num_resident` blocks have a slot each, the others
    /// share `1 + prefetch`: of those the last ones stay in their slots at the turn anyway.
    ///
    /// # Panics
    /// If there are not so many blocks.
    pub fn new(layouts: &[UnitLayout], num_resident: usize, prefetch: usize, tied: bool) -> Self {
        let num_blocks = layouts.len() - 2;
        let num_shared_slots = (num_blocks - num_resident).min(1 + prefetch);
        let num_block_slots = num_resident + num_shared_slots;
        let num_block_grads = num_blocks.min(NUM_BLOCK_GRAD_BUFFERS);
        let num_ends = if tied { 2 } else { 1 };
        let mut map = SlotMap {
            slot_bytes: vec![0; num_block_slots + num_ends],
            slot_of_unit: Vec::new(),
            grad_bytes: vec![0; num_block_grads + num_ends],
            grad_of_unit: Vec::new(),
            num_block_slots,
        };
        for (unit, layout) in layouts.iter().enumerate() {
            let end = if unit == 0 { 0 } else { num_ends - 1 };
            let (slot, grad) = match is_block(unit, layouts.len()) {
                Some(block) if block < num_resident => (block, block % num_block_grads),
                Some(block) => (num_resident + (block - num_resident) % num_shared_slots, block % num_block_grads),
                None => (num_block_slots + end, num_block_grads + end),
            };
            map.slot_bytes[slot] = map.slot_bytes[slot].max(layout.slot_bytes);
            map.grad_bytes[grad] = map.grad_bytes[grad].max(layout.grad_bytes);
            map.slot_of_unit.push(slot);
            map.grad_of_unit.push(grad);
        }
        map
    }
}

/// The block index of `unit` among `num_units`, `None` for embedding and head.
pub(crate) fn is_block(unit: UnitId, num_units: usize) -> Option<usize> {
    (unit > 0 && unit + 1 < num_units).then(|| unit - 1)
}
