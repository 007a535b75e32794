//! Ending processes: ranks with what they started, and orphans.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

/// Sends `signal` to the rank that leads process group `pid` and to what it started.
///
/// The rank must not have been reaped yet: until then nobody else can have its number.
pub fn signal_group(pid: Pid, signal: Signal) {
    // The only error is that nobody is left.
    let _ = rustix::process::kill_process_group(pid, signal);
}

/// Sends `signal` to the child `pid` alone, which must not have been reaped yet.
pub fn signal(pid: Pid, signal: Signal) {
    // The only error is that it has ended.
    let _ = rustix::process::kill_process(pid, signal);
}

/// Asks a process group to stop, also if it is suspended.
pub fn ask_group_to_stop(pid: Pid) {
    signal_group(pid, Signal::TERM);
    signal_group(pid, Signal::CONT);
}

/// The state letter of `/proc/PID/stat`; see `man proc`.
pub fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.trim_start().chars().next()
}

/// Whether a process in that state does nothing until somebody lets it go on: a signal has suspended it, or a debugger.
pub fn is_suspended(state: char) -> bool {
    matches!(state, 'T' | 't')
}

/// This process's children, orphans of its descendants included (see `fsdp_control::lifeline::become_subreaper`).
pub fn children() -> Vec<Pid> {
    let mut pids = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        pids.extend(list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)));
    }
    pids
}

/// Kills and reaps this process's children and, as they come to it, their children, except those in `spare`. Gives up
/// on processes that the kernel holds for longer than `patience`.
pub fn end_orphans(spare: &[Pid], patience: Duration) {
    let deadline = Instant::now() + patience;
    loop {
        let orphans: Vec<Pid> = children().into_iter().filter(|pid| !spare.contains(pid)).collect();
        if orphans.is_empty() || Instant::now() >= deadline {
            return;
        }
        for pid in orphans {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            wait_for_end(pid, deadline);
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

fn wait_for_end(pid: Pid, deadline: Instant) {
    let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let _ = rustix::event::poll(&mut fds, Some(&timespec(left)));
}

/// `duration` as the kernel takes it.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}
