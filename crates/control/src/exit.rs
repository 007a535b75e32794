//! The exit statuses of every program of a run.

/// How a program of a run ended. The same statuses come from the launcher and from each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The work is done.
    Done = 0,
    /// It failed, and no checkpoint was committed.
    Failed = 1,
    /// The config or an input is wrong: correct it, then run again.
    BadInput = 2,
    /// Stopped, or failed with a committed checkpoint: run the same command again. (75 is `EX_TEMPFAIL`, on which
    /// schedulers can requeue.)
    Stopped = 75,
    /// Running again would fail again (diverged, no progress).
    DoNotRerun = 93,
}

impl ExitStatus {
    /// The number that the process exits with.
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// What it tells whoever sees it.
    pub const fn meaning(self) -> &'static str {
        match self {
            ExitStatus::Done => "done",
            ExitStatus::Failed => "failed; no checkpoint is committed",
            ExitStatus::BadInput => "the config or an input is wrong: correct it, then run again",
            ExitStatus::Stopped => "stopped, or failed with a committed checkpoint: run the same command again",
            ExitStatus::DoNotRerun => "do not run again: it diverged, or starts in a row made no new step",
        }
    }

    /// Ends the process without exit handlers: those of libraries may wait for threads that are stuck, or meet a device
    /// that is being given up. Nothing that is buffered is written.
    pub fn exit_now(self) -> ! {
        // SAFETY: `_exit` has no preconditions.
        unsafe { libc::_exit(self.code()) }
    }

    /// The status behind a process's exit code; `None` for a code that is not ours.
    pub const fn from_code(code: i32) -> Option<ExitStatus> {
        match code {
            0 => Some(ExitStatus::Done),
            1 => Some(ExitStatus::Failed),
            2 => Some(ExitStatus::BadInput),
            75 => Some(ExitStatus::Stopped),
            93 => Some(ExitStatus::DoNotRerun),
            _ => None,
        }
    }
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code() as u8)
    }
}
