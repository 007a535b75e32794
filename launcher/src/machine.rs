//! What this machine has, and which one it is.

/// NVIDIA GPUs that this process may use: those with a device file, of which `CUDA_VISIBLE_DEVICES` may leave some.
pub fn num_gpus() -> usize {
    let visible = std::env::var_os("CUDA_VISIBLE_DEVICES").map(|list| list.to_string_lossy().into_owned());
    num_visible(num_device_files(), visible.as_deref())
}

/// GPUs, by their device files.
fn num_device_files() -> usize {
    let Ok(devices) = std::fs::read_dir("/dev") else {
        return 0;
    };
    let is_gpu = |name: &str| {
        let number = name.strip_prefix("nvidia").unwrap_or_default();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    devices.flatten().filter(|device| device.file_name().to_str().is_some_and(is_gpu)).count()
}

/// How many of `num_gpus` the list leaves. As CUDA reads it, the first entry that is no GPU ends the list, and of MIG
/// instances it takes one; names (`GPU-...`, `MIG-...`) are taken on trust.
fn num_visible(num_gpus: usize, list: Option<&str>) -> usize {
    let Some(list) = list else { return num_gpus };
    let is_gpu = |entry: &&str| match entry.parse::<i64>() {
        Ok(number) => usize::try_from(number).is_ok_and(|number| number < num_gpus),
        Err(_) => num_gpus > 0 && (entry.starts_with("GPU-") || entry.starts_with("MIG-")),
    };
    let gpus: Vec<&str> = list.split(',').map(str::trim).take_while(is_gpu).collect();
    if gpus.iter().any(|entry| entry.starts_with("MIG-")) { 1 } else { gpus.len() }
}

/// Compute threads of each of `num_ranks` ranks, where `OMP_NUM_THREADS` does not say: an equal share of the cores that
/// this process may use.
pub fn threads_per_rank(num_ranks: usize) -> usize {
    let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
    (num_cores / num_ranks).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_are_counted_as_cuda_does() {
        for (list, expected) in [
            (None, 4),
            (Some(""), 0),
            (Some("-1"), 0),
            (Some("2"), 1),
            (Some("0, 3"), 2),
            (Some("1,9,2"), 1),
            (Some("0,-1,1"), 1),
            (Some("GPU-8932f937,GPU-0a"), 2),
            (Some("MIG-0a,MIG-0b"), 1),
            (Some("none"), 0),
        ] {
            assert_eq!(num_visible(4, list), expected, "{list:?}");
        }
        assert_eq!(num_visible(0, Some("GPU-8932f937")), 0);
    }
}
