//! Ranks that the kernel kills for want of memory.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::processes::workers;

use crate::kills::LONG;
use crate::report::{assert_named, assert_recoverable};
use crate::tally::{Tally, Times};

/// More than the launcher and its ranks need.
const LIMIT_BYTES: u64 = 2 << 30;

/// From the kernel's kill to the launcher's end.
const END: Duration = Duration::from_secs(3);

/// A memory cgroup with a limit. Removed on drop.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Cgroup {
    /// # Errors
    /// What is missing here.
    fn new() -> Result<Self, String> {
        let version_1 = PathBuf::from("/sys/fs/cgroup/memory");
        let (parent, limit) = match version_1.is_dir() {
            true => (version_1, "memory.limit_in_bytes"),
            false => (PathBuf::from("/sys/fs/cgroup"), "memory.max"),
        };
        let dir = parent.join(format!("faultlab-{}-{}", std::process::id(), fastrand::u32(..)));
        std::fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let cgroup = Self(dir);
        let path = cgroup.0.join(limit);
        std::fs::write(&path, LIMIT_BYTES.to_string()).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(cgroup)
    }

    /// `command`, whose program puts itself into the group first.
    fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.args(["-c", r#"echo $$ >"$0" && exec "$@""#]).arg(self.0.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside.current_dir(command.get_current_dir().expect("a job's folder")).stdin(std::process::Stdio::null());
        inside
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last process may have ended just now.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Row 17: one of three ranks takes memory without end, in a cgroup with its launcher, as containers and schedulers have it.
pub fn eaten(tally: &mut Tally, n: usize) {
    let times = Times::default();
    for _ in 0..n {
        let cgroup = match Cgroup::new() {
            Ok(cgroup) => cgroup,
            Err(reason) => return tally.skip(format!("no memory cgroup can be made here: {reason}")),
        };
        let culprit = fastrand::usize(0..3);
        tally.check(format_args!("rank {culprit}"), || {
            let job = Job::new();
            let args = [LONG, &["--set", "checkpoint.every_steps=2"]].concat();
            let fault = format!("rank={culprit},step=100,do=eat;rank=*,step=1,do=slow=5");
            let mut running = job.spawn(cgroup.command(&job.faulty_command(3, &args, &fault)));
            running.wait_for_step(10);
            let pid = workers(&job.resolved_config())[culprit].pid;
            running.wait_until("the kernel's kill", |_| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists());
            let killed = Instant::now();
            let ended = running.wait();
            times.add(killed.elapsed());
            assert_named(
                &ended,
                culprit,
                &[&format!("pid {pid}"), "was killed by the OOM killer (RSS ", " at step 100"],
            );
            assert_recoverable(&job, &ended);
            assert!(killed.elapsed() <= END, "{:?}: {ended:?}", killed.elapsed());
        });
    }
    tally.note(format!("exit {times}"));
}
