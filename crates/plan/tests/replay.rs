//! Bytes, traffic and operations against sums worked out by hand.

mod common;

use std::time::{Duration, Instant};

use common::small_llama;
use fsdp_plan::costs::UnitCosts;
use fsdp_plan::replay::Batch;
use fsdp_plan::{Architecture, DeviceKind, Dtype, Keep, Memory, Offload, Plan, PlanInput, Step, Strategy};

const INPUT: PlanInput = PlanInput {
    num_shards: 2,
    num_replicas: 1,
    strategy: Strategy::FullShard,
    resident_units: 0,
    prefetch: 1,
    recompute: true,
    accumulation: 1,
    micro_batch_size: 2,
    seq_len: 8,
    compute_dtype: Dtype::Bf16,
    device: DeviceKind::Cpu,
    offload: Offload::None,
};

fn plan(arch: Architecture, input: PlanInput) -> Plan {
    Plan::new(arch, &input, |_| (Dtype::Bf16, Dtype::Fp32))
}

fn llama(num_layers: usize, hidden_size: usize, intermediate_size: usize, num_heads: usize) -> Architecture {
    Architecture {
        vocab_size: 128_256,
        hidden_size,
        intermediate_size,
        num_heads,
        num_kv_heads: 8,
        head_dim: 128,
        ..small_llama(num_layers, false)
    }
}

#[test]
fn offloading_leaves_buffers_and_what_is_gathered_from() {
    let of = |offload| plan(small_llama(2, false), PlanInput { offload, ..INPUT }).replay.peak;
    let (none, optimizer, master) = (of(Offload::None), of(Offload::Optimizer), of(Offload::Master));
    // 43,456 elements a rank, less than one chunk.
    let moments = Memory { optimizer: 0, offload_buffers: 2 * 2 * 43_456 * 4, offloaded: 43_456 * 8, ..none };
    assert_eq!(optimizer, moments);
    let offload_buffers = 2 * 3 * 43_456 * 4 + 43_456 * 2;
    assert_eq!(master, Memory { master: 0, offload_buffers, offloaded: 43_456 * 12, ..moments });
    assert_eq!(none.total_bytes() + offload_buffers, master.total_bytes() + 43_456 * 12);
}

#[test]
fn two_blocks_on_two_ranks() {
    let plan = plan(small_llama(2, false), INPUT);
    let replay = &plan.replay;
    // Padded elements: embedding 6,400, blocks 36,992 each, head 6,528; together 86,912, half of them on each rank.
    let expected = Memory {
        master: 43_456 * 4,
        optimizer: 43_456 * 8,
        grad_shards: 43_456 * 4,
        // Two block slots in bf16, and one for embedding and head.
        slots: 2 * 36_992 * 2 + 6_528 * 2,
        grad_buffers: 2 * 36_992 * 4 + 6_528 * 4,
        // The last block's backward: 16 tokens times the first block's input, all that the last one keeps, its dy and
        // s; and the gradient of down_proj in bf16.
        activations: 16 * (128 + 1_424 + 128 + 256) + 64 * 128 * 2,
        ..Memory::default()
    };
    assert_eq!(replay.peak, expected);
    assert_eq!(plan.training[replay.peak_step], Step::Backward { unit: 2, microbatch: 0 });

    // Both blocks are still there at the turn: four gathers, half of each from the other rank.
    assert_eq!((replay.num_all_gathers, replay.max_live_block_slots), (4, 2));
    assert_eq!(replay.all_gather_bytes, 86_912 * 2 / 2);
    assert_eq!(replay.reduce_scatter_bytes, 86_912 * 4 / 2);

    // Per block and token 36,864 weights in products, and 2 x 64 x 8 operations of causal attention.
    let block = 16.0 * (2.0 * 36_864.0 + 2.0 * 64.0 * 8.0);
    let head = 16.0 * 2.0 * 6_400.0;
    // The first block runs again, but for down_proj.
    let recompute = block - 16.0 * 2.0 * 64.0 * 128.0;
    assert_eq!(replay.recompute_flops, recompute);
    assert_eq!(replay.flops, 3.0 * (2.0 * block + head) + recompute);
}

#[test]
fn a_step_of_several_microbatches_peaks_no_higher() {
    let one = plan(small_llama(3, true), INPUT).replay;
    let three = plan(small_llama(3, true), PlanInput { accumulation: 3, ..INPUT }).replay;
    assert_eq!(three.peak, one.peak);
    assert_eq!((three.flops, three.recompute_flops), (3.0 * one.flops, 3.0 * one.recompute_flops));
    assert_eq!(three.reduce_scatter_bytes, 3 * one.reduce_scatter_bytes);
}

#[test]
fn the_peak_is_where_it_should_be() {
    let last_block = Step::Backward { unit: 2, microbatch: 0 };
    let loss = Step::Loss { unit: 3, microbatch: 0 };
    let embedding = Step::Backward { unit: 0, microbatch: 0 };
    let large_vocab = || Architecture { vocab_size: 20_000, ..small_llama(2, false) };
    let long = PlanInput { seq_len: 64, ..INPUT };
    let keep_all = PlanInput { recompute: false, ..long };
    let fp32 = PlanInput { compute_dtype: Dtype::Fp32, ..long };
    let (bf16, mixed, all_fp32) = ((Dtype::Bf16, Dtype::Bf16), (Dtype::Bf16, Dtype::Fp32), (Dtype::Fp32, Dtype::Fp32));
    // Architecture, input, dtypes, where, activations, head.
    for (arch, input, dtypes, step, activations, head) in [
        // The gradients of s, gate and up; 128 tokens.
        (small_llama(2, false), long, mixed, last_block, 128 * (128 + 1_424 + 128 + 3 * 256), 0),
        (small_llama(2, false), keep_all, mixed, last_block, 128 * (1_424 + 1_424 + 128 + 3 * 256), 0),
        (small_llama(2, false), fp32, all_fp32, last_block, 128 * (256 + 2_832 + 256 + 3 * 512), 0),
        // x, h, its gradient and rstd; 16 tokens' logits, and the weight's gradient.
        (large_vocab(), INPUT, mixed, loss, 16 * (128 + 1_424 + 388), (16 + 64) * 20_000 * 2),
        // Gradients that are not reduced in fp32 are summed beside the buffer.
        // Gradients that are not reduced in fp32 are summed beside the buffer; those by token ids twice.
        (large_vocab(), long, bf16, loss, 128 * (128 + 1_424 + 388), (128 + 64) * 20_000 * 2 + 64 * 20_000 * 4),
        (large_vocab(), INPUT, bf16, embedding, 16 * (128 + 256) + 2 * 64 * 20_000 * 4, 0),
    ] {
        let plan = Plan::new(arch, &input, |_| dtypes);
        let peak = plan.replay.peak;
        assert_eq!(plan.training[plan.replay.peak_step], step);
        assert_eq!((peak.activations, peak.head), (activations, head), "{input:?}");
    }
}

/// Crate model's `Activations`, tensor by tensor.
#[test]
fn a_block_keeps_what_its_activations_hold() {
    let (batch, seq_len) = (3, 10);
    let n = batch * seq_len;
    for (num_heads, num_kv_heads, qk_norm, compute_dtype) in
        [(4, 4, false, Dtype::Fp32), (4, 2, false, Dtype::Bf16), (6, 2, true, Dtype::Fp16), (6, 1, true, Dtype::Fp32)]
    {
        let (d, f, head_dim) = (48, 100, 20);
        let arch = Architecture {
            hidden_size: d,
            intermediate_size: f,
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm,
            ..small_llama(1, false)
        };
        let (q, k) = (num_heads * head_dim, num_kv_heads * head_dim);
        let mut in_compute_dtype = vec![
            n * d, // x
            n * d, // h1
            n * q, // q
            n * k, // k
            n * k, // v
            n * q, // attn
            n * d, // r
            n * d, // h2
            n * f, // gate
            n * f, // up
        ];
        let mut in_fp32 = vec![
            n,                           // input_rstd
            batch * num_heads * seq_len, // logsumexp
            n,                           // post_rstd
        ];
        if qk_norm {
            in_compute_dtype.extend([n * q, n * k]); // q, k
            in_fp32.extend([n * num_heads, n * num_kv_heads]); // q_rstd, k_rstd
        }
        let bytes =
            compute_dtype.size_bytes() * in_compute_dtype.iter().sum::<usize>() + 4 * in_fp32.iter().sum::<usize>();

        let plan = Plan::new(arch, &PlanInput { compute_dtype, ..INPUT }, |_| (compute_dtype, Dtype::Fp32));
        let costs = UnitCosts::new(&plan, 1, Batch { micro_batch_size: batch, seq_len });
        assert_eq!(costs.kept_per_token(Keep::Activations) * n as u64, bytes as u64);
        let input_bytes = n * d * compute_dtype.size_bytes();
        assert_eq!(costs.kept_per_token(Keep::Input) * n as u64, input_bytes as u64);
        assert_eq!(costs.kept_per_token(Keep::Nothing), 0);
    }
}

/// 6 operations a weight and token, input embedding excluded, and 12 x layers x width x sequence a token for attention
/// (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B), of which the causal half.
#[test]
fn operations_of_an_8b_model_are_the_published_estimate() {
    let input = PlanInput { num_shards: 8, micro_batch_size: 1, seq_len: 8192, ..INPUT };
    let plan = plan(llama(32, 4096, 14336, 32), input);
    assert_eq!(plan.num_params(), 8_030_261_248);
    let weights = (plan.num_params() - 128_256 * 4096) as f64;
    let estimate = 8192.0 * (6.0 * weights + 12.0 * 32.0 * 4096.0 * 8192.0 / 2.0);
    let needed = plan.replay.flops - plan.replay.recompute_flops;
    assert!((needed / estimate - 1.0).abs() < 1e-3, "{needed:e}, estimate {estimate:e}");
    // Recomputing repeats less than a forward pass, a third of what is needed.
    let share = plan.replay.recompute_flops / needed;
    assert!((0.2..1.0 / 3.0).contains(&share), "{share}");
}

#[test]
fn a_70b_model_on_64_ranks_is_planned_at_once() {
    let start = Instant::now();
    let input = PlanInput { num_shards: 64, micro_batch_size: 1, seq_len: 8192, accumulation: 8, ..INPUT };
    let plan = plan(llama(80, 8192, 28672, 64), input);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(plan.num_params(), 70_553_706_496);
    // 16 bytes a parameter over 64 ranks: 17.6 GB, and padding.
    let peak = plan.replay.peak;
    let sharded_bytes = peak.master + peak.optimizer + peak.grad_shards;
    let exact = 16 * 70_553_706_496 / 64;
    assert!((exact..exact + exact / 10_000).contains(&sharded_bytes), "{sharded_bytes}");
}
