//! After `tune_malloc`, a tensor of 40 MiB reuses pages instead of faulting in fresh ones, on every thread. A process
//! of its own without the test harness: its threads would have heaps made before.

use tch::{Device, Kind, Tensor};

fn main() {
    assert!(fsdp_torch_ext::tune_malloc());
    touch();
    check("main thread");
    let huge = Tensor::f_zeros([1 << 50], (Kind::Float, Device::Cpu)).unwrap_err().to_string();
    assert!(huge.contains("out of host memory"), "{huge}");
    std::thread::spawn(|| check("another thread")).join().unwrap();
}

fn touch() {
    let t = Tensor::ones([10 << 20], (Kind::Float, Device::Cpu));
    assert_eq!(t.data_ptr() as usize % 64, 0, "vectors are loaded aligned");
}

fn check(who: &str) {
    let before = faults();
    for _ in 0..6 {
        touch();
    }
    let faults = faults() - before;
    // 6 * 40 MiB afresh would be 61440 pages.
    assert!(faults < 2000, "{who}: {faults} page faults");
    println!("{who}: {faults} page faults");
}

/// Pages of the process that were faulted in so far.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(") ").next().unwrap();
    after_name.split(' ').nth(7).unwrap().parse().unwrap()
}
