//! A job's config decides the plan: dtypes by parameter, microbatches, recomputing.

mod common;

use common::small_llama;
use fsdp_config::JobConfig;
use fsdp_plan::{Dtype, Keep, Plan, Step};

fn plan(more: &str, world_size: usize) -> Result<Plan, String> {
    plan_of_nodes(more, world_size, world_size)
}

fn plan_of_nodes(more: &str, world_size: usize, local_world_size: usize) -> Result<Plan, String> {
    let text = format!(
        "model.path = \"m\"\noptimizer.lr = 1e-4\ndata.train = [\"t.jsonl\"]\n\
         training = {{ steps = 1, seq_len = 8, micro_batch_size = 2, global_batch_size = 24 }}\n{more}"
    );
    let config = JobConfig::parse("job.toml", &text).map_err(|e| e.to_string())?;
    Plan::for_job(&config, small_llama(2, false), world_size, local_world_size).map_err(|e| e.to_string())
}

#[test]
fn the_batch_is_split_over_ranks_and_microbatches() {
    for (world_size, accumulation) in [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)] {
        let plan = plan("", world_size).unwrap();
        assert_eq!(plan.world_size(), world_size);
        let losses = plan.training.iter().filter(|s| matches!(s, Step::Loss { .. })).count();
        assert_eq!(losses, accumulation);
    }
    let message = plan("", 5).unwrap_err();
    assert!(message.contains("global_batch_size") && message.contains("10"), "{message}");
}

#[test]
fn precision_rules_make_groups() {
    let rules = "
        [[precision.override]]
        match = \"*norm*\"
        param = \"fp32\"
        [[precision.override]]
        match = \"*.mlp.*\"
        reduce = \"bf16\"";
    let plan = plan(rules, 2).unwrap();
    assert_eq!(plan.compute_dtype, Dtype::Bf16);
    let groups: Vec<_> =
        plan.layouts[1].groups.iter().map(|g| (g.param_dtype, g.reduce_dtype, g.params.len())).collect();
    assert_eq!(groups, [(Dtype::Fp32, Dtype::Fp32, 2), (Dtype::Bf16, Dtype::Fp32, 4), (Dtype::Bf16, Dtype::Bf16, 3)]);
}

#[test]
fn recomputing_and_prefetching_follow_the_config() {
    for (mode, keep) in [("full", Keep::Input), ("none", Keep::Activations)] {
        let plan = plan(&format!("activation_checkpointing.mode = \"{mode}\"\nfsdp.prefetch = 0"), 2).unwrap();
        assert!(plan.training.contains(&Step::Forward { unit: 1, microbatch: 0, keep }));
        assert_eq!(plan.slots.num_block_slots, 1);
    }
}

#[test]
fn hybrid_sharding_makes_whole_groups() {
    let of = |more: &str, world_size, local_world_size| {
        let hybrid = format!("fsdp = {{ strategy = \"hybrid_shard\"{more} }}");
        plan_of_nodes(&hybrid, world_size, local_world_size).map(|plan| {
            let shard: usize =
                plan.layouts.iter().flat_map(|l| &l.groups).map(|g| g.shard_numel(plan.num_shards)).sum();
            let expected = 2 * 4 * shard as u64 * (plan.num_replicas as u64 - 1) / plan.num_replicas as u64;
            assert!(plan.replay.all_reduce_bytes.abs_diff(expected) < 8, "rounding a unit at a time");
            (plan.num_shards, plan.num_replicas)
        })
    };
    assert_eq!(of("", 12, 4), Ok((4, 3)));
    assert_eq!(of(", shard_size = 2", 12, 4), Ok((2, 6)));
    assert_eq!(of(", shard_size = 12", 12, 4), Ok((12, 1)));
    for (more, local_world_size, got) in [("", 5, "got 5 (the ranks of a node"), (", shard_size = 8", 4, "got 8;")] {
        let message = of(more, 12, local_world_size).unwrap_err();
        assert!(message.contains("expected a divisor of the 12 ranks") && message.contains(got), "{message}");
    }
}
