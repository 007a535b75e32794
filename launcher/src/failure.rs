//! An exit status with its message.

use std::fmt::Display;
use std::path::Path;

use fsdp_control::ExitStatus;

use crate::folder::newest_checkpoint;

/// Why the launcher itself gives up, before or without any rank's own failure.
#[derive(Debug, Clone)]
pub struct Failure {
    pub status: ExitStatus,
    /// Complete: place, expected, got, what to do.
    pub message: String,
    /// It has been printed.
    pub is_said: bool,
}

impl Failure {
    /// The config or an input is wrong.
    pub fn bad_input(message: impl Display) -> Self {
        Self::new(ExitStatus::BadInput, message)
    }

    /// Somebody asked for it.
    pub fn stopped(message: impl Display) -> Self {
        Self::new(ExitStatus::Stopped, message)
    }

    /// The machine or this program is at fault.
    pub fn failed(message: impl Display) -> Self {
        Self::new(ExitStatus::Failed, message)
    }

    /// Running again would fail again.
    pub fn do_not_rerun(message: impl Display) -> Self {
        Self::new(ExitStatus::DoNotRerun, message)
    }

    fn new(status: ExitStatus, message: impl Display) -> Self {
        Self { status, message: message.to_string(), is_said: false }
    }

    /// The same failure of a run in the output folder `dir`: where a checkpoint is committed, the run can go on from it.
    pub fn with_checkpoint(&self, dir: &Path) -> Self {
        match newest_checkpoint(dir) {
            Ok(Some(committed)) if self.status == ExitStatus::Failed => Self {
                status: ExitStatus::Stopped,
                message: format!(
                    "{}\nfsdp-launch: {} is committed; continue from it once this is put right",
                    self.message,
                    committed.path.display()
                ),
                is_said: self.is_said,
            },
            _ => self.clone(),
        }
    }

    /// Prints it, once.
    pub fn say(&mut self) {
        if !self.is_said {
            crate::say(&format!("fsdp-launch: {}", self.message));
            self.is_said = true;
        }
    }
}
