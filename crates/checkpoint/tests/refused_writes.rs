//! Saves that the file system refuses, wherever it does: the error says what was needed, and nothing is lost or left.

mod fixture;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fixture::*;
use fsdp_checkpoint::CheckpointError;
use fsdp_checkpoint::faults::failing_fs::{FailingFs, Manner};
use fsdp_checkpoint::faults::sample;
use fsdp_checkpoint::sharded::*;
use rustix::io::Errno;

/// A tmpfs mounted for one test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(SmallDisk(dir))
    }

    fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.0.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_disk_is_reported_with_needed_and_free_bytes_and_costs_nothing() {
    let Some(disk) = SmallDisk::mount("1200k") else {
        println!("skipped: a tmpfs cannot be mounted here (needs root)");
        return;
    };
    let root: PathBuf = disk.0.path().join("checkpoints");
    let tensors = vec![("w".to_string(), vec![64, 1024])];
    save(&root, 1, 2, &tensors);
    let before = disk.free_bytes();
    save_rank(&root, 2, "full", 0, 2, &tensors);
    let free = disk.free_bytes();
    let shape = &tensors[0].1;
    let chunks: Vec<Chunk> =
        STATES.iter().map(|&state| Chunk { state, name: "w", shape, start: 32 * 1024, len: 32 * 1024 }).collect();
    let error = ShardWriter::create(&root, 2, "full", 1, 2, &chunks).unwrap_err();
    let CheckpointError::NoSpace { path, needed_bytes, free_bytes, error: cause } = &error else { panic!("{error}") };
    assert_eq!(path.file_name().unwrap(), "rank-00001-of-00002.safetensors");
    assert!(*needed_bytes > 3 * 32 * 1024 * 4 && free_bytes.is_some_and(|bytes| 0 < bytes && bytes <= free), "{error}");
    assert_eq!(cause.raw_os_error(), Some(28), "{error}");
    abort(&root, 2, "full").unwrap();
    assert_eq!(disk.free_bytes(), before);
    let found = newest_valid(&root).unwrap();
    assert!(found.skipped.is_empty());
    assert_loads_all(&found.checkpoint.unwrap(), 1, &tensors);

    // The same, known before anything is created.
    let total_bytes = before * 100 / 105 + 100;
    let error = check_space(&root, total_bytes).unwrap_err();
    let CheckpointError::NoSpace { path, needed_bytes, free_bytes, .. } = &error else { panic!("{error}") };
    assert_eq!((path, *free_bytes), (&root, Some(before)));
    assert!(*needed_bytes > before, "{error}");
    assert!(error.to_string().contains("No space left on device"), "{error}");
    check_space(&root, total_bytes - 200).unwrap();
    check_space(&root.join("not/there"), 1000).unwrap();

    // Export: refused before a byte of it is written, nothing left behind.
    fs::write(root.join("config.json"), "{}").unwrap();
    let layout = fsdp_checkpoint::export::ExportLayout::new(
        &[("w".into(), vec![1024, 1024])],
        fsdp_checkpoint::Dtype::F32,
        5 << 30,
    );
    let error = fsdp_checkpoint::export::Export::create(&layout, &disk.0.path().join("hf"), &root).unwrap_err();
    assert!(matches!(error, CheckpointError::NoSpace { needed_bytes, .. } if needed_bytes > 4 << 20), "{error}");
    fs::remove_file(root.join("config.json")).unwrap();
    assert_eq!(disk.free_bytes(), before);
}

/// Names and content of all there is, below a folder.
fn contents(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            all.extend(contents(&path));
            all.push((path, None));
        } else {
            all.push((path.clone(), Some(fs::read(path).unwrap())));
        }
    }
    all.sort();
    all
}

/// A save of step 2 and the deletion of step 1, as a trainer does them.
fn save_and_retain(fs: &FailingFs, root: &Path) -> (Result<PathBuf, CheckpointError>, Result<(), CheckpointError>) {
    let saved = sample::save(fs, root, 2, "id", 2);
    match &saved {
        Ok(_) => (saved, retain_on(fs, root, 1, 0).map(drop)),
        Err(_) => {
            abort_on(fs, root, 2, "id").unwrap();
            (saved, Ok(()))
        }
    }
}

#[test]
fn whichever_call_of_a_save_fails_the_error_tells_of_it_and_nothing_is_lost_or_left() {
    let mut num_failed = 0;
    for errno in [Errno::NOSPC, Errno::DQUOT, Errno::IO] {
        for manner in [Manner::Nothing, Manner::ItsWork] {
            for failing in 0.. {
                let root = tempfile::tempdir().unwrap();
                let root = root.path();
                sample::save(&fsdp_checkpoint::fs::Disk, root, 1, "first", 2).unwrap();
                let before = contents(root);
                let fs = FailingFs::new(failing, errno, manner);
                let (saved, retained) = save_and_retain(&fs, root);
                let Some(failed) = fs.failed() else {
                    saved.unwrap();
                    retained.unwrap();
                    break;
                };
                num_failed += 1;
                let context = format!("{errno}, {manner:?}, call {failing}: {failed}");
                let newest = newest_valid(root).unwrap();
                assert!(newest.skipped.is_empty(), "{context}: {:?}", newest.skipped);
                let step = newest.checkpoint.unwrap().manifest().step;
                sample::check(&root.join(format!("step-{step:08}"))).unwrap_or_else(|e| panic!("{context}: {e}"));
                let error = match (saved, retained) {
                    (Err(error), _) => {
                        // Unless it came after the commit.
                        assert!(step == 2 || contents(root) == before, "{context}: {step}");
                        error
                    }
                    (Ok(_), Err(error)) => {
                        assert_eq!(step, 2, "{context}");
                        retain(root, 1, 0).unwrap();
                        error
                    }
                    // The rename was done, and that was noticed.
                    (Ok(_), Ok(())) => {
                        assert!(failed.starts_with("rename") && manner == Manner::ItsWork, "{context}");
                        continue;
                    }
                };
                sweep(root).unwrap();
                assert!(fs::read_dir(root).unwrap().count() <= 2, "{context}: debris");
                let message = error.to_string();
                let (call, path) = failed.rsplit_once(' ').unwrap();
                let os_error = std::io::Error::from(errno).to_string();
                assert!(message.contains(&os_error) && message.contains(path), "{context}: {message}");
                if ["create", "mkdir", "reserve", "write", "fsync", "rename"].contains(&call) {
                    assert!(message.contains("bytes needed") && message.contains("free"), "{context}: {message}");
                }
                assert!(!error.is_damage(), "{context}: {message}");
            }
        }
    }
    println!("{num_failed} calls failed");
    assert!(num_failed > 200, "{num_failed}");
}
