//! The collectives of a program: gathering units into slots, reducing their gradients, summing those over replicas.

use fsdp_comm::ReduceOp;
use fsdp_plan::UnitId;

use crate::timeline::Lane;
use crate::{Engine, EngineError};

impl Engine {
    /// Never blocks: while some rank still reads the slot, the write is put off.
    pub(crate) fn start_unshard(&mut self, unit: UnitId) -> Result<(), EngineError> {
        self.deferred.push(unit);
        self.retry_deferred()
    }

    pub(crate) fn retry_deferred(&mut self) -> Result<(), EngineError> {
        // In order of their starts, so that gathers keep the program's order among themselves on every rank.
        while let Some(&unit) = self.deferred.first() {
            let slot = &mut self.slots[self.plan.slots.slot_of_unit[unit]];
            if !self.groups.shards().try_begin_write(slot)? {
                break;
            }
            self.deferred.remove(0);
            self.write_and_start_all_gather(unit)?;
        }
        Ok(())
    }

    pub(crate) fn wait_unshard(&mut self, unit: UnitId) -> Result<(), EngineError> {
        while self.deferred.contains(&unit) {
            let first = self.deferred[0];
            let slot = &mut self.slots[self.plan.slots.slot_of_unit[first]];
            self.groups.shards().begin_write(slot, &self.units[first].name)?;
            self.deferred.remove(0);
            self.write_and_start_all_gather(first)?;
        }
        self.groups.shards().wait_all_gather(&mut self.slots[self.plan.slots.slot_of_unit[unit]])?;
        self.close_span(Lane::Gather, unit)
    }

    /// Casts this rank's shard into its range of the slot, which all ranks have released, and starts the all-gather.
    fn write_and_start_all_gather(&mut self, unit: UnitId) -> Result<(), EngineError> {
        let pg = self.groups.shards();
        let on_lane = pg.enter_gather_stream()?;
        let state = &mut self.units[unit];
        if let Some(timeline) = &mut self.timeline {
            timeline.open(Lane::Gather, &state.name)?;
        }
        state.write_and_start_all_gather(pg, &mut self.slots[self.plan.slots.slot_of_unit[unit]])?;
        // Without a lane of its own the collective is done when it was waited for.
        if on_lane.is_some() { self.close_span(Lane::Gather, unit) } else { Ok(()) }
    }

    pub(crate) fn start_reduce(&mut self, unit: UnitId) -> Result<(), EngineError> {
        let state = &self.units[unit];
        if let Some(timeline) = &mut self.timeline {
            timeline.open(Lane::Reduce, &state.name)?;
        }
        let pg = self.groups.shards();
        state.start_reduce(pg, &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]])?;
        let on_lane = self.groups.shards().enter_gather_stream()?;
        if on_lane.is_some() { self.close_span(Lane::Reduce, unit) } else { Ok(()) }
    }

    pub(crate) fn wait_reduce(&mut self, unit: UnitId, accumulate: bool) -> Result<(), EngineError> {
        let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]];
        self.units[unit].wait_reduce(self.groups.shards(), buffer, accumulate)?;
        self.close_span(Lane::Reduce, unit)
    }

    pub(crate) fn start_all_reduce(&mut self, unit: UnitId) -> Result<(), EngineError> {
        if let Some(timeline) = &mut self.timeline {
            timeline.open(Lane::Reduce, &self.units[unit].name)?;
        }
        let replicas = self.groups.replicas().expect("only programs with replicas sum over them");
        self.replica_sums[unit] = Some(replicas.start_all_reduce(&self.units[unit].grad_shards, ReduceOp::Sum)?);
        let on_lane = replicas.enter_gather_stream()?;
        if on_lane.is_some() { self.close_span(Lane::Reduce, unit) } else { Ok(()) }
    }

    pub(crate) fn wait_all_reduce(&mut self, unit: UnitId) -> Result<(), EngineError> {
        let work = self.replica_sums[unit].take().expect("a sum is started before it is waited for");
        let replicas = self.groups.replicas().expect("only programs with replicas sum over them");
        replicas.wait(work)?;
        self.close_span(Lane::Reduce, unit)
    }

    /// The collective of `unit` is done.
    fn close_span(&mut self, lane: Lane, unit: UnitId) -> Result<(), EngineError> {
        match &mut self.timeline {
            Some(timeline) => Ok(timeline.close(lane, &self.units[unit].name)?),
            None => Ok(()),
        }
    }
}
