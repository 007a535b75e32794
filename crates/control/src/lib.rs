//! Control plane of a run: what the launcher and its ranks tell each other outside of the tensors. No libtorch.
//!
//! The two ends of each channel are in one module, so that a name, a layout or a number exists once.
//!
//! - [`mod@env`]: a rank's place in the run, from our launcher's variables, MPI's or SLURM's.
//! - [`exit`]: the exit statuses of every program of a run.
//! - [`store`]: key-value store over TCP for rendezvous (server and client).
//! - [`child`]: the end of a child process.
//! - [`lifeline`]: ranks die with their launcher, or with each other; process groups and inherited descriptors.
//! - [`lock`]: one run at a time has an output folder.
//! - [`ports`]: who has a port.
//! - [`progress`]: counters in shared memory, from which the launcher sees where each rank is.
//! - [`restarts`]: how many starts of a run in a row led nowhere.
//! - [`slurm`]: what SLURM tells a task of a job step; node lists.
//! - [`stop`]: signals that ask a rank to stop set a flag.
//! - [`error_file`]: a failed rank's record of why it failed.
//! - [`failures`]: the failures of a run in order, for ranks that no launcher watches.
//! - [`memory`]: anonymous shared memory (`memfd`), which also carries the `shm` process group.
//!
//! Nothing here prints (but [`lock`], where a file system has no locks), and nothing here knows what a tensor or a training step is.

pub mod child;
pub mod env;
pub mod error_file;
pub mod exit;
pub mod failures;
pub mod lifeline;
pub mod lock;
pub mod memory;
pub mod ports;
pub mod progress;
pub mod restarts;
pub mod slurm;
pub mod stop;
pub mod store;

mod error;

pub use error::ControlError;
pub use exit::ExitStatus;

/// This machine's name as the kernel has it, for messages.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Equal for processes that can see each other in `/proc`, and so share memory: the kernel's boot and the namespace of
/// process ids.
pub fn machine_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("boot {}, {}", boot.trim(), namespace.display())
}
