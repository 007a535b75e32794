//! Runs of which one rank is under `strace`, which notes its calls, kills it at one of them, or has one fail.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use fsdp_tests_behaviour::job::Job;

/// What a save calls; `?` because not every processor has all of them.
pub const CALLS: &str = "?write,?pwrite64,?fsync,?fdatasync,?rename,?renameat,?renameat2,?mkdir,?mkdirat,?unlink,\
                         ?unlinkat,?rmdir,?fallocate,?ftruncate,?openat";

/// One call of the traced rank, as it was entered.
#[derive(Debug, Clone)]
pub struct Call {
    pub name: String,
    /// The how many-th of this name on its thread, from 1: what `when=` counts.
    pub ordinal: usize,
    /// No thread had as many calls of this name before, so that an injection hits this one.
    pub is_first: bool,
    /// The line of the trace, with the paths of file descriptors.
    pub line: String,
}

impl Call {
    /// What `-e inject=` takes for this call.
    pub fn inject(&self, what: &str) -> String {
        format!("{}:{what}:when={}", self.name, self.ordinal)
    }
}

/// Why there is no `strace` that can follow a process here; `None` if there is one.
pub fn is_missing() -> Option<String> {
    match Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("strace: {error}")),
    }
}

/// The launcher for `job`, whose rank `rank` runs under `strace`, with `-e inject=` for each of `injections`. What it traces
/// goes to `trace` in the job's folder.
pub fn command(job: &Job, nproc: usize, args: &[&str], rank: usize, injections: &[String]) -> Command {
    let plain = job.command(nproc, args);
    let launcher = Path::new(plain.get_program());
    // The launcher takes the worker beside itself, which here is a script.
    let folder = job.path("under-strace");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir(&folder).expect("a folder of the test");
    let own = folder.join("fsdp-launch");
    if std::fs::hard_link(launcher, &own).is_err() {
        std::fs::copy(launcher, &own).expect("a copy of the launcher");
    }
    let injections: Vec<String> = injections.iter().map(|inject| format!("-e inject={inject}")).collect();
    // With -D the rank is still the launcher's child, and strace its grandchild.
    let script = format!(
        "#!/bin/sh\n[ \"$RANK\" = {rank} ] && exec strace -D -f -y -o {trace:?} -e 'trace={CALLS}' {inject} \
         {worker:?} \"$@\"\nexec {worker:?} \"$@\"\n",
        trace = job.path("trace"),
        inject = injections.join(" "),
        worker = launcher.with_file_name("fsdp-train"),
    );
    let path = folder.join("fsdp-train");
    std::fs::write(&path, script).expect("a folder of the test");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("a file of the test");
    let mut command = Command::new(own);
    command.args(plain.get_args()).stdin(std::process::Stdio::null());
    if let Some(dir) = plain.get_current_dir() {
        command.current_dir(dir);
    }
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

/// Calls of saves of one rank, spread over all that it makes in a run.
#[derive(Debug)]
pub struct Sampled {
    pub calls: Vec<Call>,
    /// Out of so many that an injection can hit.
    pub num_calls: usize,
}

impl Sampled {
    /// About `n` of the calls that rank `rank` makes on checkpoints in a run of a new job.
    pub fn of_saves(nproc: usize, args: &[&str], rank: usize, n: usize) -> Self {
        let job = Job::new();
        let ended = job.spawn(command(&job, nproc, args, rank, &[])).wait();
        assert_eq!(ended.status, 0, "{ended:?}");
        let mut all = calls(&job.read("trace"));
        all.retain(|call| call.is_first && call.line.contains("/out/checkpoints"));
        assert!(!all.is_empty(), "rank {rank} saves nothing");
        let num_calls = all.len();
        let every = num_calls.div_ceil(n.clamp(1, num_calls));
        let calls = all.into_iter().skip(fastrand::usize(0..every)).step_by(every).collect();
        Sampled { calls, num_calls }
    }
}

/// The calls in a trace, in the order in which they were entered.
pub fn calls(trace: &str) -> Vec<Call> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut most: BTreeMap<&str, usize> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        // Not `<... write resumed>`, `+++ exited with 0 +++`, `--- SIGTERM ... ---`.
        let Some((name, _)) = rest.split_once('(').filter(|(name, _)| name.bytes().all(|c| c.is_ascii_alphanumeric()))
        else {
            continue;
        };
        let ordinal = counts.entry((thread, name)).or_default();
        *ordinal += 1;
        let most = most.entry(name).or_default();
        let is_first = *ordinal > *most;
        *most = (*most).max(*ordinal);
        calls.push(Call { name: name.to_owned(), ordinal: *ordinal, is_first, line: rest.to_owned() });
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_thread_and_name() {
        let trace = "10 openat(AT_FDCWD</a>, \"/a/b\", O_RDONLY) = 3</a/b>\n\
                     10 write(1<pipe:[5]>, \"x\", 1 <unfinished ...>\n\
                     11 write(3</a/b>, \"y\", 1) = 1\n\
                     10 <... write resumed>) = 1\n\
                     11 write(3</a/b>, \"y\", 1) = -1 ENOSPC (No space left on device) (INJECTED)\n\
                     11 +++ exited with 0 +++\n\
                     10 --- SIGTERM {si_signo=SIGTERM} ---\n";
        let got: Vec<_> = calls(trace).into_iter().map(|call| (call.name, call.ordinal, call.is_first)).collect();
        let call = |name: &str, ordinal, is_first| (name.to_owned(), ordinal, is_first);
        assert_eq!(
            got,
            [call("openat", 1, true), call("write", 1, true), call("write", 1, false), call("write", 2, true)]
        );
    }
}
