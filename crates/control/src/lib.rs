//! Control plane of a run: what the launcher and its ranks tell each other outside of the tensors. No libtorch.
//!
//! The two ends of each channel are in one module, so that a name, a layout or a number exists once.
//!
//! - [`mod@env`]: the variables that the launcher sets and a worker reads.
//! - [`exit`]: the exit statuses of every program of a run.
//! - [`store`]: key-value store over TCP for rendezvous (server and client).
//! - [`lifeline`]: ranks die with their launcher; process groups and inherited descriptors.
//! - [`progress`]: counters in shared memory, from which the launcher sees where each rank is.
//! - [`stop`]: signals that ask a rank to stop set a flag.
//! - [`error_file`]: a failed rank's record of why it failed.
//! - [`memory`]: anonymous shared memory (`memfd`), which also carries the `shm` process group.
//!
//! Nothing here prints, and nothing here knows what a tensor or a training step is.

pub mod env;
pub mod error_file;
pub mod exit;
pub mod lifeline;
pub mod memory;
pub mod progress;
pub mod stop;
pub mod store;

mod error;

pub use error::ControlError;
pub use exit::ExitStatus;

/// This machine's name as the kernel has it, for messages.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
