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

/// A unit's stay in its slot, by indices into the uses.
struct Tenancy {
    unit: UnitId,
    /// Gathering may start before this use's computation: the slot is free, and not more than `prefetch` uses ahead.
    start: usize,
    first_use: usize,
    last_use: usize,
}

fn tenancies(input: &ProgramInput<'_>, uses: &[Use]) -> Vec<Tenancy> {
    let mut all: Vec<Tenancy> = Vec::new();
    let mut current: Vec<Option<usize>> = vec![None; input.slots.slot_bytes.len()];
    for (i, one) in uses.iter().enumerate() {
        for &unit in &one.reads {
            let slot = input.slots.slot_of_unit[unit];
            match current[slot] {
                Some(t) if all[t].unit == unit => all[t].last_use = i,
                previous => {
                    let free_from = previous.map_or(0, |t| all[t].last_use + 1);
                    let start = free_from.max(i.saturating_sub(input.prefetch));
                    current[slot] = Some(all.len());
                    all.push(Tenancy { unit, start, first_use: i, last_use: i });
                }
            }
        }
    }
    all
}

/// Puts gathers, releases and reductions around the computations.
fn place_collectives(input: &ProgramInput<'_>, uses: &[Use]) -> Vec<Step> {
    let tenancies = tenancies(input, uses);
    let mut steps = Vec::new();
    // Reductions under way, oldest first, and the units whose shards hold a sum already.
    let mut reducing: Vec<UnitId> = Vec::new();
    let mut reduced = vec![false; input.num_units];
    let mut wait = |steps: &mut Vec<Step>, unit: UnitId| {
        steps.push(Step::WaitReduce { unit, accumulate: reduced[unit] });
        reduced[unit] = true;
    };
    for (i, one) in uses.iter().enumerate() {
        for &unit in &one.grads {
            // The gradient buffer must be free before backward writes into it.
            let buffer = input.slots.grad_of_unit[unit];
            if let Some(k) = reducing.iter().position(|&u| input.slots.grad_of_unit[u] == buffer) {
                wait(&mut steps, reducing.remove(k));
            }
        }
        steps.extend(tenancies.iter().filter(|t| t.start == i).map(|t| Step::StartUnshard(t.unit)));
        steps.extend(tenancies.iter().filter(|t| t.first_use == i).map(|t| Step::WaitUnshard(t.unit)));
        steps.push(one.step);
        steps.extend(tenancies.iter().filter(|t| t.last_use == i).map(|t| Step::Release(t.unit)));
        for &unit in &one.grads {
            steps.push(Step::StartReduce(unit));
            reducing.push(unit);
        }
    }
    for unit in reducing {
        wait(&mut steps, unit);
    }
    if input.has_replicas && uses.iter().any(|u| !u.grads.is_empty()) {
        steps.extend((0..input.num_units).rev().map(Step::StartAllReduce));
        steps.extend((0..input.num_units).rev().map(Step::WaitAllReduce));
    }
    steps
}
