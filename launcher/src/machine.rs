//! What this machine has.

/// NVIDIA GPUs, by their device files.
pub fn num_gpus() -> usize {
    let Ok(devices) = std::fs::read_dir("/dev") else {
        return 0;
    };
    let is_gpu = |name: &str| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    devices.flatten().filter(|device| device.file_name().to_str().is_some_and(is_gpu)).count()
}

/// Compute threads of each of `num_ranks` ranks, where `OMP_NUM_THREADS` does not say: an equal share of the cores that
/// this process may use.
pub fn threads_per_rank(num_ranks: usize) -> usize {
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    (num_cores / num_ranks).max(1)
}
