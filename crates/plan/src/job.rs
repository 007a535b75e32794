//! A job's config -> its plan.

use fsdp_config::{Backend, ConfigError, Device, JobConfig, Recompute};

use crate::replay::checkpoint_copy_bytes;
use crate::{Architecture, DeviceKind, Dtype, Plan, PlanInput, Strategy};

impl Plan {
    /// The plan of the job `config` on `world_size` ranks, `local_world_size` on each node.
    ///
    /// # Errors
    /// The global batch cannot be split over so many ranks, or they do not make whole shard groups.
    pub fn for_job(
        config: &JobConfig,
        arch: Architecture,
        world_size: usize,
        local_world_size: usize,
    ) -> Result<Self, ConfigError> {
        let num_shards = config.num_shards(world_size as u64, local_world_size as u64)? as usize;
        let input = PlanInput {
            num_shards,
            num_replicas: world_size / num_shards,
            strategy: match config.fsdp.strategy {
                fsdp_config::Strategy::FullShard => Strategy::FullShard,
                fsdp_config::Strategy::ShardGradOp => Strategy::ShardGradOp,
                fsdp_config::Strategy::NoShard => Strategy::NoShard,
                fsdp_config::Strategy::HybridShard => Strategy::HybridShard,
            },
            resident_units: config.fsdp.resident_units as usize,
            prefetch: config.fsdp.prefetch as usize,
            recompute: config.activation_checkpointing.mode == Recompute::Full,
            accumulation: config.num_microbatches(world_size as u64)? as usize,
            micro_batch_size: config.training.micro_batch_size as usize,
            seq_len: config.training.seq_len as usize,
            compute_dtype: config.precision.param.into(),
            device: match (config.fsdp.device, config.fsdp.backend) {
                (Device::Cuda, _) | (Device::Auto, Backend::Nccl) => DeviceKind::Gpu,
                (Device::Cpu, _) | (Device::Auto, _) => DeviceKind::Cpu,
            },
            offload: config.fsdp.offload,
        };
        let mut plan = Plan::new(arch, &input, |name| {
            let (param, reduce) = config.precision.dtypes_of(name);
            (param.into(), reduce.into())
        });
        if config.checkpoint.async_save && config.checkpoint.every_steps > 0 {
            plan.checkpoint_copy_bytes = checkpoint_copy_bytes(&plan);
        }
        Ok(plan)
    }
}

impl From<fsdp_config::Dtype> for Dtype {
    fn from(dtype: fsdp_config::Dtype) -> Self {
        match dtype {
            fsdp_config::Dtype::Fp32 => Dtype::Fp32,
            fsdp_config::Dtype::Bf16 => Dtype::Bf16,
            fsdp_config::Dtype::Fp16 => Dtype::Fp16,
        }
    }
}
