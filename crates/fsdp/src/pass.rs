//! The computations of a program: forward and backward of each unit on its views.

use std::time::Duration;

use fsdp_model::{Activations, Embedding, kind};
use fsdp_plan::{Keep, Plan, UnitId, UnitKind};
use fsdp_torch_ext::pinned;
use tch::{Device, Kind, Tensor};

use crate::engine::timed;
use crate::non_finite::{BadFlow, is_finite};
use crate::timeline::Lane;
use crate::unit::UnitState;
use crate::{Engine, EngineError};

/// One microbatch of this rank: `micro_batch_size` sequences of `seq_len` tokens, flattened, on the device.
#[derive(Debug)]
pub struct MicroBatch {
    pub ids: Tensor,     // i64 [N]
    pub targets: Tensor, // i64 [N], -100 for ignored
    pub num_valid_tokens: u64,
}

impl MicroBatch {
    /// From token ids and targets, -100 for ignored. The host does not wait for the copy to the device.
    pub fn new(ids: &[i64], targets: &[i64], num_valid_tokens: u64, device: Device) -> Result<Self, EngineError> {
        Ok(MicroBatch { ids: to_device(ids, device)?, targets: to_device(targets, device)?, num_valid_tokens })
    }
}

/// `[n]` on the device, through pinned memory, which libtorch keeps until the copy is done.
pub(crate) fn to_device(values: &[i64], device: Device) -> Result<Tensor, EngineError> {
    let values = Tensor::from_slice(values);
    if device == Device::Cpu {
        return Ok(values);
    }
    let mut staged = pinned::empty(&values.size(), Kind::Int64)?;
    staged.f_copy_(&values)?;
    let mut there = Tensor::f_empty(values.size(), (Kind::Int64, device))?;
    pinned::copy_non_blocking(&mut there, &staged)?;
    Ok(there)
}

/// What a block's forward left for its backward.
#[derive(Debug)]
enum Kept {
    Input(Tensor),
    Activations(Activations),
}

/// Values that travel through one pass over the program. Scalars are f64 `[]` on the device.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    pub batches: &'a [MicroBatch],
    /// Output of the last forward, or gradient for the next backward: `[N, D]`.
    flow: Option<Tensor>,
    kept: Vec<Option<Kept>>,
    pub loss_sum: Tensor,
    /// Factor of the loss whose gradient is computed.
    pub grad_of_loss: Tensor,
    /// Valid tokens of all ranks and microbatches.
    pub num_tokens: Tensor,
    pub comm_time: Duration,
    pub head: HeadMode<'a>,
    /// Looks for the first unit whose output is not finite, or the gradient that its backward hands on.
    pub find_non_finite: bool,
    pub first_non_finite: Option<BadFlow>,
}

/// What the head does in a forward-only pass.
#[derive(Debug)]
pub(crate) enum HeadMode<'a> {
    /// Adds to the loss.
    Loss,
    /// The most likely next token after each of these rows.
    NextTokens { rows: &'a Tensor, tokens: Option<Tensor> },
}

impl<'a> Pass<'a> {
    pub fn new(
        batches: &'a [MicroBatch],
        num_units: usize,
        head: HeadMode<'a>,
        device: Device,
    ) -> Result<Self, EngineError> {
        let zero = || Tensor::f_zeros([1i64; 0], (Kind::Double, device));
        Ok(Pass {
            batches,
            flow: None,
            kept: (0..num_units).map(|_| None).collect(),
            loss_sum: zero()?,
            grad_of_loss: zero()?,
            num_tokens: zero()?,
            comm_time: Duration::ZERO,
            head,
            find_non_finite: false,
            first_non_finite: None,
        })
    }

    /// Makes `flow`, from `unit`, what the next unit takes.
    fn hand_on(&mut self, flow: Tensor, unit: UnitId, microbatch: usize, seq_len: usize) -> Result<(), EngineError> {
        if self.find_non_finite && self.first_non_finite.is_none() {
            self.first_non_finite = BadFlow::find(&flow, unit, microbatch, seq_len)?;
        }
        self.flow = Some(flow);
        Ok(())
    }

    fn take_flow(&mut self) -> Tensor {
        self.flow.take().expect("a program starts with the embedding and passes on every output")
    }
}

impl Engine {
    pub(crate) fn forward(
        &mut self,
        unit: UnitId,
        microbatch: usize,
        keep: Keep,
        pass: &mut Pass<'_>,
    ) -> Result<(), EngineError> {
        let batch = &pass.batches[microbatch];
        let params = &self.units[unit].params;
        let mut mark = |segment| self.timeline.iter_mut().for_each(|timeline| timeline.segment(segment));
        let y = match self.plan.units[unit].kind {
            UnitKind::Embedding => Embedding::forward(&params[0], &batch.ids, kind(self.plan.compute_dtype))?,
            UnitKind::Block(layer) => {
                let x = pass.take_flow();
                let input = x.shallow_clone();
                let (y, activations) =
                    self.blocks[layer].forward(params, x, &self.rope, self.config.batch_shape(), &mut mark)?;
                pass.kept[unit] = match keep {
                    Keep::Nothing => None,
                    Keep::Input => Some(Kept::Input(input)),
                    Keep::Activations => Some(Kept::Activations(activations)),
                };
                y
            }
            UnitKind::Head => {
                let x = pass.take_flow();
                let (norm, weight) = (&params[0], head_weight(&self.plan, &self.units, unit));
                match &mut pass.head {
                    HeadMode::Loss => {
                        let loss_sum = self.head.loss(norm, weight, &x, &batch.targets)?;
                        let _ = pass.loss_sum.f_add_(&loss_sum)?;
                        if pass.find_non_finite && pass.first_non_finite.is_none() && !is_finite(&loss_sum)? {
                            let len = self.config.seq_len as i64;
                            let mut sequences = 0;
                            for i in 0..batch.targets.size()[0] / len {
                                let part = |t: &Tensor| t.f_narrow(0, i * len, len);
                                let loss = self.head.loss(norm, weight, &part(&x)?, &part(&batch.targets)?)?;
                                sequences |= i64::from(i < 63 && !is_finite(&loss)?) << i.min(62);
                            }
                            pass.first_non_finite = Some(BadFlow { unit, microbatch, sequences });
                        }
                    }
                    HeadMode::NextTokens { rows, tokens } => {
                        *tokens = Some(self.head.argmax(norm, weight, &x, rows)?);
                    }
                }
                return Ok(());
            }
        };
        pass.hand_on(y, unit, microbatch, self.config.seq_len)
    }

    pub(crate) fn loss(&mut self, unit: UnitId, microbatch: usize, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let tied = self.plan.arch.tie_word_embeddings;
        self.begin_reduce(unit, pass)?;
        if tied {
            self.begin_reduce(0, pass)?;
        }
        let x = pass.take_flow();
        let head_grad = if tied { &self.units[0].grads[0] } else { &self.units[unit].grads[1] };
        let out = self.head.loss_and_backward(
            &self.units[unit].params[0],
            head_weight(&self.plan, &self.units, unit),
            &self.units[unit].grads[0],
            head_grad,
            &x,
            &pass.batches[microbatch].targets,
            &pass.grad_of_loss,
            &mut |segment| self.timeline.iter_mut().for_each(|timeline| timeline.segment(segment)),
        )?;
        let _ = pass.loss_sum.f_add_(&out.loss_sum)?;
        pass.hand_on(out.dx, unit, microbatch, self.config.seq_len)
    }

    pub(crate) fn backward(&mut self, unit: UnitId, microbatch: usize, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        self.begin_reduce(unit, pass)?;
        let dy = pass.take_flow();
        let state = &self.units[unit];
        let mut mark = |segment| self.timeline.iter_mut().for_each(|timeline| timeline.segment(segment));
        match self.plan.units[unit].kind {
            UnitKind::Embedding => Embedding::backward(&state.grads[0], &pass.batches[microbatch].ids, &dy)?,
            UnitKind::Block(layer) => {
                let (block, shape) = (&self.blocks[layer], self.config.batch_shape());
                let activations = match pass.kept[unit].take().expect("forward came before backward") {
                    Kept::Activations(activations) => activations,
                    Kept::Input(x) => block.recompute(&state.params, x, &self.rope, shape, &mut mark)?,
                };
                let (params, grads) = (&state.params, &state.grads);
                let dx = block.backward(params, grads, activations, dy, &self.rope, shape, &mut mark)?;
                pass.hand_on(dx, unit, microbatch, self.config.seq_len)?;
            }
            UnitKind::Head => unreachable!("the head's backward is the loss step"),
        }
        Ok(())
    }

    /// Waits until no rank reads the last contents of the unit's gradient buffer.
    fn begin_reduce(&mut self, unit: UnitId, pass: &mut Pass<'_>) -> Result<(), EngineError> {
        let start = self.mark()?;
        pass.comm_time += timed(|| {
            let buffer = &mut self.grad_buffers[self.plan.slots.grad_of_unit[unit]];
            Ok(self.groups.shards().begin_reduce(buffer, &self.units[unit].name)?)
        })?;
        self.span(Lane::Wait, "wait for gradient buffer", unit, start)
    }
}

/// The head's weight `[V, D]`: its own, or the embedding's.
fn head_weight<'a>(plan: &Plan, units: &'a [UnitState], head: UnitId) -> &'a Tensor {
    if plan.arch.tie_word_embeddings { &units[0].params[0] } else { &units[head].params[1] }
}
