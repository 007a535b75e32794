//! Whether the system killed a rank because memory ran out: its counters of such kills, shortly before and after.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Limits above this are none: the kernel's way of saying so is a number of pages near 2^63.
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// How far apart looks are at least. A killed process ends within this time.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// A kill for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OomKill {
    /// The memory that the rank's control group may have; `None`: the machine's own ran out.
    pub limit_bytes: Option<u64>,
}

/// The counters of this process's control group, which ranks are in as well; of the whole system where it has none.
#[derive(Debug)]
pub struct OomWatch {
    counter: Counter,
    /// At the look before the last one, with kills that have been asked for since; `None` where nothing is counted.
    num_known: Option<u64>,
    last_look: (Instant, Option<u64>),
}

#[derive(Debug)]
enum Counter {
    /// The folder of a control group of version 1, and of those in it: their counters stand for themselves.
    V1(PathBuf),
    /// Of version 2, whose counters include the groups in it.
    V2(PathBuf),
    System,
}

impl OomWatch {
    /// Kills from now on count.
    pub fn new() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let counter = find(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        let num_kills = counter.num_kills();
        Self { counter, num_known: num_kills, last_look: (Instant::now(), num_kills) }
    }

    /// Looks now and then: a kill of long ago, of another process, is not to be taken for one that comes now.
    pub fn look(&mut self) {
        let (at, num_kills) = self.last_look;
        if at.elapsed() >= LOOK_EVERY {
            self.num_known = num_kills.max(self.num_known);
            self.last_look = (Instant::now(), self.counter.num_kills());
        }
    }

    /// A kill of late that has not been asked for yet, if there was one: call it for a process that SIGKILL has ended.
    pub fn take_kill(&mut self) -> Option<OomKill> {
        let num_known = self.num_known.as_mut()?;
        if self.counter.num_kills()? <= *num_known {
            return None;
        }
        *num_known += 1;
        Some(OomKill { limit_bytes: self.counter.limit_bytes() })
    }

    /// A process that is killed for memory is counted.
    pub fn counts(&self) -> bool {
        self.num_known.is_some()
    }
}

impl Counter {
    /// `None` where the kernel does not count.
    fn num_kills(&self) -> Option<u64> {
        match self {
            Self::V1(dir) => num_kills_below(dir),
            Self::V2(dir) => value_in(&dir.join("memory.events"), "oom_kill"),
            Self::System => value_in(Path::new("/proc/vmstat"), "oom_kill"),
        }
    }

    fn limit_bytes(&self) -> Option<u64> {
        let limit_bytes = match self {
            Self::V1(dir) => value_in(&dir.join("memory.stat"), "hierarchical_memory_limit").unwrap_or(u64::MAX),
            Self::V2(dir) => {
                let limit = |dir: &Path| std::fs::read_to_string(dir.join("memory.max")).ok()?.trim().parse().ok();
                dir.ancestors().filter_map(limit).min().unwrap_or(u64::MAX)
            }
            Self::System => u64::MAX,
        };
        (1..NO_LIMIT_BYTES).contains(&limit_bytes).then_some(limit_bytes)
    }
}

/// The control group for memory in what `/proc/self/cgroup` and `/proc/self/mountinfo` say.
fn find(groups: &str, mounts: &str) -> Counter {
    for line in groups.lines() {
        let [_, controllers, path] = line.splitn(3, ':').collect::<Vec<_>>()[..] else { continue };
        let is_v1 = controllers.split(',').any(|name| name == "memory");
        if !is_v1 && !controllers.is_empty() {
            continue;
        }
        let Some(dir) = mounts.lines().find_map(|mount| folder(mount, is_v1, path)) else { continue };
        if is_v1 && dir.join("memory.oom_control").exists() {
            return Counter::V1(dir);
        }
        if !is_v1 && dir.join("memory.events").exists() {
            return Counter::V2(dir);
        }
    }
    Counter::System
}

/// Where the mounted file system shows the control group `path`: its fields are "id parent device root mount-point options -
/// type source options".
fn folder(mount: &str, is_v1: bool, path: &str) -> Option<PathBuf> {
    let (left, right) = mount.split_once(" - ")?;
    let (left, right): (Vec<&str>, Vec<&str>) = (left.split(' ').collect(), right.split(' ').collect());
    let ([.., _], [kind, _, options]) = (&left[..], &right[..]) else { return None };
    let fits = match is_v1 {
        true => *kind == "cgroup" && options.split(',').any(|name| name == "memory"),
        false => *kind == "cgroup2",
    };
    // A container may see only its own part.
    let (root, mount_point) = (left.get(3)?, left.get(4)?);
    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(path.trim_start_matches('/')));
    fits.then(|| Path::new(mount_point).join(below))
}

fn num_kills_below(dir: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let own = value_in(&dir.join("memory.oom_control"), "oom_kill")?;
    Some(own + folders.filter_map(|entry| num_kills_below(&entry.path())).sum::<u64>())
}

/// The number after `name` in a file of lines "name number".
fn value_in(path: &Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_control_group_follows_from_its_mount() {
        let v1 = "31 25 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory";
        let of_container = "31 25 0:27 /docker/a /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory";
        let v2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        for (mount, is_v1, path, expected) in [
            (v1, true, "/a/b", Some("/sys/fs/cgroup/memory/a/b")),
            (v1, false, "/a/b", None),
            (of_container, true, "/docker/a/b", Some("/sys/fs/cgroup/memory/b")),
            (v2, false, "/user.slice", Some("/sys/fs/cgroup/user.slice")),
            (v2, false, "/", Some("/sys/fs/cgroup/")),
            (v2, true, "/", None),
            ("nonsense", true, "/", None),
        ] {
            assert_eq!(folder(mount, is_v1, path), expected.map(PathBuf::from), "{mount} {path}");
        }
        assert!(matches!(find("", ""), Counter::System));
    }

    #[test]
    fn kills_are_counted_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("memory.events", "low 0\noom 5\noom_kill 3\noom_group_kill 0\n");
        write("memory.max", "1073741824\n");
        let watch = |known| {
            let counter = Counter::V2(dir.path().to_owned());
            OomWatch { counter, num_known: Some(known), last_look: (Instant::now(), Some(known)) }
        };
        let look_later = |watch: &mut OomWatch| {
            watch.last_look.0 -= LOOK_EVERY;
            watch.look();
        };
        let mut watch = watch(3);
        assert_eq!(watch.take_kill(), None);
        write("memory.events", "oom 9\noom_kill 5\n");
        for _ in 0..2 {
            assert_eq!(watch.take_kill(), Some(OomKill { limit_bytes: Some(1 << 30) }));
        }
        assert_eq!(watch.take_kill(), None);
        // The last look is too fresh to tell an old kill from one whose process has just not ended yet.
        write("memory.events", "oom_kill 6\n");
        (0..2).for_each(|_| watch.look());
        look_later(&mut watch);
        assert!(watch.take_kill().is_some());
        write("memory.events", "oom_kill 7\n");
        (0..2).for_each(|_| look_later(&mut watch));
        assert_eq!(watch.take_kill(), None);
        write("memory.events", "oom_kill 8\n");
        assert!(watch.take_kill().is_some() && watch.counts());
        // Version 1: a group counts for itself, and so its groups are asked too.
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
        std::fs::write(inner.join("memory.oom_control"), "oom_kill 2\n").unwrap();
        write("memory.stat", "cache 1\nhierarchical_memory_limit 9223372036854771712\n");
        let v1 = Counter::V1(dir.path().to_owned());
        assert_eq!((v1.num_kills(), v1.limit_bytes()), (Some(3), None));
        assert_eq!(Counter::V1(dir.path().join("none")).num_kills(), None);
    }
}
