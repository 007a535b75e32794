//! Faults for tests: what a save must survive, and damage that must not load.
//!
//! | module | what it is |
//! |---|---|
//! | [`crash_fs`] | a file system in memory that knows what a power loss may leave of it |
//! | [`power_loss`] | crashes at every operation of a run that saves, and of one that exports |
//! | [`failing_fs`] | a file system of which one call fails |
//! | [`damage`] | flips, cuts, swaps and edits the files of a checkpoint |
//! | [`sample`] | small checkpoints whose every value follows from step, state, tensor and element |

pub mod crash_fs;
pub mod damage;
pub mod failing_fs;
pub mod power_loss;
pub mod sample;
