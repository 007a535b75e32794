//! The training step as a flat list of steps, made by a pure function from units and slots.
//!
//! First the *uses*: the computations of the step in order, each with the units whose parameters it reads. A slot's
//! consecutive uses by one unit form a *tenancy*: gathered once before its first use, released right after its last.
//! From that alone follows every strategy: with `1 + prefetch` slots a block is gathered for forward and again for
//! backward, except the last ones at the turn, which are still there; with a slot each, once a step.

use std::fmt;

use crate::slots::{SlotMap, is_block};

/// Index of a unit in forward order; 0 is the embedding, the last one the head.
pub type UnitId = usize;

/// What a forward pass leaves behind for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: there is no backward.
    Nothing,
    /// The unit's input; backward computes the rest again.
    Input,
    /// Everything that backward reads.
    Activations,
}

/// One entry of the program. Collectives come as start and wait; what stands between them may overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Global number of valid tokens over all ranks and microbatches.
    CountTokens,
    /// This rank's shard, cast to the param dtype, goes into the unit's slot.
    StartUnshard(UnitId),
    WaitUnshard(UnitId),
    Forward {
        unit: UnitId,
        microbatch: usize,
        keep: Keep,
    },
    /// The head's forward and backward in one pass over chunks of tokens: adds to the loss, yields the gradient.
    Loss {
        unit: UnitId,
        microbatch: usize,
    },
    Backward {
        unit: UnitId,
        microbatch: usize,
    },
    /// This rank no longer reads the unit's slot.
    Release(UnitId),
    /// The unit's gradient buffer goes into the reduce-scatter.
    StartReduce(UnitId),
    /// The sum over ranks of this rank's range is in its gradient shard: written there, or added.
    WaitReduce {
        unit: UnitId,
        accumulate: bool,
    },
    /// Gradient shards are summed across replicas.
    StartAllReduce(UnitId),
    WaitAllReduce(UnitId),
    /// Global norm, and the factor that the optimizer applies.
    ClipGrads,
    OptimizerStep,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Step::CountTokens => write!(f, "count tokens"),
            Step::StartUnshard(u) => write!(f, "start unshard {u}"),
            Step::WaitUnshard(u) => write!(f, "wait unshard {u}"),
            Step::Forward { unit, microbatch, keep } => {
                let kept = match keep {
                    Keep::Nothing => "nothing",
                    Keep::Input => "input",
                    Keep::Activations => "activations",
                };
                write!(f, "forward {unit} of {microbatch}, keep {kept}")
            }
            Step::Loss { unit, microbatch } => write!(f, "loss {unit} of {microbatch}"),
            Step::Backward { unit, microbatch } => write!(f, "backward {unit} of {microbatch}"),
            Step::Release(u) => write!(f, "release {u}"),
            Step::StartReduce(u) => write!(f, "start reduce {u}"),
            Step::WaitReduce { unit, accumulate: false } => write!(f, "wait reduce {unit}"),
            Step::WaitReduce { unit, accumulate: true } => write!(f, "wait reduce {unit}, add"),
            Step::StartAllReduce(u) => write!(f, "start all-reduce {u}"),
            Step::WaitAllReduce(u) => write!(f, "wait all-reduce {u}"),
            Step::ClipGrads => write!(f, "clip gradients"),
            Step::OptimizerStep => write!(f, "optimizer step"),
        }
    }
}

/// What a program depends on besides the slots.
#[derive(Debug, Clone, Copy)]
pub struct ProgramInput<'a> {
    pub num_units: usize,
    /// The head reads and differentiates the embedding's weight.
    pub tied: bool,
    pub slots: &'a SlotMap,
    pub prefetch: usize,
    /// Blocks keep only their input and compute forward again in backward.
    pub recompute: bool,
    pub accumulation: usize,
    /// Gradient shards are also summed across replicas.
    pub has_replicas: bool,
}

/// The program of one training step.
pub fn training(input: &ProgramInput<'_>) -> Vec<Step> {
    let mut steps = vec![Step::CountTokens];
    steps.extend(place_collectives(input, &training_uses(input)));
    steps.extend([Step::ClipGrads, Step::OptimizerStep]);
    steps
}

/// The program of a forward pass alone over one microbatch, for validation and generation.
pub fn forward_only(input: &ProgramInput<'_>) -> Vec<Step> {
    let uses: Vec<Use> = (0..input.num_units)
        .map(|unit| Use {
            step: Step::Forward { unit, microbatch: 0, keep: Keep::Nothing },
            reads: reads(input, unit),
            grads: vec![],
        })
        .collect();
    place_collectives(input, &uses)
}

/// One computation, the units whose parameters it reads, and those whose gradients it yields.
struct Use {
    step: Step,
    reads: Vec<UnitId>,
    grads: Vec<UnitId>,
}

/// Units whose parameters the computation of `unit` reads.
fn reads(input: &ProgramInput<'_>, unit: UnitId) -> Vec<UnitId> {
    if input.tied && unit + 1 == input.num_units { vec![unit, 0] } else { vec![unit] }
}

fn training_uses(input: &ProgramInput<'_>) -> Vec<Use> {
    let head = input.num_units - 1;
    let last_block = head - 1;
    let mut uses = Vec::new();
    for microbatch in 0..input.accumulation {
        for unit in 0..head {
            // The last block's backward follows at once: it runs once, with its activations kept.
            let recompute = input.recompute && unit != last_block;
            let keep = match is_block(unit, input.num_units) {
                Some(_) if !recompute => Keep::Activations,
                _ => Keep::Input,
            };
            uses.push(Use { step: Step::Forward { unit, microbatch, keep }, reads: vec![unit], grads: vec![] });
        }
        let both = reads(input, head);
        uses.push(Use { step: Step::Loss { unit: head, microbatch }, reads: both.clone(), grads: both });
        for unit in (0..head).rev() {
            // The embedding's backward reads no weights.
            let reads = if unit == 0 { vec![] } else { vec![unit] };
            uses.push(Use { step: Step::Backward { unit, microbatch }, reads, grads: vec![unit] });
        }
    }
    uses
}

/// The gathers and releases around one computation.
#[derive(Default)]
struct Unsharding {
    start_before: Vec<UnitId>,
    wait_before: Vec<UnitId>,
    release_after: Vec<UnitId>,
}

/// One entry for each use. A gather starts when the slot is free, but not more than `prefetch` uses ahead.
fn unsharding(input: &ProgramInput<'_>, uses: &[Use]) -> Vec<Unsharding> {
    let mut around: Vec<Unsharding> = uses.iter().map(|_| Unsharding::default()).collect();
    // Each slot's tenant, and the last use so far that reads it.
    let mut tenants: Vec<Option<(UnitId, usize)>> = vec![None; input.slots.slot_bytes.len()];
    for (i, one) in uses.iter().enumerate() {
        for &unit in &one.reads {
            let tenant = &mut tenants[input.slots.slot_of_unit[unit]];
            if tenant.is_none_or(|(old, _)| old != unit) {
                let mut free_from = 0;
                if let Some((old, last_use)) = *tenant {
                    around[last_use].release_after.push(old);
                    free_from = last_use + 1;
                }
                around[free_from.max(i.saturating_sub(input.prefetch))].start_before.push(unit);
                around[i].wait_before.push(unit);
            }
            *tenant = Some((unit, i));
        }
    }
    for (unit, last_use) in tenants.into_iter().flatten() {
        around[last_use].release_after.push(unit);
    }
    around
}

/// Puts gathers, releases and reductions around the computations.
fn place_collectives(input: &ProgramInput<'_>, uses: &[Use]) -> Vec<Step> {
    let mut reductions_left = vec![0; input.num_units];
    for &unit in uses.iter().flat_map(|u| &u.grads) {
        reductions_left[unit] += 1;
    }
    let mut has_sum = vec![false; input.num_units];
    let mut all_reducing: Vec<UnitId> = Vec::new();
    let mut wait_reduce = |steps: &mut Vec<Step>, unit: UnitId| {
        steps.push(Step::WaitReduce { unit, accumulate: has_sum[unit] });
        has_sum[unit] = true;
        reductions_left[unit] -= 1;
        if input.has_replicas && reductions_left[unit] == 0 {
            steps.push(Step::StartAllReduce(unit));
            all_reducing.push(unit);
        }
    };

    let mut steps = Vec::new();
    // Reductions under way, oldest first.
    let mut reducing: Vec<UnitId> = Vec::new();
    for (one, around) in uses.iter().zip(unsharding(input, uses)) {
        for &unit in &one.grads {
            // The gradient buffer must be free before backward writes into it.
            let buffer = input.slots.grad_of_unit[unit];
            if let Some(k) = reducing.iter().position(|&u| input.slots.grad_of_unit[u] == buffer) {
                wait_reduce(&mut steps, reducing.remove(k));
            }
        }
        steps.extend(around.start_before.into_iter().map(Step::StartUnshard));
        steps.extend(around.wait_before.into_iter().map(Step::WaitUnshard));
        steps.push(one.step);
        steps.extend(around.release_after.into_iter().map(Step::Release));
        steps.extend(one.grads.iter().map(|&unit| Step::StartReduce(unit)));
        reducing.extend(&one.grads);
    }
    for unit in reducing {
        wait_reduce(&mut steps, unit);
    }
    steps.extend(all_reducing.into_iter().map(Step::WaitAllReduce));
    steps
}
