//! The ranks of a run, found in `/proc` by the config that they were started with.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// A worker process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Worker {
    pub rank: usize,
    pub pid: i32,
}

/// The workers of the job whose resolved config is at `config`, by rank.
pub fn workers(config: &Path) -> Vec<Worker> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("Linux").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that ends meanwhile has nothing to read; one that has ended and is not reaped has no command line.
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut args = command.split(|&byte| byte == 0).map(|arg| PathBuf::from(String::from_utf8_lossy(arg).as_ref()));
        let is_worker = args.next().is_some_and(|program| program.ends_with("fsdp-train"));
        if is_worker && args.next().as_deref() == Some(config) {
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let rank = environment
                .split(|&byte| byte == 0)
                .find_map(|var| std::str::from_utf8(var).ok()?.strip_prefix("RANK=")?.parse().ok());
            found.extend(rank.map(|rank| Worker { rank, pid }));
        }
    }
    found.sort();
    found
}

/// Fails if a worker is left after `patience`.
pub fn assert_none_left(config: &Path, patience: Duration) {
    let start = Instant::now();
    loop {
        let left = workers(config);
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < patience, "{left:?} are left after {patience:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn send(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).expect("a process id"), signal).expect("a process of this test");
}

/// Sends `signal` to a process that may have ended; whether it has not.
pub fn send_if_alive(pid: i32, signal: Signal) -> bool {
    // The only error is that it has ended: it is of this test.
    rustix::process::kill_process(Pid::from_raw(pid).expect("a process id"), signal).is_ok()
}
