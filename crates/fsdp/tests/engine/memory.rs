//! What the engine allocates for good is what the plan says, byte for byte, at the start and after training.

use fsdp_plan::replay::static_memory;
use fsdp_plan::{Dtype, Plan, Step, UnitKind};

use crate::job::{Dtypes, Job, ODD, QWEN2, QWEN3, TIED, UNTIED, fp32, state};
use crate::ranks::{World, run};

/// Two groups a unit: norms and biases in fp32, and three where a matrix is reduced in bf16 too.
fn mixed(name: &str) -> (Dtype, Dtype) {
    let param = if name.contains("norm") || name.ends_with("bias") { Dtype::Fp32 } else { Dtype::Bf16 };
    (param, if name.contains("up_proj") { Dtype::Bf16 } else { Dtype::Fp32 })
}

fn bf16(_: &str) -> (Dtype, Dtype) {
    (Dtype::Bf16, Dtype::Fp32)
}

#[test]
fn the_engine_allocates_what_the_plan_says() {
    (1..=4).for_each(|world_size| drop(run("memory", world_size)));
}

pub fn rank(world: &mut World) {
    let dtypes: [(Dtype, Dtypes); 3] = [(Dtype::Fp32, fp32), (Dtype::Bf16, bf16), (Dtype::Bf16, mixed)];
    for (i, model) in [TIED, UNTIED, QWEN2, QWEN3, ODD].into_iter().enumerate() {
        for (k, (compute, dtypes)) in dtypes.into_iter().enumerate() {
            let prefetch = (i + k + world.size) % 3;
            check(world, &Job { compute, dtypes, prefetch, recompute: i % 2 == 0, ..Job::new(model) });
        }
    }
}

fn check(world: &mut World, job: &Job) {
    let before = mapped();
    let mut engine = job.engine(world);
    let expected = static_memory(engine.plan());
    assert_eq!(engine.allocated(), expected, "{}", job.model);
    for kind in [fsdp::StateKind::Param, fsdp::StateKind::ExpAvg, fsdp::StateKind::ExpAvgSq] {
        let bytes = state(&engine, kind).len() as u64 * 4;
        assert!(bytes > 0 && bytes <= expected.master, "{bytes} without padding");
    }

    // What the kernel says: one mapping a slot, and every rank's gradient buffers.
    let plan = engine.plan();
    let slots = &plan.slots;
    let now = mapped();
    let new = |what: usize| (now[what].0 - before[what].0, now[what].1 - before[what].1);
    assert_mapped("slots", new(0), slots.slot_bytes.len(), expected.slots);
    let num_grads = world.size * slots.grad_bytes.len();
    assert_mapped("gradient buffers", new(1), num_grads, world.size as u64 * expected.grad_buffers);

    // So unsharded blocks have no other place than 1 + prefetch slots.
    let num_blocks = plan.arch.num_layers;
    assert_eq!(slots.num_block_slots, num_blocks.min(1 + job.prefetch));
    assert_eq!(slots.slot_bytes.len(), slots.num_block_slots + if plan.arch.tie_word_embeddings { 2 } else { 1 });
    assert!(most_live_blocks(plan) <= 1 + job.prefetch);

    for step in 0..3 {
        job.step(world, &mut engine, step);
    }
    let loss = engine.evaluate(&job.batches(world, 0)[0]).unwrap().0;
    assert!(loss.is_finite());
    assert_eq!(engine.allocated(), expected, "after training");
    assert_eq!(mapped(), now, "after training");
}

/// The most blocks that are between the start of their gather and their release at once.
fn most_live_blocks(plan: &Plan) -> usize {
    let (mut live, mut most) = (0usize, 0);
    let is_block = |unit: usize| matches!(plan.units[unit].kind, UnitKind::Block(_));
    for step in plan.training.iter().chain(&plan.forward_only) {
        match *step {
            Step::StartUnshard(unit) if is_block(unit) => live += 1,
            Step::Release(unit) if is_block(unit) => live -= 1,
            _ => {}
        }
        most = most.max(live);
    }
    assert_eq!(live, 0, "every block that is gathered is released");
    most
}

fn assert_mapped(what: &str, (num, bytes): (usize, u64), expected_num: usize, expected_bytes: u64) {
    // Counters in front of the data, and the end of the last page.
    let most = expected_bytes + expected_num as u64 * 2 * 4096;
    assert_eq!(num, expected_num, "mappings of {what}");
    assert!((expected_bytes..=most).contains(&bytes), "{what}: {bytes} bytes mapped, the plan says {expected_bytes}");
}

/// Number and bytes of this process's shared mappings: of slots, and of gradient buffers.
fn mapped() -> [(usize, u64); 2] {
    let mut found = [(0, 0); 2];
    for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
        for (what, name) in ["/memfd:fsdp-slot", "/memfd:fsdp-gradient buffer"].iter().enumerate() {
            if line.contains(name) {
                let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
                let address = |text| u64::from_str_radix(text, 16).unwrap();
                found[what] = (found[what].0 + 1, found[what].1 + address(end) - address(start));
            }
        }
    }
    found
}
