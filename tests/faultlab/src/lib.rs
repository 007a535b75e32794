//! The fault laboratory: for each row of the board of faults, real runs with that fault, and how many of them went as they
//! must.
//!
//! - [`tally`]: counts what went well, and prints what did not.
//! - [`rows`]: the board; a module for each group of rows.
//! - `report`: what a launcher said of a run, and what must hold after each.
//! - `saves`: saves that are killed, or that lose power.
//! - `refused_writes`: saves that the file system refuses.
//! - `corrupt`: checkpoints that were damaged; `mismatches`: whole ones of another job; `formats`: those of other versions.
//! - `resume`: runs that go on, also on another number of ranks.
//! - `non_finite`: numbers that are not finite.
//! - `soak`: one fault after another.
//! - `strace`: runs of which one rank is under `strace`.
//! - `kills`: ranks that are killed, alone or amid victims, and launchers that are.
//! - `crashes`: ranks that crash, by a signal, a panic, or with a status of their own.
//! - `hangs`: ranks that do not come to a collective, or come to another one.
//! - `stragglers`: ranks that are slower than the others.
//! - `stops`: signals that ask a run to stop.
//! - `nodes`: nodes that are lost, do not come, or differ; `namespaces`: two hosts on one machine.
//! - `memory`: ranks that the kernel kills for want of memory.
//! - `configs`: configs that are wrong.
//! - `hostile`: model files, tokenizers and data that are made to break what reads them.
//! - `outputs`: readers that are gone, and no room for logs; `tmpfs`: small disks.
//! - `slurm`: what SLURM does to jobs.

#![forbid(unsafe_code)]

pub mod rows;
pub mod tally;

mod configs;
mod corrupt;
mod crashes;
mod formats;
mod hangs;
mod hostile;
mod kills;
mod memory;
mod mismatches;
mod namespaces;
mod nodes;
mod non_finite;
mod outputs;
mod refused_writes;
mod report;
mod resume;
mod saves;
mod slurm;
mod soak;
mod stops;
mod strace;
mod stragglers;
mod tmpfs;
