//! Ranks under MPI, on the CPU, on any number of hosts. A cargo feature (`mpi`), because building it needs an MPI
//! library; without it a group cannot be made and says so.

#[cfg(not(feature = "mpi"))]
mod disabled;
#[cfg(feature = "mpi")]
mod enabled;

#[cfg(not(feature = "mpi"))]
pub use disabled::{MpiGatherBuffer, MpiGroup, MpiReduceBuffer, abort_job};
#[cfg(feature = "mpi")]
pub use enabled::{MpiGatherBuffer, MpiGroup, MpiReduceBuffer, abort_job};
