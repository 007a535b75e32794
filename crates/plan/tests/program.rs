//! The programs of a model with 3 blocks (units 1 to 3; 0 is the embedding, 4 the head) are those that `goldens/` lists.

mod common;

use std::path::Path;

use common::small_llama;
use fsdp_plan::{DeviceKind, Dtype, Offload, Plan, PlanInput, Step, Strategy};

const FULL_SHARD: PlanInput = PlanInput {
    num_shards: 2,
    num_replicas: 1,
    strategy: Strategy::FullShard,
    resident_units: 0,
    prefetch: 1,
    recompute: true,
    accumulation: 1,
    micro_batch_size: 1,
    seq_len: 8,
    compute_dtype: Dtype::Bf16,
    device: DeviceKind::Cpu,
    offload: Offload::None,
};
const SHARD_GRAD_OP: PlanInput = PlanInput { strategy: Strategy::ShardGradOp, ..FULL_SHARD };
const HYBRID_SHARD: PlanInput = PlanInput { strategy: Strategy::HybridShard, num_replicas: 2, ..FULL_SHARD };
const NO_SHARD: PlanInput = PlanInput { strategy: Strategy::NoShard, num_shards: 1, num_replicas: 2, ..FULL_SHARD };

fn plan(tied: bool, input: PlanInput) -> Plan {
    Plan::new(small_llama(3, tied), &input, |_| (Dtype::Bf16, Dtype::Fp32))
}

#[test]
fn training_programs_are_the_goldens() {
    for (name, input) in [
        ("full_shard", FULL_SHARD),
        ("shard_grad_op", SHARD_GRAD_OP),
        ("hybrid_shard", HYBRID_SHARD),
        ("no_shard", NO_SHARD),
        ("full_shard_resident_1", PlanInput { resident_units: 1, prefetch: 0, ..FULL_SHARD }),
        ("full_shard_prefetch_0", PlanInput { prefetch: 0, ..FULL_SHARD }),
        ("full_shard_no_recompute", PlanInput { recompute: false, ..FULL_SHARD }),
        ("full_shard_accumulation_2", PlanInput { accumulation: 2, ..FULL_SHARD }),
    ] {
        for (tied, suffix) in [(false, ""), (true, "_tied")] {
            assert_golden(&format!("{name}{suffix}"), &plan(tied, input).training);
        }
    }
}

#[test]
fn forward_only_programs_are_the_goldens() {
    assert_golden("forward_only", &plan(false, FULL_SHARD).forward_only);
    assert_golden("forward_only_tied", &plan(true, FULL_SHARD).forward_only);
}

/// Compares with `goldens/NAME.txt`, one step a line.
fn assert_golden(name: &str, steps: &[Step]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/goldens/{name}.txt"));
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let got: String = steps.iter().map(|step| format!("{step}\n")).collect();
    let line = got.lines().zip(expected.lines()).take_while(|(a, b)| a == b).count() + 1;
    assert!(got == expected, "{name}: differs from {} from line {line} on; got\n{got}", path.display());
}
