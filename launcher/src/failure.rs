//! An exit status with its message.

use std::fmt::Display;

use fsdp_control::ExitStatus;

/// Why the launcher itself gives up, before or without any rank's own failure.
#[derive(Debug)]
pub struct Failure {
    pub status: ExitStatus,
    /// Complete: place, expected, got, what to do.
    pub message: String,
}

impl Failure {
    /// The config or an input is wrong.
    pub fn bad_input(message: impl Display) -> Self {
        Self { status: ExitStatus::BadInput, message: message.to_string() }
    }

    /// Somebody asked for it.
    pub fn stopped(message: impl Display) -> Self {
        Self { status: ExitStatus::Stopped, message: message.to_string() }
    }

    /// The machine or this program is at fault.
    pub fn failed(message: impl Display) -> Self {
        Self { status: ExitStatus::Failed, message: message.to_string() }
    }
}
