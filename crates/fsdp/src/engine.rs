//! One rank's engine: executes a step program on tensors.

use std::time::{Duration, Instant};

use fsdp_comm::{GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp};
use fsdp_model::{Activations, BatchShape, Block, Embedding, Head, RopeTables, kind};
use fsdp_plan::{Dtype, Keep, Plan, Step, UnitId, UnitKind};
use tch::Tensor;

use crate::non_finite::is_finite;
use crate::optimizer::Optimizer;
use crate::state::Piece;
use crate::unit::UnitState;
use crate::{AdamWConfig, EngineError, LossScaler};

/// Settings of the engine that the plan does not hold.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    pub seq_len: usize,
    pub micro_batch_size: usize,
    /// Dtype to which rotary tables are rounded.
    pub buffer_dtype: Dtype,
    pub adamw: AdamWConfig,
    /// Gradients are scaled down to this global norm; `None` leaves them as they are.
    pub max_grad_norm: Option<f64>,
}

/// One microbatch of this rank: `micro_batch_size` sequences of `seq_len` tokens, flattened.
#[derive(Debug)]
pub struct MicroBatch {
    pub ids: Tensor,     // i64 [N]
    pub targets: Tensor, // i64 [N], -100 for ignored
    pub num_valid_tokens: u64,
}

impl MicroBatch {
    /// From token ids and targets, -100 for ignored.
    pub fn new(ids: &[i64], targets: &[i64], num_valid_tokens: u64) -> Self {
        MicroBatch { ids: Tensor::from_slice(ids), targets: Tensor::from_slice(targets), num_valid_tokens }
    }
}

/// What one training step tells.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    /// Mean cross-entropy over the valid tokens of all ranks and microbatches, before the update.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Valid tokens of all ranks and microbatches.
    pub num_tokens: u64,
    /// fp16 only: gradients overflowed, the loss scale was halved and nothing updated.
    pub skipped: bool,
    /// Some rank asked to stop after this step.
    pub stop: bool,
    /// Time in which this rank waited for, or executed, collectives.
    pub comm_time: Duration,
}

/// One rank's part of the model, its optimizer, and what a step needs.
#[derive(Debug)]
pub struct Engine {
    pub(crate) plan: Plan,
    pub(crate) config: EngineConfig,
    pub(crate) pg: ProcessGroup,
    pub(crate) units: Vec<UnitState>,
    pub(crate) slots: Vec<GatherBuffer>,
    pub(crate) grad_buffers: Vec<ReduceBuffer>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) optimizer: Optimizer,
    blocks: Vec<Block>,
    head: Head,
    rope: RopeTables,
    pub(crate) scaler: Option<LossScaler>,
    /// Units whose all-gather was asked for while a rank still read the slot; done at the latest when waited for.
    deferred: Vec<UnitId>,
}

/// What a block's forward left for its backward.
#[derive(Debug)]
enum Kept {
    Input(Tensor),
    Activations(Activations),
}

/// Values that travel through one pass over the program.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    batches: &'a [MicroBatch],
    /// Output of the last forward, or gradient for the next backward: `[N, D]`.
    flow: Option<Tensor>,
    kept: Vec<Option<Kept>>,
    pub(crate) loss_sum: f64,
    /// Factor of the loss whose gradient is computed.
    grad_of_loss: f64,
    pub(crate) num_tokens: u64,
    pub(crate) comm_time: Duration,
    head: HeadMode<'a>,
    /// Looks for the first unit whose output is not finite.
    find_non_finite: bool,
    first_non_finite: Option<UnitId>,
}

/// What the head does in a forward-only pass.
#[derive(Debug)]
enum HeadMode<'a> {
    /// Adds to the loss.
    Loss,
    /// The most likely next token after each of these rows.
    NextTokens { rows: &'a Tensor, tokens: Option<Tensor> },
}

impl<'a> Pass<'a> {
    fn new(batches: &'a [MicroBatch], num_units: usize, head: HeadMode<'a>) -> Self {
        Pass {
            batches,
            flow: None,
            kept: (0..num_units).map(|_| None).collect(),
            loss_sum: 0.0,
            grad_of_loss: 0.0,
            num_tokens: 0,
            comm_time: Duration::ZERO,
            head,
            find_non_finite: false,
            first_non_finite: None,
        }
    }

    fn take_flow(&mut self) -> Tensor {
        self.flow.take().expect("a program starts with the embedding and passes on every output")
    }
}

impl Engine {
    /// Allocates everything that lives as long as the job. Collective: all ranks call it with the same plan.
    pub fn new(plan: Plan, config: EngineConfig, mut pg: ProcessGroup) -> Result<Self, EngineError> {
        let (rank, world_size) = (pg.rank(), pg.world_size());
        assert_eq!(world_size, plan.world_size);

        let mut numel = 0;
        let mut shard_starts: Vec<Vec<usize>> = Vec::new();
        let mut pieces = Vec::new();
        for (unit, layout) in plan.layouts.iter().enumerate() {
            let mut starts = Vec::new();
            for group in &layout.groups {
                let shard = group.shard(rank, world_size);
                for p in &group.params {
                    if let Some(piece) = p.in_shard(&shard) {
                        pieces.push(Piece {
                            unit,
                            name: p.name.clone(),
                            shape: p.shape.clone(),
                            init: plan.units[unit].params[p.index].init,
                            start: piece.in_param,
                            flat: numel + piece.in_shard..numel + piece.in_shard + piece.len,
                        });
                    }
                }
                starts.push(numel);
                numel += shard.len();
            }
            shard_starts.push(starts);
        }
        let optimizer = Optimizer::new(config.adamw, &plan.layouts, &shard_starts, numel, (rank, world_size))?;

        let mut slots = Vec::new();
        for (i, &bytes) in plan.slots.slot_bytes.iter().enumerate() {
            slots.push(pg.new_gather_buffer(&format!("slot {i}"), bytes)?);
        }
        let mut grad_buffers = Vec::new();
        for (i, &bytes) in plan.slots.grad_bytes.iter().enumerate() {
            grad_buffers.push(pg.new_reduce_buffer(&format!("gradient buffer {i}"), bytes)?);
        }
        let mut units = Vec::new();
        for (id, (unit, layout)) in plan.units.iter().zip(&plan.layouts).enumerate() {
            let shards: Vec<_> = layout
                .groups
                .iter()
                .zip(&shard_starts[id])
                .map(|(group, &start)| start..start + group.shard_numel(world_size))
                .collect();
            units.push(UnitState::new(
                &unit.name,
                layout,
                &slots[plan.slots.slot_of_unit[id]],
                &grad_buffers[plan.slots.grad_of_unit[id]],
                (&optimizer.master, &optimizer.grad_shards),
                &shards,
                rank,
            )?);
        }

        let arch = &plan.arch;
        let blocks = (0..arch.num_layers).map(|i| Block::new(arch, i, config.seq_len)).collect();
        let head = Head::new(arch.vocab_size, arch.rms_norm_eps);
        let rope = RopeTables::new(arch, config.seq_len, config.buffer_dtype)?;
        let scaler = (plan.compute_dtype == Dtype::Fp16).then(LossScaler::default);
        Ok(Engine {
            plan,
            config,
            pg,
            units,
            slots,
            grad_buffers,
            pieces,
            optimizer,
            blocks,
            head,
            rope,
            scaler,
            deferred: vec![],
        })
    }

    /// One optimizer step over this rank's microbatches, which must be as many as the plan's accumulation. Collective.
    /// `stop` is this rank's wish to stop after the step; the report has the wish of any rank.
    pub fn train_step(&mut self, batches: &[MicroBatch], lr: f64, stop: bool) -> Result<StepReport, EngineError> {
        let accumulation = self.plan.training.iter().filter(|step| matches!(step, Step::Loss { .. })).count();
        assert_eq!(batches.len(), accumulation, "microbatches of a step");
        let mut pass = Pass::new(batches, self.units.len(), HeadMode::Loss);
        let mut report =
            StepReport { loss: 0.0, grad_norm: 0.0, num_tokens: 0, skipped: false, stop, comm_time: Duration::ZERO };
        for i in 0..self.plan.training.len() {
            match self.plan.training[i] {
                Step::CountTokens => {
                    (pass.num_tokens, report.stop) = self.count_tokens(&mut pass, stop)?;
                    pass.grad_of_loss = self.loss_scale() / pass.num_tokens as f64;
                }
                Step::ClipGrads => (report.loss, report.grad_norm) = self.loss_and_grad_norm(&mut pass)?,
                Step::OptimizerStep => report.skipped = !self.optimizer_step(&report, batches, lr)?,
                step => self.execute(step, &mut pass)?,
            }
        }
        report.num_tokens = pass.num_tokens;
        report.comm_time = pass.comm_time;
        Ok(report)
    }

    /// Loss summed over the valid tokens of all ranks, and their number; no gradients. Collective.
    pub fn evaluate(&mut self, batch: &MicroBatch) -> Result<(f64, u64), EngineError> {
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), HeadMode::Loss);
        self.forward_only(&mut pass)?;
        let sums = Tensor::from_slice(&[pass.loss_sum, batch.num_valid_tokens as f64]);
        self.pg.all_reduce(&sums, ReduceOp::Sum)?;
        Ok((sums.f_double_value(&[0])?, sums.f_double_value(&[1])? as u64))
    }

    /// The most likely next token after each of `rows` (i64, indices into the flattened microbatch). Collective.
    pub fn next_tokens(&mut self, batch: &MicroBatch, rows: &Tensor) -> Result<Tensor, EngineError> {
        let head = HeadMode::NextTokens { rows, tokens: None };
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), head);
        self.forward_only(&mut pass)?;
        match pass.head {
            HeadMode::NextTokens { tokens: Some(tokens), .. } => Ok(tokens),
            _ => unreachable!("the forward-only program ends with the head"),
        }
    }

    /// The first unit whose output is not finite on this rank. Collective.
    pub(crate) fn first_non_finite_output(&mut self, batch: &MicroBatch) -> Result<Option<UnitId>, EngineError> {
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), HeadMode::Loss);
        pass.find_non_finite = true;
        self.forward_only(&mut pass)?;
        let head_overflowed = !pass.loss_sum.is_finite();
        Ok(pass.first_non_finite.or(head_overflowed.then_some(self.units.len() - 1)))
    }

    fn forward_only(&mut self, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        for i in 0..self.plan.forward_only.len() {
            self.execute(self.plan.forward_only[i], pass)?;
        }
        Ok(())
    }

    /// One step of a program, except those of the whole batch.
    fn execute(&mut self, step: Step, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        match step {
            Step::StartUnshard(u) => self.start_unshard(u)?,
            Step::WaitUnshard(u) => pass.comm_time += timed(|| self.wait_unshard(u))?,
            Step::Forward { unit, microbatch, keep } => self.forward(unit, microbatch, keep, pass)?,
            Step::Loss { unit, microbatch } => self.loss(unit, microbatch, pass)?,
            Step::Backward { unit, microbatch } => self.backward(unit, microbatch, pass)?,
            Step::Release(u) => {
                self.pg.release(&mut self.slots[self.plan.slots.slot_of_unit[u]])?;
                self.retry_deferred()?;
            }
            Step::StartReduce(u) => {
                let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[u]];
                self.units[u].start_reduce(&mut self.pg, buffer)?;
                self.retry_deferred()?;
            }
            Step::WaitReduce { unit, accumulate } => {
                let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]];
                let state = &self.units[unit];
                pass.comm_time += timed(|| Ok(state.wait_reduce(&mut self.pg, buffer, accumulate)?))?;
            }
            Step::CountTokens | Step::ClipGrads | Step::OptimizerStep => {
                unreachable!("{step} belongs to train_step")
            }
            Step::StartAllReduce(_) | Step::WaitAllReduce(_) => {
                unreachable!("strategies with replicas are refused by the config")
            }
        }
        Ok(())
    }

    /// Never blocks: while some rank still reads the slot, the write is put off.
    fn start_unshard(&mut self, unit: UnitId) -> Result<(), EngineError> {
        self.deferred.push(unit);
        self.retry_deferred()
    }

    fn retry_deferred(&mut self) -> Result<(), EngineError> {
        // In order of their starts, so that gathers keep the program's order among themselves on every rank.
        while let Some(&unit) = self.deferred.first() {
            let slot = &mut self.slots[self.plan.slots.slot_of_unit[unit]];
            if !self.pg.try_begin_write(slot)? {
                break;
            }
            self.deferred.remove(0);
            self.units[unit].write_and_start_all_gather(&mut self.pg, slot)?;
        }
        Ok(())
    }

    fn wait_unshard(&mut self, unit: UnitId) -> Result<(), EngineError> {
        while self.deferred.contains(&unit) {
            let first = self.deferred[0];
            let slot = &mut self.slots[self.plan.slots.slot_of_unit[first]];
            self.pg.begin_write(slot, &self.units[first].name)?;
            self.deferred.remove(0);
            self.units[first].write_and_start_all_gather(&mut self.pg, slot)?;
        }
        Ok(self.pg.wait_all_gather(&mut self.slots[self.plan.slots.slot_of_unit[unit]])?)
    }

    fn forward(&mut self, unit: UnitId, microbatch: usize, keep: Keep, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let batch = &pass.batches[microbatch];
        let params = &self.units[unit].params;
        let y = match self.plan.units[unit].kind {
            UnitKind::Embedding => Embedding::forward(&params[0], &batch.ids, kind(self.plan.compute_dtype))?,
            UnitKind::Block(layer) => {
                let x = pass.take_flow();
                let input = x.shallow_clone();
                let (y, activations) = self.blocks[layer].forward(params, x, &self.rope, self.batch_shape())?;
                pass.kept[unit] = match keep {
                    Keep::Nothing => None,
                    Keep::Input => Some(Kept::Input(input)),
                    Keep::Activations => Some(Kept::Activations(activations)),
                };
                y
            }
            UnitKind::Head => {
                let x = pass.take_flow();
                let (norm, weight) = (&params[0], self.head_weight(unit));
                match &mut pass.head {
                    HeadMode::Loss => pass.loss_sum += self.head.loss(norm, weight, &x, &batch.targets)?,
                    HeadMode::NextTokens { rows, tokens } => {
                        *tokens = Some(self.head.argmax(norm, weight, &x, rows)?);
                    }
                }
                return Ok(());
            }
        };
        if pass.find_non_finite && pass.first_non_finite.is_none() && !is_finite(&y)? {
            pass.first_non_finite = Some(unit);
        }
        pass.flow = Some(y);
        Ok(())
    }

    fn loss(&mut self, unit: UnitId, microbatch: usize, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let tied = self.plan.arch.tie_word_embeddings;
        pass.comm_time += timed(|| {
            self.begin_reduce(unit)?;
            if tied { self.begin_reduce(0) } else { Ok(()) }
        })?;
        let x = pass.take_flow();
        let head_grad = if tied { &self.units[0].grads[0] } else { &self.units[unit].grads[1] };
        let out = self.head.loss_and_backward(
            &self.units[unit].params[0],
            self.head_weight(unit),
            &self.units[unit].grads[0],
            head_grad,
            &x,
            &pass.batches[microbatch].targets,
            pass.grad_of_loss,
        )?;
        pass.loss_sum += out.loss_sum;
        pass.flow = Some(out.dx);
        Ok(())
    }

    fn backward(&mut self, unit: UnitId, microbatch: usize, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        pass.comm_time += timed(|| self.begin_reduce(unit))?;
        let dy = pass.take_flow();
        let state = &self.units[unit];
        match self.plan.units[unit].kind {
            UnitKind::Embedding => Embedding::backward(&state.grads[0], &pass.batches[microbatch].ids, &dy)?,
            UnitKind::Block(layer) => {
                let (block, shape) = (&self.blocks[layer], self.batch_shape());
                let activations = match pass.kept[unit].take().expect("forward came before backward") {
                    Kept::Activations(activations) => activations,
                    Kept::Input(x) => block.recompute(&state.params, x, &self.rope, shape)?,
                };
                pass.flow = Some(block.backward(&state.params, &state.grads, activations, dy, &self.rope, shape)?);
            }
            UnitKind::Head => unreachable!("the head's backward is the loss step"),
        }
        Ok(())
    }

    /// Waits until no rank reads the last contents of the unit's gradient buffer.
    fn begin_reduce(&mut self, unit: UnitId) -> Result<(), EngineError> {
        let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]];
        Ok(self.pg.begin_reduce(buffer, &self.units[unit].name)?)
    }

    /// The head's weight `[V, D]`: its own, or the embedding's.
    fn head_weight(&self, head: UnitId) -> &Tensor {
        if self.plan.arch.tie_word_embeddings { &self.units[0].params[0] } else { &self.units[head].params[1] }
    }

    fn batch_shape(&self) -> BatchShape {
        BatchShape { batch: self.config.micro_batch_size as i64, seq_len: self.config.seq_len as i64 }
    }

    /// Global number of valid tokens, and whether any rank wants to stop.
    fn count_tokens(&mut self, pass: &mut Pass<'_>, stop: bool) -> Result<(u64, bool), EngineError> {
        let tokens: u64 = pass.batches.iter().map(|b| b.num_valid_tokens).sum();
        let sums = Tensor::from_slice(&[tokens as i64, i64::from(stop)]);
        pass.comm_time += timed(|| Ok(self.pg.all_reduce(&sums, ReduceOp::Sum)?))?;
        let tokens = sums.f_int64_value(&[0])? as u64;
        if tokens == 0 {
            return Err(EngineError::NoValidToken);
        }
        Ok((tokens, sums.f_int64_value(&[1])? > 0))
    }
}

/// Runs `f` and returns the time it took.
pub(crate) fn timed(f: impl FnOnce() -> Result<(), EngineError>) -> Result<Duration, EngineError> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed())
}
