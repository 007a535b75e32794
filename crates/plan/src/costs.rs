//! What one unit's computations take for one microbatch on one rank: bytes at every moment that can be a peak, and
//! operations. The formulas mirror `Block`, `Embedding` and `Head` of crate model, tensor by tensor; tests hold them to
//! sums written out by hand. Not counted: workspace inside libtorch, and casts around a block's matrices whose param
//! dtype is not the compute dtype. What GPUs need else is from reading libtorch's kernels.
//!
//! D model width, Q and K widths of all query and of all key/value heads, F MLP width, V vocabulary.

use crate::program::UnitId;
use crate::replay::{Batch, head_chunk_tokens};
use crate::{DeviceKind, Dtype, Group, Keep, Plan, UnitKind, UnitLayout};

/// What is alive at one moment, besides what other units keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moment {
    /// Bytes of activations for each token of the microbatch.
    pub per_token: u64,
    /// Bytes of temporaries of a weight's size.
    pub fixed: u64,
    /// Bytes of the head's chunk of logits and what has the size of its weight.
    pub head: u64,
}

/// The costs of one unit. The head's `forward` is that of a forward-only program, its `backward` all of a `Loss` step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UnitCosts {
    /// Bytes per token that stay between forward and backward.
    input_per_token: u64,
    activations_per_token: u64,
    pub forward: Vec<Moment>,
    /// Forward again inside backward, as far as backward needs it.
    pub recompute: Vec<Moment>,
    pub backward: Vec<Moment>,
    /// Operations of matrix products and attention. Attention counts as causal, half of all pairs of positions, and
    /// its scores, which the kernel makes again in backward, are not counted twice.
    pub forward_flops: f64,
    pub recompute_flops: f64,
    pub backward_flops: f64,
}

impl UnitCosts {
    pub fn new(plan: &Plan, unit: UnitId, batch: Batch) -> Self {
        match plan.units[unit].kind {
            UnitKind::Embedding => embedding(plan, unit),
            UnitKind::Block(_) => block(plan, unit, batch),
            UnitKind::Head => head(plan, unit, batch),
        }
    }

    /// Bytes per token that a forward pass leaves for backward.
    pub fn kept_per_token(&self, keep: Keep) -> u64 {
        match keep {
            Keep::Nothing => 0,
            Keep::Input => self.input_per_token,
            Keep::Activations => self.activations_per_token,
        }
    }
}

fn embedding(plan: &Plan, unit: UnitId) -> UnitCosts {
    let size = plan.compute_dtype.size_bytes() as u64;
    let d = plan.arch.hidden_size as u64;
    let (param, reduce) = dtypes(&plan.layouts[unit], 0);
    let rows = if param == plan.compute_dtype { 0 } else { d * param.size_bytes() as u64 };
    let fp32_gradient = if plan.compute_dtype == Dtype::Fp32 { 0 } else { 4 * d };
    // The sum by token id, before and after adding.
    let fp32_sums = if reduce == Dtype::Fp32 { 0 } else { 2 * 4 * d * plan.arch.vocab_size as u64 };
    UnitCosts {
        forward: vec![Moment { per_token: rows + d * size, ..Moment::default() }],
        backward: vec![Moment { per_token: d * size + fp32_gradient, fixed: fp32_sums, head: 0 }],
        ..UnitCosts::default()
    }
}

fn block(plan: &Plan, unit: UnitId, batch: Batch) -> UnitCosts {
    let (arch, layout) = (&plan.arch, &plan.layouts[unit]);
    let size = plan.compute_dtype.size_bytes() as u64;
    let (num_heads, num_kv_heads) = (arch.num_heads as u64, arch.num_kv_heads as u64);
    let d = size * arch.hidden_size as u64;
    let f = size * arch.intermediate_size as u64;
    let q = size * num_heads * arch.head_dim as u64;
    let k = size * num_kv_heads * arch.head_dim as u64;

    // x, h1, r, h2; q, attn; k, v; gate, up; in fp32 two norms' rstd and each head's logsumexp.
    let mut kept = 4 * d + 2 * q + 2 * k + 2 * f + 4 * (2 + num_heads);
    if arch.qk_norm {
        // q and k before their norms, and the norms' rstd.
        kept += q + k + 4 * (num_heads + num_kv_heads);
    }
    let is_gpu = plan.device == DeviceKind::Gpu;
    let is_flash = is_gpu && plan.compute_dtype != Dtype::Fp32;
    // Keys and values repeated for each query head.
    let repeated = if num_heads == num_kv_heads { 0 } else { 2 * q };
    let q_fp32 = 4 * q / size;
    // Flash attention takes keys and values as they are; rotation makes one tensor in fp32.
    let in_attention = kept - (2 * d + 2 * f + 4) + if is_flash { q_fp32 } else { repeated };
    // Flash attention's backward sums the gradient of q in fp32, padded to 128 rows a sequence.
    let (in_attention_backward, padding) = match is_flash {
        true => (2 * q + 2 * k + q_fp32 + repeated, q_fp32 * 128 * batch.micro_batch_size as u64),
        // Gradients of attn, q and those of k and v for each query head.
        false => (4 * q + repeated, 0),
    };

    let moment = |per_token, fixed| Moment { per_token, fixed, head: 0 };
    let cast_gradient = |part| largest_cast_gradient(layout, part, plan.device);
    let (mlp_weight, attention_weight) = (cast_gradient(".mlp."), cast_gradient(".self_attn."));
    // gate, up, h2 and r are gone, the gradient of r is there.
    let behind_mlp = kept - 2 * f - d;
    let backward = vec![
        // dy and s = silu(gate) * up, for the weight gradients of the MLP.
        moment(kept + d + f, mlp_weight),
        // dy, and the gradients of s, gate and up.
        moment(kept + d + 3 * f, 0),
        // gate, up and h2 gone; dy, gradients of gate and up, and of h2 before and after adding.
        moment(kept + 2 * d, 0),
        moment(behind_mlp + in_attention_backward, padding),
        // q, attn, k and v gone; gradients of q, k, v.
        moment(behind_mlp, attention_weight),
    ];

    let n = batch.num_tokens() as f64;
    let [df, qf, kf, ff] = [d, q, k, f].map(|bytes| (bytes / size) as f64);
    let down_flops = 2.0 * n * df * ff;
    let attention_flops = 2.0 * n * qf * batch.seq_len as f64;
    let forward_flops = 2.0 * n * df * (2.0 * qf + 2.0 * kf + 2.0 * ff) + down_flops + attention_flops;
    UnitCosts {
        input_per_token: d,
        activations_per_token: kept,
        forward: vec![moment(in_attention, 0), moment(kept + f + d, 0)],
        // Beside dy.
        recompute: vec![moment(d + in_attention, 0), moment(d + kept, 0)],
        backward,
        forward_flops,
        // The product that only yields the block's output is not needed again.
        recompute_flops: forward_flops - down_flops,
        backward_flops: 2.0 * forward_flops,
    }
}

fn head(plan: &Plan, unit: UnitId, batch: Batch) -> UnitCosts {
    let (d, v) = (plan.arch.hidden_size as u64, plan.arch.vocab_size as u64);
    let n = batch.num_tokens();
    let (param, reduce) = match plan.arch.tie_word_embeddings {
        true => dtypes(&plan.layouts[0], 0),
        false => dtypes(&plan.layouts[unit], 1),
    };
    let hidden = d * plan.compute_dtype.size_bytes() as u64;
    let size = param.size_bytes() as u64;
    let chunk = n.min(head_chunk_tokens(plan.arch.vocab_size, plan.device) as u64);
    let logits = chunk * v * size;
    // The chunk of h, or of its gradient, in the weight's dtype.
    let cast = if param == plan.compute_dtype { 0 } else { chunk * d * size };
    let is_gpu = plan.device == DeviceKind::Gpu;
    // GPUs add a chunk's product straight to the sum.
    let weight_gradient = if is_gpu && reduce == Dtype::Fp32 { 0 } else { v * d * size };
    // The loss of a chunk is computed in fp32, part by part.
    let logits = logits + if is_gpu { GPU_LOSS_BYTES } else { 0 };
    let fp32_sum = if reduce == Dtype::Fp32 { 0 } else { 4 * v * d };
    let forward_flops = 2.0 * n as f64 * v as f64 * d as f64;
    UnitCosts {
        // x, h and the norm's rstd.
        forward: vec![Moment { per_token: 2 * hidden + 4, fixed: 0, head: logits + cast }],
        backward: vec![
            // The gradient of h too, and what a chunk needs.
            Moment { per_token: 3 * hidden + 4, fixed: 0, head: logits + cast + weight_gradient + fp32_sum },
            // The gradient of x too.
            Moment { per_token: 4 * hidden + 4, fixed: 0, head: fp32_sum },
        ],
        forward_flops,
        backward_flops: 2.0 * forward_flops,
        ..UnitCosts::default()
    }
}

/// (param dtype, reduce dtype) of the unit's parameter `index`.
fn dtypes(layout: &UnitLayout, index: usize) -> (Dtype, Dtype) {
    let group = layout.groups.iter().find(|g| g.params.iter().any(|p| p.index == index));
    let group = group.expect("a layout places every parameter");
    (group.param_dtype, group.reduce_dtype)
}

/// What the loss kernel of GPUs has at once.
const GPU_LOSS_BYTES: u64 = 128 << 20;

/// A product writes its weight's gradient into the buffer, unless that has another dtype: then it is made beside it. (On
/// GPUs the product of 16-bit matrices may be fp32.) The largest of these among the matrices whose name contains `part`.
fn largest_cast_gradient(layout: &UnitLayout, part: &str, device: DeviceKind) -> u64 {
    let is_direct =
        |g: &&Group| g.param_dtype == g.reduce_dtype || (device == DeviceKind::Gpu && g.reduce_dtype == Dtype::Fp32);
    let cast = layout.groups.iter().filter(|g| !is_direct(g));
    cast.flat_map(|g| g.params.iter().map(move |p| (g.param_dtype, p)))
        .filter(|(_, p)| p.shape.len() == 2 && p.name.contains(part))
        .map(|(dtype, p)| (p.numel * dtype.size_bytes()) as u64)
        .max()
        .unwrap_or(0)
}
