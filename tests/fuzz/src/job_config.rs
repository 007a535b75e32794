//! The TOML file of a job.

use fsdp_config::JobConfig;

use crate::within::memory_bound;

const ORIGIN: &str = "job.toml";

/// An accepted config, written out, is the same config; its learning rates are numbers. A refusal names the file.
pub fn job_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match memory_bound(data.len(), || JobConfig::parse(ORIGIN, text)) {
        Ok(config) => {
            let written = config.to_toml();
            let again = JobConfig::parse("config.toml", &written);
            assert_eq!(again.as_ref().ok(), Some(&config), "{again:?} from:\n{written}");
            for (step, num_steps) in [(1, 1), (1, 1000), (500, 1000), (1000, 1000), (7, u64::MAX)] {
                let lr = config.lr_at(step, num_steps);
                assert!((0.0..=config.optimizer.lr).contains(&lr), "{lr} at step {step} of {num_steps}");
            }
            for (world_size, local_world_size) in [(1, 1), (6, 3), (1 << 20, 8)] {
                if let Ok(num_shards) = config.num_shards(world_size, local_world_size) {
                    assert!(num_shards >= 1 && world_size.is_multiple_of(num_shards));
                }
                if let Ok(num_microbatches) = config.num_microbatches(world_size) {
                    assert!(num_microbatches >= 1);
                }
            }
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(ORIGIN), "no file in {message:?}");
        }
    }
}
