//! A job's config -> its plan.

use fsdp_config::{ConfigError, JobConfig, Recompute};

use crate::{Architecture, Dtype, Plan, PlanInput, Strategy};

impl Plan {
    /// The plan of the job `config` on `world_size` ranks.
    ///
    /// # Errors
    /// The global batch cannot be split over so many ranks.
    pub fn for_job(config: &JobConfig, arch: Architecture, world_size: usize) -> Result<Self, ConfigError> {
        let input = PlanInput {
            world_size,
            strategy: match config.fsdp.strategy {
                fsdp_config::Strategy::FullShard => Strategy::FullShard,
            },
            prefetch: config.fsdp.prefetch as usize,
            recompute: config.activation_checkpointing.mode == Recompute::Full,
            accumulation: config.num_microbatches(world_size as u64)? as usize,
            micro_batch_size: config.training.micro_batch_size as usize,
            seq_len: config.training.seq_len as usize,
            compute_dtype: config.precision.param.into(),
        };
        Ok(Plan::new(arch, &input, |name| {
            let (param, reduce) = config.precision.dtypes_of(name);
            (param.into(), reduce.into())
        }))
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
