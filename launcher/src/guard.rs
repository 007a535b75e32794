//! A process that outlives a killed launcher for a moment, and ends what that could not: ranks die with their launcher, but
//! not what ranks have started.
//!
//! All that ranks start inherits a variable with the launcher's name, and by that it is found, whatever group or parent it
//! has by then.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fsdp_control::lifeline::{self, Lifeline};
use fsdp_control::stop::StopFlag;
use fsdp_control::{ControlError, ExitStatus};
use rustix::process::{Pid, Signal};

use crate::failure::Failure;
use crate::processes;

/// The first argument of a guard; the second is the launcher's name.
pub const ARGUMENT: &str = "__guard";

/// The variable by which processes of a launcher are known.
const VARIABLE: &str = "FSDP_LAUNCHER";

/// How long the kernel has to end them.
const PATIENCE: Duration = Duration::from_secs(5);

const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A launcher's guard. Dropping it has it do its work, should anything be left, and waits for its end.
#[derive(Debug)]
pub struct Guard {
    name: String,
    child: Child,
    /// `None` once it is dropped.
    lifeline: Option<Lifeline>,
}

impl Guard {
    /// # Errors
    /// No process can be started.
    pub fn start() -> Result<Self, Failure> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("{}-{}", std::process::id(), since_epoch.as_nanos());
        let lifeline = Lifeline::new().map_err(Failure::failed)?;
        let failed = |error: &dyn fmt::Display| Failure::failed(format!("cannot start the guard process: {error}"));
        let until = lifeline.try_clone_read_end().map_err(|error: ControlError| failed(&error))?;
        // Not by its path, under which there may be another version by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("fsdp-launch").arg(ARGUMENT).arg(&name);
        command.stdin(until).stdout(Stdio::null()).stderr(Stdio::null());
        lifeline::prepare_guard(&mut command);
        let child = command.spawn().map_err(|error| failed(&error))?;
        Ok(Self { name, child, lifeline: Some(lifeline) })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What ranks have to have in their environment.
    pub fn variable(&self) -> (String, String) {
        (VARIABLE.to_owned(), self.name.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lifeline = None;
        processes::signal(self.pid(), Signal::CONT);
        let _ = self.child.wait();
    }
}

/// What the guard process does: waits for the launcher's end, then ends all that is left of it.
pub fn watch(name: &str) -> ExitStatus {
    // Signals that a scheduler sends to all processes are not for this one.
    if StopFlag::install().is_err() {
        return ExitStatus::Failed;
    }
    // Nothing comes but the end.
    let mut byte = [0];
    while matches!(io::stdin().read(&mut byte), Err(error) if error.kind() == io::ErrorKind::Interrupted) {}
    let entry = format!("{VARIABLE}={name}");
    let start = Instant::now();
    loop {
        let left = with_variable(entry.as_bytes());
        if left.is_empty() || start.elapsed() > PATIENCE {
            return ExitStatus::Done;
        }
        for pid in left {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Processes of this user that have `entry` in their environment.
fn with_variable(entry: &[u8]) -> Vec<Pid> {
    let has_it = |pid: &Pid| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == entry)
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|process| Pid::from_raw(process.file_name().to_str()?.parse().ok()?));
    pids.filter(has_it).collect()
}
