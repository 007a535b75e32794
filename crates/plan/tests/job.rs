//! A job's config decides the plan: dtypes by parameter, microbatches, recomputing.

mod common;

use common::small_llama;
use fsdp_config::JobConfig;
use fsdp_plan::{Dtype, Keep, Plan, Step};

fn plan(more: &str, world_size: usize) -> Result<Plan, String> {
    let text = format!(
        "model.path = \"m\"\noptimizer.lr = 1e-4\ndata.train = [\"t.jsonl\"]\n\
         training = {{ steps = 1, seq_len = 8, micro_batch_size = 2, global_batch_size = 24 }}\n{more}"
    );
    let config = JobConfig::parse("job.toml", &text).map_err(|e| e.to_string())?;
    Plan::for_job(&config, small_llama(2, false), world_size).map_err(|e| e.to_string())
}

#[test]
fn the_batch_is_split_over_ranks_and_microbatches() {
    for (world_size, accumulation) in [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)] {
        let plan = plan("", world_size).unwrap();
        assert_eq!(plan.world_size, world_size);
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
