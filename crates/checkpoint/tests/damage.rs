//! Nothing damaged loads, whatever the damage; the error names file, tensor and bytes; what may pass is no damage.

mod fixture;

use std::fs;
use std::path::Path;

use fixture::*;
use fsdp_checkpoint::CheckpointError;
use fsdp_checkpoint::faults::damage::{Damage, KINDS};
use fsdp_checkpoint::sharded::*;

fn open_error(dir: &Path) -> CheckpointError {
    Checkpoint::open(dir).map(|_| ()).expect_err("a damaged checkpoint opened")
}

#[test]
fn no_damage_of_any_kind_loads_and_each_is_named() {
    let root = tempfile::tempdir().unwrap();
    let other = save(root.path(), 4, 3, &model());
    let dir = save(root.path(), 5, 3, &model());
    let mut random = fastrand::Rng::with_seed(14);
    let num_rounds = 40;
    for round in 0..num_rounds {
        for kind in KINDS {
            let damage = Damage::new(kind, &dir, &other, &mut random).unwrap();
            let error = open_error(&dir);
            assert!(damage.is_named_in(&error.to_string()), "round {round}, {}: not named in: {error}", damage.what);
            let is_refused = matches!(error, CheckpointError::Version { .. } | CheckpointError::Mismatch { .. });
            assert!(error.is_damage() != is_refused, "round {round}, {}: {error}", damage.what);
            damage.undo().unwrap();
        }
    }
    assert_loads_all(&Checkpoint::open(&dir).unwrap(), 5, &model());
    assert_loads_all(&Checkpoint::open(&other).unwrap(), 4, &model());
    println!("{} damages: 0 loaded, all named", num_rounds * KINDS.len());
}

#[test]
fn a_damaged_tensor_is_named_with_its_bytes() {
    let root = tempfile::tempdir().unwrap();
    let dir = save(root.path(), 1, 2, &model());
    let manifest = Checkpoint::open(&dir).unwrap().manifest().clone();
    let chunk = manifest.chunks.iter().find(|chunk| chunk.state == State::ExpAvg && chunk.file == 1).unwrap();
    let path = dir.join(&manifest.files[1].name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[chunk.offset_bytes as usize + 9] ^= 4;
    fs::write(&path, bytes).unwrap();

    let expected = [
        format!("exp_avg of {}, elements {}..{}", chunk.name, chunk.start, chunk.start + chunk.len),
        format!("bytes {}..{}", chunk.offset_bytes, chunk.offset_bytes + 4 * chunk.len as u64),
        manifest.files[1].name.clone(),
    ];
    let loading = Checkpoint::open_unread(&dir).unwrap();
    loading.verify_file(0).unwrap();
    // Damage of after the verification is found where a piece is read as a whole.
    let read = loading.read_f32(State::ExpAvg, &chunk.name, chunk.start, &mut vec![0.0; chunk.len]);
    for error in [open_error(&dir), loading.verify_files([1, 0]).unwrap_err(), read.unwrap_err()] {
        assert!(error.is_damage(), "{error}");
        for part in &expected {
            assert!(error.to_string().contains(part), "{part:?} not in {error}");
        }
    }
    let message = Checkpoint::attach(&dir, "save-2").unwrap_err().to_string();
    assert!(message.contains("save-1") && message.contains("save-2"), "{message}");
}

#[test]
fn what_may_pass_or_is_whole_is_no_damage() {
    let root = tempfile::tempdir().unwrap();
    let older = save(root.path(), 1, 2, &model());
    let dir = save(root.path(), 2, 2, &model());
    let shard = dir.join("rank-00000-of-00002.safetensors");
    let manifest = dir.join("manifest.json");
    let (shard_bytes, manifest_bytes) = (fs::read(&shard).unwrap(), fs::read(&manifest).unwrap());

    // A link to itself gives ELOOP, for root too.
    fs::remove_file(&shard).unwrap();
    std::os::unix::fs::symlink(&shard, &shard).unwrap();
    let error = newest_valid(root.path()).unwrap_err();
    assert!(matches!(&error, CheckpointError::Io { path, .. } if *path == shard), "{error}");
    assert!(!error.is_damage() && !error.is_missing(), "{error}");
    fs::remove_file(&shard).unwrap();

    // A committed checkpoint without one of its files is damaged, one that is not there at all is not.
    for path in [&shard, &manifest] {
        let _ = fs::remove_file(path);
        let found = newest_valid(root.path()).unwrap();
        assert_eq!(found.checkpoint.unwrap().dir(), older);
        let reason = &found.skipped[0].reason;
        assert!(matches!(reason, CheckpointError::Missing { path: missing } if missing == path), "{reason}");
        assert!(reason.is_damage() && reason.is_missing());
        fs::write(path, if *path == shard { &shard_bytes } else { &manifest_bytes }).unwrap();
    }
    let error = open_error(&root.path().join("step-00000003"));
    assert!(!error.is_damage() && error.is_missing(), "{error}");

    // A newer program's checkpoint is neither skipped nor set aside.
    let text = String::from_utf8(manifest_bytes).unwrap();
    let mut newer = Manifest::parse(&text, &manifest).unwrap();
    newer.format_version = 7;
    fs::write(&manifest, newer.to_sealed_text()).unwrap();
    let error = newest_valid(root.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::Version { got: 7, supported: 1, .. }), "{error}");
    assert!(!error.is_damage() && error.to_string().contains("version 7, but this program reads version 1"));
}
