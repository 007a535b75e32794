//! What a run leaves: `summary.json`, complete error records, and nothing that a full disk or the OOM killer can hide.

mod job;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use job::{Job, end, named, send};
use rustix::process::Signal;

#[test]
fn every_end_of_a_run_has_its_summary() {
    for (script, args, status, cause, meaning) in [
        ("", &[][..], 0, None, "done"),
        ("1 3 fail=2", &[], 2, Some("bad_input"), "correct it"),
        ("1 3 fail=93", &[], 93, Some("non_finite"), "do not run again"),
        ("1 3 signal=9", &[], 1, Some("signal"), "no checkpoint"),
        ("1 5 signal=9", &["--set", "checkpoint.every_steps=2"], 75, Some("signal"), "run the same command again"),
        ("1 3 exit=7", &[], 1, Some("exit"), "no checkpoint"),
        ("1 3 hang", &["--set", "fsdp.timeout_secs=1"], 1, Some("hang"), "no checkpoint"),
    ] {
        let job = Job::new(8);
        let ended = job.run(2, script, args);
        let summary = job.summary();
        assert_eq!((ended.status, &summary["status"]), (status, &status.into()), "{script}: {ended:?}");
        assert!(summary["status_meaning"].as_str().unwrap().contains(meaning), "{summary:#}");
        assert_eq!((&summary["schema"], &summary["world_size"]), (&1.into(), &2.into()));
        assert_eq!(summary["nodes"][0]["host"], fsdp_control::host_name());
        assert!(summary["started"].as_str() <= summary["ended"].as_str(), "{summary:#}");
        let attempt = &summary["attempts"][0];
        match cause {
            None => assert!(attempt["cause"].is_null() && attempt["what"].is_null(), "{summary:#}"),
            // The scripted worker calls whatever it says non-finite.
            Some(kind) => {
                let record = &attempt["cause"];
                let kind = if script.contains("fail") { "non_finite" } else { kind };
                assert_eq!((&record["kind"], &record["rank"]), (&kind.into(), &1.into()), "{summary:#}");
                let step: u64 = script.split(' ').nth(1).unwrap().parse().unwrap();
                assert_eq!(record["step"], step, "{summary:#}");
                assert_eq!(record["run_id"], summary["run_id"]);
                assert_eq!(record["phase"], "forward_backward", "{summary:#}");
                // The same in the rank's own file.
                let file: serde_json::Value = serde_json::from_str(&job.read("out/logs/error-rank-1.json")).unwrap();
                assert_eq!(
                    (&file["pid"], &file["kind"], &file["phase"]),
                    (&record["pid"], &record["kind"], &record["phase"])
                );
            }
        }
        let checkpoint = summary["checkpoint"]["path"].as_str();
        assert_eq!(checkpoint, (status == 75).then_some("out/checkpoints/step-00000004"));
        let last = ended.stderr.lines().last().and_then(|line| line.strip_prefix("fsdp-launch: "));
        match status {
            0 => assert!(summary["hint"].is_null(), "{summary:#}"),
            1 | 75 => assert_eq!(summary["hint"].as_str(), last, "{summary:#}"),
            _ => assert!(summary["hint"].as_str().unwrap().contains(meaning), "{summary:#}"),
        }
        let left: Vec<_> =
            std::fs::read_dir(job.path("out/logs")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains("tmp")), "{left:?}");
    }
}

#[test]
fn a_stop_and_a_killed_launcher_have_a_summary_too() {
    let job = Job::new(1_000_000);
    let mut child = job.start(2, "", &[]);
    job.wait_for_ranks(2);
    child.kill().unwrap();
    child.wait().unwrap();
    let summary = job.summary();
    assert!(summary["status"].is_null() && summary["ended"].is_null(), "{summary:#}");
    job.assert_no_survivors(Duration::from_secs(2));

    let job = Job::new(1_000_000);
    let child = job.start(2, "", &[]);
    job.wait_for_ranks(2);
    send(child.id(), Signal::TERM);
    assert_eq!(end(child).status, 75);
    let summary = job.summary();
    assert_eq!((&summary["status"], &summary["attempts"][0]["decision"]), (&75.into(), &"end".into()), "{summary:#}");
    assert!(summary["attempts"][0]["cause"].is_null(), "{summary:#}");
}

/// A control group for memory of version 1, below that of this process. Removed on drop.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(limit_bytes: u64) -> Result<Self, String> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = groups.lines().find_map(|line| line.split_once(":memory:")).ok_or("no control group of version 1")?;
        let name = format!("fsdp-test-{}", std::process::id());
        let group = Path::new("/sys/fs/cgroup/memory").join(own.1.trim_start_matches('/')).join(name);
        std::fs::create_dir(&group).map_err(|error| format!("{}: {error}", group.display()))?;
        let group = Self(group);
        for file in ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] {
            let path = group.0.join(file);
            if let Err(error) = std::fs::write(&path, limit_bytes.to_string())
                && path.exists()
            {
                return Err(format!("{}: {error}", path.display()));
            }
        }
        Ok(group)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_rank_that_the_oom_killer_takes_is_named_with_its_memory() {
    let group = match MemoryGroup::new(96 << 20) {
        Ok(group) => group,
        Err(reason) => return println!("skipped: no memory limit can be set here: {reason}"),
    };
    for _ in 0..2 {
        let job = Job::new(1000);
        let mut shell = Command::new("sh");
        let script = format!("echo $$ >{}/cgroup.procs; exec bin/fsdp-launch --nproc 2 job.toml", group.0.display());
        shell.args(["-c", &script]).current_dir(job.dir.path()).env("WORKER_SCRIPT", "1 3 mib=500");
        shell.env("CUDA_VISIBLE_DEVICES", "").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = end(shell.spawn().unwrap());
        assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
        let line = ended.stderr.lines().next().unwrap();
        for part in
            [") was killed by the OOM killer (RSS ", " MiB of limit 96.0 MiB) at step 3; lower [training] micro"]
        {
            assert!(line.contains(part), "{part} is not in {ended:?}");
        }
        let record = &job.summary()["attempts"][0]["cause"];
        assert_eq!((&record["kind"], &record["signal"]), (&"out_of_memory".into(), &9.into()), "{record:#}");
        let rss_bytes = record["peak_rss_bytes"].as_u64().unwrap();
        assert!((40 << 20..100 << 20).contains(&rss_bytes), "{record:#}");
        job.assert_no_survivors(Duration::ZERO);
    }
    // A kill by somebody is none by the system, in the same group.
    let job = Job::new(1000);
    let ended = job.run(2, "1 3 signal=9", &[]);
    assert!(ended.stderr.contains("was killed by SIGKILL at step 3"), "{ended:?}");
}

/// A small file system in memory. Unmounted on drop.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn logs_on_a_full_disk_do_not_end_the_run() {
    let job = Job::new(20);
    let logs = job.path("out/logs");
    std::fs::create_dir_all(&logs).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k", "none"]).arg(&logs).output().unwrap();
    if !mounted.status.success() {
        return println!("skipped: no mounts here: {}", String::from_utf8_lossy(&mounted.stderr).trim());
    }
    let _mount = Mount(logs.clone());
    // Twice: the second finds no room at all.
    for script in ["* 3 spew=2000", "1 3 spew=20;0 4 print=words"] {
        let ended = job.run(2, script, &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        let warning = "fsdp-launch: warning: cannot write out/logs/summary.json: No space left on device";
        assert!(ended.stderr.contains(warning), "{ended:?}");
    }
    let ended = job.run(2, "1 3 signal=9", &[]);
    assert_eq!((ended.status, named(&ended.stderr)), (1, vec!["1".to_owned()]), "{ended:?}");
    assert_eq!(job.run(2, "", &["--max-restarts", "1"]).status, 0);
}
