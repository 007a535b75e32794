//! `fsdp-launch plan`: memory, traffic and operations of a job, without running it. Needs the config and the model's
//! `config.json`, neither weights nor data.

use fsdp_control::ExitStatus;
use fsdp_plan::Plan;
use fsdp_plan::plan::format_bytes;
use serde_json::{Value, json};

use crate::cli::PlanArgs;
use crate::failure::Failure;
use crate::hub::{self, Wanted};
use crate::preflight;

/// Prints the plan as text or as JSON.
pub fn plan(args: &PlanArgs) -> Result<ExitStatus, Failure> {
    let mut config = preflight::load_config(&args.job)?;
    hub::resolve(&mut config, Wanted::Config)?;
    let arch = preflight::load_architecture(&config)?;
    let plan =
        Plan::for_job(&config, arch, args.job.nproc * args.nnodes, args.job.nproc).map_err(Failure::bad_input)?;
    if args.json {
        crate::print(&format!("{:#}", as_json(&plan, args.device_memory)));
    } else {
        if args.steps {
            crate::print(&plan.steps_text());
        }
        crate::print(plan.to_string().trim_end());
        if let Some(device_bytes) = args.device_memory {
            let needed_bytes = plan.replay.peak.total_bytes();
            let fits = if needed_bytes <= device_bytes { "fits" } else { "does not fit" };
            crate::print(&format!("\n{fits}: {} needed of {}", format_bytes(needed_bytes), format_bytes(device_bytes)));
        }
    }
    Ok(ExitStatus::Done)
}

fn as_json(plan: &Plan, device_bytes: Option<u64>) -> Value {
    let (replay, peak) = (&plan.replay, &plan.replay.peak);
    let mut value = json!({
        "num_params": plan.num_params(),
        "num_units": plan.units.len(),
        "world_size": plan.world_size(),
        "peak_bytes": {
            "master": peak.master,
            "optimizer": peak.optimizer,
            "offload_buffers": peak.offload_buffers,
            "grad_shards": peak.grad_shards,
            "slots": peak.slots,
            "grad_buffers": peak.grad_buffers,
            "activations": peak.activations,
            "head": peak.head,
            "total": peak.total_bytes(),
        },
        "offloaded_bytes": peak.offloaded,
        "checkpoint_copy_bytes": plan.checkpoint_copy_bytes,
        "num_all_gathers": replay.num_all_gathers,
        "all_gather_bytes": replay.all_gather_bytes,
        "reduce_scatter_bytes": replay.reduce_scatter_bytes,
        "all_reduce_bytes": replay.all_reduce_bytes,
        "flops": replay.flops,
        "recompute_flops": replay.recompute_flops,
    });
    if let Some(device_bytes) = device_bytes {
        value["device_bytes"] = device_bytes.into();
        value["fits"] = (peak.total_bytes() <= device_bytes).into();
    }
    value
}
