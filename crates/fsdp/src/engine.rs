//! One rank's engine: executes a step program on tensors.
//!
//! The host walks the program and gives work to the device; it waits only where a collective of a host back end does, and
//! in [`Engine::finish_step`], and shortly for NCCL to take a collective. What a step decides (clip factor, whether to update, loss scale) stays on the device, so a
//! step may be started before the host has read what became of the last one.

use std::rc::Rc;
use std::time::{Duration, Instant};

use fsdp_comm::{GatherBuffer, ReduceBuffer, ReduceOp, Work};
use fsdp_model::{BatchShape, Block, Head, RopeTables, kind};
use fsdp_plan::{Dtype, Offload, Plan, Step, UnitId};
use fsdp_torch_ext::{Event, Stream, pinned};
use tch::{Device, Kind, Tensor};

use crate::non_finite::BadFlow;
use crate::optimizer::Optimizer;
use crate::pass::{HeadMode, Pass, to_device};
use crate::scaler::DeviceScaler;
use crate::state::{ParamShard, Piece};
use crate::timeline::{Lane, Span, Timeline};
use crate::unit::UnitState;
use crate::update::GradParts;
use crate::{AdamWConfig, EngineError, Groups, LossScaler, MicroBatch, NonFinite};

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
    /// A step whose loss or gradient is not finite is left out; else it is an error.
    pub skip_non_finite: bool,
}

impl EngineConfig {
    pub(crate) fn batch_shape(&self) -> BatchShape {
        BatchShape { batch: self.micro_batch_size as i64, seq_len: self.seq_len as i64 }
    }
}

/// How long a rank was busy with its last step, without waiting for others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Loading data and, on CPUs, computing. The host of a GPU cannot tell computing from waiting.
    pub busy: Duration,
    /// Loading data alone.
    pub data: Duration,
}

/// What one training step tells.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Mean cross-entropy over the valid tokens of all ranks and microbatches, before the update.
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Valid tokens of all ranks and microbatches.
    pub num_tokens: u64,
    /// fp16 only: gradients overflowed, the loss scale was halved and nothing updated.
    pub overflowed: bool,
    /// Something was not finite, and the step was left out.
    pub non_finite: Option<NonFinite>,
    /// Some rank asked to stop after this step.
    pub stop: bool,
    /// Time in which this rank's host waited for, or executed, collectives; on GPUs it only gives them to the device.
    pub comm_time: Duration,
    /// The most memory that a rank has had so far; the largest over ranks.
    pub peak_memory_bytes: u64,
    /// What each rank gave to [`Engine::start_step`].
    pub paces: Vec<Pace>,
}

/// A training step that the device works on; [`Engine::finish_step`] tells what became of it.
#[derive(Debug)]
#[must_use = "a started step ends in Engine::finish_step"]
pub struct StartedStep {
    batches: Vec<MicroBatch>,
    verdict: Tensor, // f64 [6 + 2 * ranks] in the host's memory, see `Engine::update`
    /// The verdict is there.
    done: Event,
    comm_time: Duration,
}

/// One rank's part of the model, its optimizer, and what a step needs.
#[derive(Debug)]
pub struct Engine {
    pub(crate) plan: Plan,
    pub(crate) config: EngineConfig,
    pub(crate) device: Device,
    pub(crate) groups: Groups,
    pub(crate) units: Vec<UnitState>,
    pub(crate) slots: Vec<GatherBuffer>,
    pub(crate) grad_buffers: Vec<ReduceBuffer>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) optimizer: Optimizer,
    pub(crate) grad_parts: GradParts,
    /// What is gathered where the master weights are offloaded; else empty.
    pub(crate) param_shards: Vec<ParamShard>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) head: Head,
    pub(crate) rope: RopeTables,
    pub(crate) scaler: Option<DeviceScaler>,
    /// 1 from a step on that was not finite: no later one changes anything until the host has seen it. f32 `[]`
    pub(crate) halted: Tensor,
    /// Units whose all-gather was asked for while a rank still read the slot; done at the latest when waited for.
    pub(crate) deferred: Vec<UnitId>,
    /// Sums of gradients between replicas that are under way, by unit.
    pub(crate) replica_sums: Vec<Option<Work>>,
    /// What is traced, while it is.
    pub(crate) timeline: Option<Timeline>,
}

impl Engine {
    /// Allocates everything that lives as long as the job. Collective: all ranks call it with the same plan.
    pub fn new(plan: Plan, config: EngineConfig, mut groups: Groups) -> Result<Self, EngineError> {
        assert_eq!(groups.world().world_size(), plan.world_size());
        let device = groups.world().device();
        let pg = groups.shards();
        let (rank, num_shards) = (pg.rank(), pg.world_size());
        assert_eq!(num_shards, plan.num_shards);

        let mut numel = 0;
        let mut shard_starts: Vec<Vec<usize>> = Vec::new();
        let mut pieces = Vec::new();
        for (unit, layout) in plan.layouts.iter().enumerate() {
            let mut starts = Vec::new();
            for group in &layout.groups {
                let shard = group.shard(rank, num_shards);
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
        let place = (rank, num_shards);
        let optimizer = Optimizer::new(config.adamw, &plan.layouts, &shard_starts, numel, place, device, plan.offload)?;

        let mut slots = Vec::new();
        for (i, &bytes) in plan.slots.slot_bytes.iter().enumerate() {
            slots.push(pg.new_gather_buffer(&format!("slot {i}"), bytes)?);
        }
        let mut grad_buffers = Vec::new();
        for (i, &bytes) in plan.slots.grad_bytes.iter().enumerate() {
            grad_buffers.push(pg.new_reduce_buffer(&format!("gradient buffer {i}"), bytes)?);
        }
        let mut units = Vec::new();
        let mut param_shards = Vec::new();
        for (id, (unit, layout)) in plan.units.iter().zip(&plan.layouts).enumerate() {
            let shards: Vec<_> = layout
                .groups
                .iter()
                .zip(&shard_starts[id])
                .map(|(group, &start)| start..start + group.shard_numel(num_shards))
                .collect();
            let mut masters = Vec::new();
            for (group, shard) in layout.groups.iter().zip(&shards) {
                let (start, len) = (shard.start as i64, shard.len() as i64);
                masters.push(match plan.offload {
                    Offload::None | Offload::Optimizer => optimizer.master.f_narrow(0, start, len)?,
                    Offload::Master => {
                        let tensor = Tensor::f_zeros([len], (kind(group.param_dtype), device))?;
                        param_shards.push(ParamShard { flat: shard.clone(), tensor: tensor.shallow_clone() });
                        tensor
                    }
                });
            }
            units.push(UnitState::new(
                &unit.name,
                layout,
                &slots[plan.slots.slot_of_unit[id]],
                &grad_buffers[plan.slots.grad_of_unit[id]],
                (masters, &optimizer.grad_shards),
                &shards,
                rank,
            )?);
        }

        groups.warm_up()?;
        let grad_parts = GradParts::new(&pieces, &optimizer.grad_shards)?;
        let arch = &plan.arch;
        let blocks = (0..arch.num_layers).map(|i| Block::new(arch, i, config.seq_len)).collect();
        let head = Head::new(arch.vocab_size, arch.rms_norm_eps, device);
        let rope = RopeTables::new(arch, config.seq_len, config.buffer_dtype, device)?;
        let scaler = match plan.compute_dtype {
            Dtype::Fp16 => Some(DeviceScaler::new(LossScaler::default(), device)?),
            Dtype::Fp32 | Dtype::Bf16 => None,
        };
        Ok(Engine {
            replica_sums: (0..units.len()).map(|_| None).collect(),
            plan,
            config,
            device,
            groups,
            units,
            slots,
            grad_buffers,
            pieces,
            optimizer,
            grad_parts,
            param_shards,
            blocks,
            head,
            rope,
            scaler,
            halted: Tensor::f_zeros([1i64; 0], (Kind::Float, device))?,
            deferred: vec![],
            timeline: None,
        })
    }

    /// One optimizer step over this rank's microbatches, which must be as many as the plan's accumulation. Collective.
    /// `stop` is this rank's wish to stop after the step; the report has the wish of any rank, and the `pace` of all.
    pub fn start_step(
        &mut self,
        batches: Vec<MicroBatch>,
        lr: f64,
        stop: bool,
        pace: Pace,
    ) -> Result<StartedStep, EngineError> {
        let mut pass = Pass::new(&batches, self.units.len(), HeadMode::Loss, self.device)?;
        let num_stops = self.backward_pass(&mut pass, stop)?;
        let start = self.mark()?;
        let verdict = self.update(&mut pass, &num_stops, pace, lr)?;
        if let (Some(timeline), Some(start)) = (&mut self.timeline, start) {
            timeline.span(Lane::Compute, "clip gradients, optimizer step".to_string(), start)?;
        }
        let comm_time = pass.comm_time;
        let mut done = Event::new(self.device)?;
        done.record(&Stream::current(self.device)?)?;
        Ok(StartedStep { batches, verdict, done, comm_time })
    }

    /// Waits for the step's end. Steps are finished in the order of their starts.
    ///
    /// # Errors
    /// The step had no valid token, or something was not finite and is not to be left out: it has changed nothing. Neither
    /// has any later one, except where such steps are to be left out: who asks for that finishes each step before the next.
    pub fn finish_step(&mut self, step: StartedStep) -> Result<StepReport, EngineError> {
        step.done.synchronize()?;
        self.groups.check()?;
        let verdict = Vec::<f64>::try_from(&step.verdict)?;
        let &[loss, grad_norm, num_tokens, num_stops, is_fatal, peak_memory_bytes, ref paces @ ..] = verdict.as_slice()
        else {
            unreachable!("a verdict starts with six numbers");
        };
        let is_finite = loss.is_finite() && grad_norm.is_finite();
        let overflowed = !is_finite && is_fatal == 0.0;
        let mut non_finite = None;
        if !is_finite && !overflowed {
            let _ = self.halted.f_zero_()?;
            if num_tokens == 0.0 {
                return Err(EngineError::NoValidToken);
            }
            let place = self.find_non_finite(&step.batches)?;
            // Weights that are not finite stay so in every later step.
            if !self.config.skip_non_finite || matches!(place, NonFinite::Weight { .. }) {
                return Err(EngineError::NonFinite(place));
            }
            non_finite = Some(place);
        }
        let micros = |micros: f64| Duration::from_micros(micros as u64);
        Ok(StepReport {
            loss,
            grad_norm,
            num_tokens: num_tokens as u64,
            overflowed,
            non_finite,
            stop: num_stops > 0.0,
            comm_time: step.comm_time,
            peak_memory_bytes: peak_memory_bytes as u64,
            paces: paces.chunks_exact(2).map(|p| Pace { busy: micros(p[0]), data: micros(p[1]) }).collect(),
        })
    }

    /// The program up to where all gradients are reduced; returns how many ranks want to stop, f64 `[]`.
    pub(crate) fn backward_pass(&mut self, pass: &mut Pass<'_>, stop: bool) -> Result<Tensor, EngineError> {
        let accumulation = self.plan.training.iter().filter(|step| matches!(step, Step::Loss { .. })).count();
        assert_eq!(pass.batches.len(), accumulation, "microbatches of a step");
        let mut num_stops = None;
        for i in 0..self.plan.training.len() {
            match self.plan.training[i] {
                Step::CountTokens => num_stops = Some(self.count_tokens(pass, stop)?),
                // By `update`, in this order.
                Step::ClipGrads | Step::OptimizerStep => {}
                step => self.execute(step, pass)?,
            }
        }
        Ok(num_stops.expect("a training program counts tokens"))
    }

    /// Loss summed over the valid tokens of all ranks, and their number; no gradients. Collective. Waits for the device.
    pub fn evaluate(&mut self, batch: &MicroBatch) -> Result<(f64, u64), EngineError> {
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), HeadMode::Loss, self.device)?;
        self.forward_only(&mut pass)?;
        let tokens = Tensor::f_full_like(&pass.loss_sum, batch.num_valid_tokens as f64)?;
        let sums = Tensor::f_stack(&[&pass.loss_sum, &tokens], 0)?;
        self.groups.world().all_reduce(&sums, ReduceOp::Sum)?;
        let sums = Vec::<f64>::try_from(sums)?;
        self.groups.check()?;
        Ok((sums[0], sums[1] as u64))
    }

    /// The most likely next token after each of `rows` (i64, indices into the flattened microbatch). Collective.
    pub fn next_tokens(&mut self, batch: &MicroBatch, rows: &[i64]) -> Result<Vec<i64>, EngineError> {
        let rows = to_device(rows, self.device)?;
        let head = HeadMode::NextTokens { rows: &rows, tokens: None };
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), head, self.device)?;
        self.forward_only(&mut pass)?;
        match pass.head {
            HeadMode::NextTokens { tokens: Some(tokens), .. } => Ok(Vec::try_from(tokens)?),
            _ => unreachable!("the forward-only program ends with the head"),
        }
    }

    /// The first unit whose output is not finite on this rank. Collective.
    pub(crate) fn first_non_finite_output(&mut self, batch: &MicroBatch) -> Result<Option<BadFlow>, EngineError> {
        let mut pass = Pass::new(std::slice::from_ref(batch), self.units.len(), HeadMode::Loss, self.device)?;
        pass.find_non_finite = true;
        self.forward_only(&mut pass)?;
        Ok(pass.first_non_finite)
    }

    fn forward_only(&mut self, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        for i in 0..self.plan.forward_only.len() {
            self.execute(self.plan.forward_only[i], pass)?;
        }
        Ok(())
    }

    /// One step of a program, except those of the whole batch.
    fn execute(&mut self, step: Step, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let start = self.mark()?;
        match step {
            Step::StartUnshard(u) => self.start_unshard(u)?,
            Step::WaitUnshard(u) => {
                pass.comm_time += timed(|| self.wait_unshard(u))?;
                self.span(Lane::Wait, "wait for all-gather", u, start)?;
            }
            Step::Forward { unit, microbatch, keep } => {
                self.forward(unit, microbatch, keep, pass)?;
                self.span(Lane::Compute, "forward", unit, start)?;
            }
            Step::Loss { unit, microbatch } => {
                self.loss(unit, microbatch, pass)?;
                self.span(Lane::Compute, "loss", unit, start)?;
            }
            Step::Backward { unit, microbatch } => {
                self.backward(unit, microbatch, pass)?;
                self.span(Lane::Compute, "backward", unit, start)?;
            }
            Step::Release(u) => {
                self.groups.shards().release(&mut self.slots[self.plan.slots.slot_of_unit[u]])?;
                self.retry_deferred()?;
            }
            Step::StartReduce(u) => {
                self.start_reduce(u)?;
                self.retry_deferred()?;
            }
            Step::WaitReduce { unit, accumulate } => {
                pass.comm_time += timed(|| self.wait_reduce(unit, accumulate))?;
                self.span(Lane::Wait, "wait for reduce-scatter", unit, start)?;
            }
            Step::StartAllReduce(u) => self.start_all_reduce(u)?,
            Step::WaitAllReduce(u) => {
                pass.comm_time += timed(|| self.wait_all_reduce(u))?;
                self.span(Lane::Wait, "wait for all-reduce", u, start)?;
            }
            Step::CountTokens | Step::ClipGrads | Step::OptimizerStep => {
                unreachable!("{step} is of the whole batch")
            }
        }
        Ok(())
    }

    /// Counts the valid tokens of all ranks, and the ranks that want to stop: f64 `[]`.
    fn count_tokens(&mut self, pass: &mut Pass<'_>, stop: bool) -> Result<Tensor, EngineError> {
        let tokens: u64 = pass.batches.iter().map(|b| b.num_valid_tokens).sum();
        let sums = to_device(&[tokens as i64, i64::from(stop)], self.device)?;
        pass.comm_time += timed(|| Ok(self.groups.world().all_reduce(&sums, ReduceOp::Sum)?))?;
        let sums = sums.f_to_kind(Kind::Double)?;
        pass.num_tokens = sums.f_get(0)?;
        pass.grad_of_loss = self.loss_scale()?.f_div(&pass.num_tokens)?;
        Ok(sums.f_get(1)?)
    }

    /// What the loss is multiplied by before backward: f64 `[]`.
    pub(crate) fn loss_scale(&self) -> Result<Tensor, EngineError> {
        Ok(match &self.scaler {
            Some(scaler) => scaler.scale.f_to_kind(Kind::Double)?,
            None => Tensor::f_ones([1i64; 0], (Kind::Double, self.device))?,
        })
    }

    /// `values` (f64 `[n]`) for the host: there once an event recorded now is done.
    pub(crate) fn to_host(values: &Tensor) -> Result<Tensor, EngineError> {
        let mut host = pinned::empty(&values.size(), Kind::Double)?;
        pinned::copy_non_blocking(&mut host, values)?;
        Ok(host)
    }

    /// From now on spans are recorded.
    pub fn start_timeline(&mut self) -> Result<(), EngineError> {
        self.timeline = Some(Timeline::start(self.device)?);
        Ok(())
    }

    /// What was recorded since [`Engine::start_timeline`], with which recording ends. Waits for the device.
    pub fn take_timeline(&mut self) -> Result<Vec<Span>, EngineError> {
        Ok(self.timeline.take().map_or(Ok(vec![]), Timeline::finish)?)
    }

    /// This moment of the current stream, where it is traced.
    pub(crate) fn mark(&self) -> Result<Option<Rc<Event>>, EngineError> {
        Ok(self.timeline.as_ref().map(Timeline::mark).transpose()?)
    }

    /// What `unit` did since `start`, where it is traced.
    pub(crate) fn span(
        &mut self,
        lane: Lane,
        what: &str,
        unit: UnitId,
        start: Option<Rc<Event>>,
    ) -> Result<(), EngineError> {
        if let (Some(timeline), Some(start)) = (&mut self.timeline, start) {
            timeline.span(lane, format!("{what} {}", self.units[unit].name), start)?;
        }
        Ok(())
    }
}

/// Runs `f` and returns the time it took.
pub(crate) fn timed(f: impl FnOnce() -> Result<(), EngineError>) -> Result<Duration, EngineError> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed())
}
