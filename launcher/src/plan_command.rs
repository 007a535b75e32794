//! `fsdp-launch plan`: memory, traffic and operations of a job, without running it. Needs the config and the model's
//! `config.json`, neither weights nor data.

use fsdp_config::{JobConfig, Recompute, Strategy};
use fsdp_control::ExitStatus;
use fsdp_plan::plan::format_bytes;
use fsdp_plan::{Architecture, Dtype, Plan, PlanInput};
use serde_json::{Value, json};

use crate::cli::PlanArgs;
use crate::failure::Failure;
use crate::preflight;

/// Prints the plan as text or as JSON.
pub fn plan(args: &PlanArgs) -> Result<ExitStatus, Failure> {
    let config = preflight::load_config(&args.job)?;
    let arch = preflight::load_architecture(&config)?;
    let plan = job_plan(&config, arch, args.job.nproc)?;
    if args.json {
        crate::print(&format!("{:#}", as_json(&plan, args.device_memory)));
    } else {
        crate::print(plan.to_string().trim_end());
        if let Some(device_bytes) = args.device_memory {
            let needed_bytes = plan.replay.peak.total_bytes();
            let fits = if needed_bytes <= device_bytes { "fits" } else { "does not fit" };
            crate::print(&format!("\n{fits}: {} needed of {}", format_bytes(needed_bytes), format_bytes(device_bytes)));
        }
    }
    Ok(ExitStatus::Done)
}

fn job_plan(config: &JobConfig, arch: Architecture, world_size: usize) -> Result<Plan, Failure> {
    let accumulation = config.num_microbatches(world_size as u64).map_err(Failure::bad_input)?;
    let input = PlanInput {
        world_size,
        strategy: match config.fsdp.strategy {
            Strategy::FullShard => fsdp_plan::Strategy::FullShard,
        },
        prefetch: config.fsdp.prefetch as usize,
        recompute: config.activation_checkpointing.mode == Recompute::Full,
        accumulation: accumulation as usize,
        micro_batch_size: config.training.micro_batch_size as usize,
        seq_len: config.training.seq_len as usize,
        compute_dtype: plan_dtype(config.precision.param),
    };
    Ok(Plan::new(arch, &input, |name| {
        let (param, reduce) = config.precision.dtypes_of(name);
        (plan_dtype(param), plan_dtype(reduce))
    }))
}

fn plan_dtype(dtype: fsdp_config::Dtype) -> Dtype {
    match dtype {
        fsdp_config::Dtype::Fp32 => Dtype::Fp32,
        fsdp_config::Dtype::Bf16 => Dtype::Bf16,
        fsdp_config::Dtype::Fp16 => Dtype::Fp16,
    }
}

fn as_json(plan: &Plan, device_bytes: Option<u64>) -> Value {
    let (replay, peak) = (&plan.replay, &plan.replay.peak);
    let mut value = json!({
        "num_params": plan.num_params(),
        "num_units": plan.units.len(),
        "world_size": plan.world_size,
        "peak_bytes": {
            "master": peak.master,
            "optimizer": peak.optimizer,
            "grad_shards": peak.grad_shards,
            "slots": peak.slots,
            "grad_buffers": peak.grad_buffers,
            "activations": peak.activations,
            "head": peak.head,
            "total": peak.total_bytes(),
        },
        "num_all_gathers": replay.num_all_gathers,
        "all_gather_bytes": replay.all_gather_bytes,
        "reduce_scatter_bytes": replay.reduce_scatter_bytes,
        "flops": replay.flops,
        "recompute_flops": replay.recompute_flops,
    });
    if let Some(device_bytes) = device_bytes {
        value["device_bytes"] = device_bytes.into();
        value["fits"] = (peak.total_bytes() <= device_bytes).into();
    }
    value
}
