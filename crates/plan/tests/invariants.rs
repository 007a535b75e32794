//! Whatever the job, a program never computes on parameters that are not there, never overwrites what is still needed,
//! and moves no more than it must. Each program is executed on a model of the slots and gradient buffers that knows
//! the rules and nothing of how programs are made.

mod common;

use std::collections::HashSet;

use common::small_llama;
use fsdp_plan::{DeviceKind, Dtype, Keep, Offload, Plan, PlanInput, Step, Strategy, UnitId};
use proptest::prelude::*;

const STRATEGIES: [Strategy; 4] =
    [Strategy::FullShard, Strategy::ShardGradOp, Strategy::HybridShard, Strategy::NoShard];

#[derive(Debug, Clone, Copy)]
struct Case {
    strategy: Strategy,
    resident_units: usize,
    num_blocks: usize,
    prefetch: usize,
    accumulation: usize,
    tied: bool,
    recompute: bool,
}

impl Case {
    /// Also one, where the strategy allows for more.
    fn num_replicas(&self) -> usize {
        if self.strategy.has_replicas() { 1 + self.accumulation % 2 } else { 1 }
    }

    fn plan(&self) -> Plan {
        let input = PlanInput {
            num_shards: if self.strategy == Strategy::NoShard { 1 } else { 2 },
            num_replicas: self.num_replicas(),
            strategy: self.strategy,
            resident_units: self.resident_units,
            prefetch: self.prefetch,
            recompute: self.recompute,
            accumulation: self.accumulation,
            micro_batch_size: 1,
            seq_len: 4,
            compute_dtype: Dtype::Fp32,
            device: DeviceKind::Cpu,
            offload: Offload::None,
        };
        Plan::new(small_llama(self.num_blocks, self.tied), &input, |_| (Dtype::Fp32, Dtype::Fp32))
    }

    fn head(&self) -> UnitId {
        self.num_blocks + 1
    }

    /// Units whose parameters a computation reads, and whose gradients it writes.
    fn touches(&self, step: Step) -> (Vec<UnitId>, Vec<UnitId>) {
        let end = |head: UnitId| if self.tied { vec![head, 0] } else { vec![head] };
        match step {
            Step::Forward { unit, .. } if unit == self.head() => (end(unit), vec![]),
            Step::Forward { unit, .. } => (vec![unit], vec![]),
            Step::Loss { unit, .. } => (end(unit), end(unit)),
            Step::Backward { unit: 0, .. } => (vec![], vec![0]),
            Step::Backward { unit, .. } => (vec![unit], vec![unit]),
            _ => (vec![], vec![]),
        }
    }

    /// The computations of a training step in order.
    fn computations(&self) -> Vec<Step> {
        let head = self.head();
        let keep = |unit| match unit {
            0 => Keep::Input,
            _ if unit == head - 1 || !self.recompute => Keep::Activations,
            _ => Keep::Input,
        };
        (0..self.accumulation)
            .flat_map(|microbatch| {
                let forward = (0..head).map(move |unit| Step::Forward { unit, microbatch, keep: keep(unit) });
                let backward = (0..head).rev().map(move |unit| Step::Backward { unit, microbatch });
                forward.chain([Step::Loss { unit: head, microbatch }]).chain(backward)
            })
            .collect()
    }

    fn num_resident(&self) -> usize {
        match self.strategy {
            Strategy::FullShard | Strategy::HybridShard => self.num_blocks.min(self.resident_units),
            Strategy::ShardGradOp | Strategy::NoShard => self.num_blocks,
        }
    }

    /// Blocks that may hold parameters at once.
    fn max_live_blocks(&self) -> usize {
        let num_resident = self.num_resident();
        num_resident + (self.num_blocks - num_resident).min(1 + self.prefetch)
    }

    /// Resident blocks come once. Of the others as many as there are slots stay at each of the 2m - 1 turns (loss, and
    /// from one microbatch to the next). Untied ends share a slot, so each comes once a microbatch; tied ones have a slot
    /// each and come once.
    fn num_all_gathers(&self) -> usize {
        let (m, resident) = (self.accumulation, self.num_resident());
        let slots = self.max_live_blocks() - resident;
        let ends = if self.tied { 2 } else { 2 * m };
        resident + 2 * m * (self.num_blocks - resident) - (2 * m - 1) * slots + ends
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Slot {
    Free,
    /// With the number of computations before the start.
    Gathering(UnitId, usize),
    Ready(UnitId),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum GradBuffer {
    Free,
    Written(UnitId),
    Reducing(UnitId, usize),
}

/// The rules of slots and gradient buffers.
struct Machine<'a> {
    case: Case,
    plan: &'a Plan,
    slots: Vec<Slot>,
    grad_buffers: Vec<GradBuffer>,
    num_reduced: Vec<usize>,
    all_reducing: HashSet<UnitId>,
    all_reduced: HashSet<UnitId>,
    computed: Vec<Step>,
    num_all_gathers: usize,
}

impl<'a> Machine<'a> {
    fn new(case: Case, plan: &'a Plan) -> Self {
        Machine {
            case,
            plan,
            slots: vec![Slot::Free; plan.slots.slot_bytes.len()],
            grad_buffers: vec![GradBuffer::Free; plan.slots.grad_bytes.len()],
            num_reduced: vec![0; plan.units.len()],
            all_reducing: HashSet::new(),
            all_reduced: HashSet::new(),
            computed: vec![],
            num_all_gathers: 0,
        }
    }

    fn execute(&mut self, step: Step) {
        let now = self.computed.len();
        match step {
            Step::StartUnshard(u) => {
                let slot = &mut self.slots[self.plan.slots.slot_of_unit[u]];
                assert_eq!(*slot, Slot::Free, "{step}: the slot has a tenant");
                *slot = Slot::Gathering(u, now);
                self.num_all_gathers += 1;
                assert!(self.num_live_blocks() <= self.case.max_live_blocks(), "{step}: too many live blocks");
            }
            Step::WaitUnshard(u) => {
                let slot = &mut self.slots[self.plan.slots.slot_of_unit[u]];
                let Slot::Gathering(unit, started) = *slot else { panic!("{step}: {slot:?}") };
                assert_eq!(unit, u);
                // Nothing can hide the very first gather.
                assert!(self.case.prefetch == 0 || now == 0 || started < now, "{step}: overlaps nothing");
                assert!(now - started <= self.case.prefetch, "{step}: started too early");
                *slot = Slot::Ready(u);
            }
            Step::Release(u) => {
                let slot = &mut self.slots[self.plan.slots.slot_of_unit[u]];
                assert_eq!(*slot, Slot::Ready(u), "{step}");
                *slot = Slot::Free;
            }
            Step::Forward { .. } | Step::Loss { .. } | Step::Backward { .. } => {
                let (reads, writes) = self.case.touches(step);
                for u in reads {
                    assert_eq!(self.slots[self.plan.slots.slot_of_unit[u]], Slot::Ready(u), "{step}");
                }
                for u in writes {
                    let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[u]];
                    assert_eq!(*buffer, GradBuffer::Free, "{step}: the gradient buffer is still read");
                    *buffer = GradBuffer::Written(u);
                }
                self.computed.push(step);
            }
            Step::StartReduce(u) => {
                let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[u]];
                assert_eq!(*buffer, GradBuffer::Written(u), "{step}");
                *buffer = GradBuffer::Reducing(u, now);
            }
            Step::WaitReduce { unit, accumulate } => {
                let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]];
                let GradBuffer::Reducing(u, started) = *buffer else { panic!("{step}: {buffer:?}") };
                assert_eq!(u, unit);
                // Behind the last computation there is nothing left to overlap.
                let last = now == self.case.computations().len();
                assert!(last || started < now, "{step}: overlaps nothing");
                assert_eq!(accumulate, self.num_reduced[unit] > 0, "{step}");
                self.num_reduced[unit] += 1;
                *buffer = GradBuffer::Free;
            }
            Step::StartAllReduce(u) => {
                assert!(self.case.num_replicas() > 1, "{step}");
                assert_eq!(self.num_reduced[u], self.num_reductions(u), "{step}: the sum is not complete");
                assert!(self.all_reducing.insert(u), "{step}: twice");
            }
            Step::WaitAllReduce(u) => {
                assert!(self.all_reducing.remove(&u), "{step}: not started");
                assert!(self.all_reduced.insert(u), "{step}: twice");
            }
            Step::CountTokens => assert_eq!(now, 0),
            Step::ClipGrads | Step::OptimizerStep => self.assert_at_rest(step),
        }
    }

    fn num_live_blocks(&self) -> usize {
        self.slots[..self.plan.slots.num_block_slots].iter().filter(|s| **s != Slot::Free).count()
    }

    /// Once a microbatch; a tied embedding twice, for the head and for itself.
    fn num_reductions(&self, unit: UnitId) -> usize {
        self.case.accumulation * if unit == 0 && self.case.tied { 2 } else { 1 }
    }

    /// Nothing is gathered or under way, every gradient is complete.
    fn assert_at_rest(&self, step: Step) {
        assert!(self.slots.iter().all(|s| *s == Slot::Free), "{step}: {:?}", self.slots);
        assert!(self.grad_buffers.iter().all(|b| *b == GradBuffer::Free), "{step}: {:?}", self.grad_buffers);
        for unit in 0..self.plan.units.len() {
            assert_eq!(self.num_reduced[unit], self.num_reductions(unit), "{step}: reductions of {unit}");
        }
        let replicated = if self.case.num_replicas() > 1 { self.plan.units.len() } else { 0 };
        assert_eq!(self.all_reduced.len(), replicated, "{step}");
    }
}

fn check(case: Case) {
    let plan = case.plan();
    let mut machine = Machine::new(case, &plan);
    for &step in &plan.training {
        machine.execute(step);
    }
    assert_eq!(plan.training.first(), Some(&Step::CountTokens));
    assert!(plan.training.ends_with(&[Step::ClipGrads, Step::OptimizerStep]));
    let once = |wanted| plan.training.iter().filter(|s| **s == wanted).count() == 1;
    assert!([Step::CountTokens, Step::ClipGrads, Step::OptimizerStep].into_iter().all(once));
    assert_eq!(machine.computed, case.computations());
    assert_eq!(machine.num_all_gathers, case.num_all_gathers());
    // The replay agrees with the rules.
    assert_eq!(plan.replay.num_all_gathers, case.num_all_gathers());
    assert_eq!(plan.replay.max_live_block_slots, case.max_live_blocks());

    let mut machine = Machine::new(case, &plan);
    for &step in &plan.forward_only {
        machine.execute(step);
    }
    let forward = (0..=case.head()).map(|unit| Step::Forward { unit, microbatch: 0, keep: Keep::Nothing });
    assert_eq!(machine.computed, forward.collect::<Vec<_>>());
    assert_eq!(machine.num_all_gathers, plan.units.len());
    assert!(machine.slots.iter().all(|s| *s == Slot::Free));
}

#[test]
fn every_small_job_keeps_the_rules() {
    for strategy in STRATEGIES {
        for num_blocks in 1..=9 {
            for prefetch in 0..=4 {
                for accumulation in 1..=3 {
                    for (tied, recompute) in [(false, false), (false, true), (true, false), (true, true)] {
                        for resident_units in [0, 1, 2, 5, 20] {
                            check(Case {
                                strategy,
                                resident_units,
                                num_blocks,
                                prefetch,
                                accumulation,
                                tied,
                                recompute,
                            });
                        }
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_job_keeps_the_rules(
        strategy in prop::sample::select(&STRATEGIES[..]),
        resident_units in 0..100usize,
        num_blocks in 1..100usize,
        prefetch in 0..=64usize,
        accumulation in 1..=8usize,
        tied: bool,
        recompute: bool,
    ) {
        check(Case { strategy, resident_units, num_blocks, prefetch, accumulation, tied, recompute });
    }
}
