//! One unit on one rank. Five kinds of tensors, named once:
//!
//! - *master*: this rank's fp32 shard of a group, what the optimizer updates; where it is in the host's memory, a copy in
//!   the param dtype stands for it here;
//! - *all-gather input*: the rank's own range of the slot, in the param dtype;
//! - *unsharded parameters*: views into the slot, shaped as the model wants them;
//! - *unsharded gradients*: views into the gradient buffer, in the reduce dtype;
//! - *gradient shard*: the fp32 sum over ranks of the rank's own range.

use std::ops::Range;

use fsdp_comm::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, Segment};
use fsdp_model::kind;
use fsdp_plan::{Dtype, Group, UnitLayout};
use tch::{TchError, Tensor};

use crate::EngineError;

/// Tensors of one unit. The slot map is static, so all views are made once.
#[derive(Debug)]
pub struct UnitState {
    pub name: String,
    /// Unsharded parameters, in the order of the unit's parameters.
    pub params: Vec<Tensor>,
    /// Unsharded gradients, in the same order.
    pub grads: Vec<Tensor>,
    groups: Vec<GroupState>,
    /// The gradient shards of all groups, fp32 `[shards]`.
    pub grad_shards: Tensor,
    gather_segments: Vec<Segment>,
    reduce_segments: Vec<Segment>,
}

#[derive(Debug)]
struct GroupState {
    master: Tensor,           // fp32, or param dtype [shard]
    grad_shard: Tensor,       // fp32 [shard]
    all_gather_input: Tensor, // param dtype [shard]
}

impl UnitState {
    /// `shards` gives each group's range in the flat fp32 tensor `grad_shards`, `masters` what each is gathered from.
    pub fn new(
        name: &str,
        layout: &UnitLayout,
        slot: &GatherBuffer,
        grad_buffer: &ReduceBuffer,
        (masters, grad_shards): (Vec<Tensor>, &Tensor),
        shards: &[Range<usize>],
        rank: usize,
    ) -> Result<Self, TchError> {
        let flat = |range: Range<usize>| grad_shards.f_narrow(0, range.start as i64, range.len() as i64);
        let all = shards.first().map_or(0, |s| s.start)..shards.last().map_or(0, |s| s.end);
        let num_params = layout.groups.iter().map(|g| g.params.len()).sum();
        let mut params: Vec<Option<Tensor>> = (0..num_params).map(|_| None).collect();
        let mut grads: Vec<Option<Tensor>> = (0..num_params).map(|_| None).collect();
        let mut groups = Vec::new();
        for ((group, shard), master) in layout.groups.iter().zip(shards).zip(masters) {
            let (param_size, reduce_size) = (group.param_dtype.size_bytes(), group.reduce_dtype.size_bytes());
            for p in &group.params {
                let shape: Vec<i64> = p.shape.iter().map(|&n| n as i64).collect();
                let at = group.slot_offset_bytes + p.offset * param_size;
                params[p.index] = Some(slot.view(kind(group.param_dtype), at, p.numel).f_view(shape.as_slice())?);
                let at = group.grad_offset_bytes + p.offset * reduce_size;
                grads[p.index] =
                    Some(grad_buffer.view(kind(group.reduce_dtype), at, p.numel).f_view(shape.as_slice())?);
            }
            let own_at = group.slot_offset_bytes + rank * shard.len() * param_size;
            groups.push(GroupState {
                master,
                grad_shard: flat(shard.clone())?,
                all_gather_input: slot.view(kind(group.param_dtype), own_at, shard.len()),
            });
        }
        let segments = |dtype: fn(&Group) -> Dtype, offset: fn(&Group) -> usize| -> Vec<Segment> {
            let one = |g| Segment { kind: kind(dtype(g)), offset_bytes: offset(g), numel: g.numel };
            layout.groups.iter().map(one).collect()
        };
        Ok(UnitState {
            name: name.to_string(),
            params: params.into_iter().map(|p| p.expect("a layout places every parameter")).collect(),
            grads: grads.into_iter().map(|g| g.expect("a layout places every parameter")).collect(),
            groups,
            grad_shards: flat(all)?,
            gather_segments: segments(|g| g.param_dtype, |g| g.slot_offset_bytes),
            reduce_segments: segments(|g| g.reduce_dtype, |g| g.grad_offset_bytes),
        })
    }

    /// Casts this rank's shard into its range of the slot and starts the all-gather.
    pub fn write_and_start_all_gather(
        &mut self,
        pg: &mut ProcessGroup,
        slot: &mut GatherBuffer,
    ) -> Result<(), EngineError> {
        for group in &mut self.groups {
            group.all_gather_input.f_copy_(&group.master)?;
        }
        Ok(pg.start_all_gather(slot, &self.gather_segments, &self.name)?)
    }

    pub fn start_reduce(&self, pg: &mut ProcessGroup, buffer: &mut ReduceBuffer) -> Result<(), CommError> {
        pg.start_reduce_scatter(buffer, &self.reduce_segments, &self.name)
    }

    /// The sum over ranks goes into the gradient shards, or is added to them.
    pub fn wait_reduce(
        &self,
        pg: &mut ProcessGroup,
        buffer: &mut ReduceBuffer,
        accumulate: bool,
    ) -> Result<(), CommError> {
        let shards: Vec<&Tensor> = self.groups.iter().map(|g| &g.grad_shard).collect();
        pg.wait_reduce_scatter(buffer, &shards, accumulate)
    }
}
