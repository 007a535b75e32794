//! The two ends of the chain: token embedding, and final norm + head with the loss.

use fsdp_plan::DeviceKind;
use fsdp_plan::replay::head_chunk_tokens;
use fsdp_torch_ext::kernels;
use tch::{Device, Kind, Tensor};

use crate::linear::{add_product, product_into_fp32_fits, write_grad};
use crate::{Mark, ModelError, Segment, norm};

/// Token embedding.
#[derive(Debug)]
pub struct Embedding;

impl Embedding {
    /// weight `[V, D]`, ids `[N]` -> `[N, D]` in the dtype `compute`.
    pub fn forward(weight: &Tensor, ids: &Tensor, compute: Kind) -> Result<Tensor, ModelError> {
        Ok(weight.f_index_select(0, ids)?.f_to_kind(compute)?)
    }

    /// Writes the weight's gradient `[V, D]`: rows of `dx` `[N, D]` summed by id, in fp32.
    pub fn backward(grad: &Tensor, ids: &Tensor, dx: &Tensor) -> Result<(), ModelError> {
        let dx = dx.f_to_kind(Kind::Float)?;
        if grad.kind() == Kind::Float {
            let mut grad = grad.shallow_clone();
            let _ = grad.f_zero_()?.f_index_add_(0, ids, &dx)?;
            return Ok(());
        }
        let sum = Tensor::f_zeros(grad.size(), (Kind::Float, grad.device()))?;
        write_grad(grad, &sum.f_index_add(0, ids, &dx)?)
    }
}

/// Final RMSNorm and language-model head. Logits exist for a chunk of tokens at a time.
#[derive(Debug)]
pub struct Head {
    eps: f64,
    chunk_tokens: i64,
}

/// What the head's pass yields.
#[derive(Debug)]
pub struct HeadLoss {
    /// Sum over the valid tokens of their cross-entropy: one f64, on the device.
    pub loss_sum: Tensor,
    /// Gradient for the last block's output, `[N, D]`.
    pub dx: Tensor,
}

impl Head {
    pub fn new(vocab_size: usize, eps: f64, device: Device) -> Self {
        let device = if device == Device::Cpu { DeviceKind::Cpu } else { DeviceKind::Gpu };
        Head { eps, chunk_tokens: head_chunk_tokens(vocab_size, device) as i64 }
    }

    /// Forward and backward: x `[N, D]`, norm weight `[D]`, head weight `[V, D]`, targets `[N]` with -100 for ignored.
    /// Gradients of `scale * loss_sum` are written into `norm_grad` and `head_grad`; `scale` is one f64 on the device.
    /// The host waits for nothing.
    #[allow(clippy::too_many_arguments)]
    pub fn loss_and_backward(
        &self,
        norm: &Tensor,
        weight: &Tensor,
        norm_grad: &Tensor,
        head_grad: &Tensor,
        x: &Tensor,
        targets: &Tensor,
        scale: &Tensor,
        mark: Mark,
    ) -> Result<HeadLoss, ModelError> {
        mark(Segment::HeadNorm);
        let (h, rstd) = norm::forward(x, norm, self.eps)?;
        let dh = Tensor::f_empty(h.size(), (h.kind(), h.device()))?;
        let mut loss_sum = Tensor::f_zeros([], (Kind::Double, x.device()))?;
        // Chunks add up in fp32: in the gradient buffer itself where that is its dtype.
        let mut weight_grad = match head_grad.kind() {
            Kind::Float => head_grad.shallow_clone(),
            _ => Tensor::f_empty(head_grad.size(), (Kind::Float, head_grad.device()))?,
        };
        for (start, len) in self.chunks(x.size()[0]) {
            mark(Segment::HeadChunk);
            let h = h.f_narrow(0, start, len)?;
            let mut logits = self.logits(&h, weight)?; // [chunk, V]
            let loss = kernels::cross_entropy(&mut logits, &targets.f_narrow(0, start, len)?, scale)?;
            let _ = loss_sum.f_add_(&loss)?;
            let d_logits = logits; // overwritten in place
            let mut dh = dh.f_narrow(0, start, len)?;
            if dh.kind() == weight.kind() {
                let _ = d_logits.f_mm_out(&dh, weight)?;
            } else {
                dh.f_copy_(&d_logits.f_mm(weight)?)?;
            }
            let h = h.f_to_kind(weight.kind())?;
            if product_into_fp32_fits(&weight_grad, &h) {
                add_product(&weight_grad, &d_logits.f_tr()?, &h, start == 0)?; // [V, D]
            } else {
                kernels::accumulate(&mut weight_grad, &d_logits.f_tr()?.f_mm(&h)?, start == 0)?;
            }
        }
        if weight_grad.kind() != head_grad.kind() {
            write_grad(head_grad, &weight_grad)?;
        }
        mark(Segment::HeadNormBackward);
        let (dx, d_norm) = norm::backward(&dh, x, norm, &rstd)?;
        write_grad(norm_grad, &d_norm)?;
        Ok(HeadLoss { loss_sum, dx })
    }

    /// Forward alone: the sum over the valid tokens of their cross-entropy, one f64 on the device.
    pub fn loss(&self, norm: &Tensor, weight: &Tensor, x: &Tensor, targets: &Tensor) -> Result<Tensor, ModelError> {
        let (h, _) = norm::forward(x, norm, self.eps)?;
        let one = Tensor::f_ones([], (Kind::Double, x.device()))?;
        let mut loss_sum = one.f_zeros_like()?;
        for (start, len) in self.chunks(x.size()[0]) {
            let mut logits = self.logits(&h.f_narrow(0, start, len)?, weight)?;
            let loss = kernels::cross_entropy(&mut logits, &targets.f_narrow(0, start, len)?, &one)?;
            let _ = loss_sum.f_add_(&loss)?;
        }
        Ok(loss_sum)
    }

    /// The most likely next token after each of the given rows of x: `[rows] -> [rows]`.
    pub fn argmax(&self, norm: &Tensor, weight: &Tensor, x: &Tensor, rows: &Tensor) -> Result<Tensor, ModelError> {
        let (h, _) = norm::forward(&x.f_index_select(0, rows)?, norm, self.eps)?;
        Ok(self.logits(&h, weight)?.f_argmax(1, false)?)
    }

    /// `[chunk, D] -> [chunk, V]` in the weight's dtype.
    fn logits(&self, h: &Tensor, weight: &Tensor) -> Result<Tensor, ModelError> {
        Ok(h.f_to_kind(weight.kind())?.f_mm(&weight.f_tr()?)?)
    }

    /// (start, length) of each chunk of `num_tokens`.
    fn chunks(&self, num_tokens: i64) -> impl Iterator<Item = (i64, i64)> + use<> {
        let chunk = self.chunk_tokens;
        (0..num_tokens).step_by(chunk as usize).map(move |start| (start, chunk.min(num_tokens - start)))
    }
}
