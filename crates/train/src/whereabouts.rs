//! What this rank is busy with: for its own error records, also of panics on any thread, and for the launcher.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use fsdp_control::progress::{Phase, ProgressHandle};

static STEP: AtomicU64 = AtomicU64::new(0);
static PHASE: AtomicU32 = AtomicU32::new(Phase::Init as u32);

/// The step that this process is at, from 1; 0 before the first.
pub fn step() -> u64 {
    STEP.load(Relaxed)
}

pub fn phase() -> Phase {
    Phase::from_code(PHASE.load(Relaxed)).unwrap_or_default()
}

/// Tells them.
#[derive(Debug)]
pub struct Whereabouts {
    /// The launcher's view of this rank, where there is a launcher.
    pub launcher: Option<ProgressHandle>,
}

impl Whereabouts {
    pub fn enter(&self, phase: Phase) {
        PHASE.store(phase as u32, Relaxed);
        if let Some(launcher) = &self.launcher {
            launcher.set_phase(phase);
        }
    }

    pub fn enter_step(&self, step: u64, phase: Phase) {
        STEP.store(step, Relaxed);
        if let Some(launcher) = &self.launcher {
            launcher.set_step(step);
        }
        self.enter(phase);
    }

    /// The verdict of an earlier step is read, and what fails fails by that.
    pub fn judge_step(&self, step: u64) {
        STEP.store(step, Relaxed);
    }
}
