//! Where each parameter of a unit lies: flat groups, padded so that every rank owns an equal contiguous shard.
//!
//! ```text
//! group   | decayed parameters ........ | others (norms, biases) | padding |
//! ranks   | shard of rank 0 | shard of rank 1 | shard of rank 2 |  (world = 3)
//! ```
//!
//! Parameters of one param dtype and one reduce dtype form a group; each starts at a multiple of [`ALIGN`] elements.
//! Those with weight decay come first, so that a shard has at most two ranges for the optimizer.

use std::ops::Range;

use crate::{Dtype, Unit};

/// Parameters start, and shards end, at multiples of this many elements: 128 bytes of bf16, two cache lines.
pub const ALIGN: usize = 64;

/// Groups start at multiples of this in a unit's buffers.
const GROUP_ALIGN_BYTES: usize = 256;

/// A parameter's place in its group.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedParam {
    /// Index into `Unit::params`.
    pub index: usize,
    pub name: String,
    pub shape: Vec<usize>,
    /// First element in the group's flat buffer.
    pub offset: usize,
    pub numel: usize,
    pub has_weight_decay: bool,
}

impl PlacedParam {
    /// The part of this parameter that lies in `shard` (elements of the group): where it starts inside the parameter,
    /// where inside the shard, and its length; `None` if nothing does.
    pub fn in_shard(&self, shard: &Range<usize>) -> Option<ShardPiece> {
        let start = self.offset.max(shard.start);
        let end = (self.offset + self.numel).min(shard.end);
        (start < end).then(|| ShardPiece {
            in_param: start - self.offset,
            in_shard: start - shard.start,
            len: end - start,
        })
    }
}

/// A contiguous piece of one parameter inside one rank's shard; all in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardPiece {
    pub in_param: usize,
    pub in_shard: usize,
    pub len: usize,
}

/// Parameters of one unit that share a param dtype and a reduce dtype, as one flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub param_dtype: Dtype,
    pub reduce_dtype: Dtype,
    pub params: Vec<PlacedParam>,
    /// Elements with padding: a multiple of `world_size * ALIGN`.
    pub numel: usize,
    /// Elements below this belong to parameters with weight decay.
    pub decay_numel: usize,
    /// Where the group starts in the unit's slot and gradient buffer.
    pub slot_offset_bytes: usize,
    pub grad_offset_bytes: usize,
}

impl Group {
    pub fn shard_numel(&self, world_size: usize) -> usize {
        self.numel / world_size
    }

    /// The elements of the group that `rank` owns.
    pub fn shard(&self, rank: usize, world_size: usize) -> Range<usize> {
        let len = self.shard_numel(world_size);
        rank * len..(rank + 1) * len
    }

    /// How many elements at the start of the rank's shard have weight decay.
    pub fn shard_decay_numel(&self, rank: usize, world_size: usize) -> usize {
        let shard = self.shard(rank, world_size);
        self.decay_numel.clamp(shard.start, shard.end) - shard.start
    }
}

/// The groups of one unit and the bytes that its unsharded parameters and gradients take.
#[derive(Debug, Clone, PartialEq)]
pub struct UnitLayout {
    pub groups: Vec<Group>,
    pub slot_bytes: usize,
    pub grad_bytes: usize,
}

impl UnitLayout {
    /// Lays out `unit` for `world_size` ranks; `dtypes` gives (param dtype, reduce dtype) of a parameter by its name.
    pub fn new(unit: &Unit, world_size: usize, dtypes: impl Fn(&str) -> (Dtype, Dtype)) -> Self {
        assert!(world_size > 0);
        let mut keys: Vec<(Dtype, Dtype)> = Vec::new();
        for param in &unit.params {
            let key = dtypes(&param.name);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let (mut slot_bytes, mut grad_bytes) = (0, 0);
        let mut groups = Vec::new();
        for (param_dtype, reduce_dtype) in keys {
            let mut members: Vec<_> = unit
                .params
                .iter()
                .enumerate()
                .filter(|(_, p)| dtypes(&p.name) == (param_dtype, reduce_dtype))
                .collect();
            // Stable: inside both halves the order of use stays.
            members.sort_by_key(|(_, p)| !p.has_weight_decay());
            let (mut offset, mut decay_numel) = (0, 0);
            let mut params = Vec::new();
            for (index, param) in members {
                let numel = param.numel();
                params.push(PlacedParam {
                    index,
                    name: param.name.clone(),
                    shape: param.shape.clone(),
                    offset,
                    numel,
                    has_weight_decay: param.has_weight_decay(),
                });
                offset += numel.next_multiple_of(ALIGN);
                if param.has_weight_decay() {
                    decay_numel = offset;
                }
            }
            let numel = offset.next_multiple_of(world_size * ALIGN);
            groups.push(Group {
                param_dtype,
                reduce_dtype,
                params,
                numel,
                decay_numel,
                slot_offset_bytes: slot_bytes,
                grad_offset_bytes: grad_bytes,
            });
            slot_bytes += (numel * param_dtype.size_bytes()).next_multiple_of(GROUP_ALIGN_BYTES);
            grad_bytes += (numel * reduce_dtype.size_bytes()).next_multiple_of(GROUP_ALIGN_BYTES);
        }
        UnitLayout { groups, slot_bytes, grad_bytes }
    }
}
