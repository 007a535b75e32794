//! Which checkpoints are found, kept, deleted and set aside.

mod fixture;

use std::collections::HashSet;
use std::fs;

use fixture::*;
use fsdp_checkpoint::sharded::*;

#[test]
fn the_newest_valid_is_found_and_the_damaged_one_can_be_set_aside_and_saved_again() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("checkpoints");
    assert!(newest_valid(&root).unwrap().checkpoint.is_none() && sweep(&root).unwrap().is_empty());
    for step in [2, 10, 100_000_000] {
        save(&root, step, 2, &model());
    }
    save_rank(&root, 200_000_000, "unfinished", 0, 2, &model());
    let newest = list(&root).unwrap().pop().unwrap();
    assert_eq!(newest, (100_000_000, root.join("step-100000000")));
    fs::write(newest.1.join("rank-00000-of-00002.safetensors"), "x").unwrap();

    let found = newest_valid(&root).unwrap();
    assert_loads_all(&found.checkpoint.unwrap(), 10, &model());
    let [skipped] = &found.skipped[..] else { panic!("{:?}", found.skipped) };
    assert_eq!((skipped.step, skipped.path.clone()), newest);
    assert!(skipped.reason.to_string().contains("rank-00000-of-00002.safetensors has 1 bytes"));

    assert_eq!(set_aside(&newest.1).unwrap(), root.join("step-100000000.damaged-1"));
    save(&root, 100_000_000, 2, &model());
    assert_eq!(set_aside(&newest.1).unwrap(), root.join("step-100000000.damaged-2"));
    assert_eq!(sweep(&root).unwrap(), [root.join("step-200000000.tmp-unfinished")]);
    let steps: Vec<u64> = list(&root).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [2, 10]);
}

#[test]
fn only_the_newest_are_kept_and_foreign_files_are_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let foreign = ["step-1", "step-00000001.txt", "notes.tmp-x", "step-x.tmp-y", ".trash-notes"];
    for name in foreign {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    // A deletion that was interrupted, of a step that was saved again since.
    fs::create_dir_all(root.path().join(".trash-step-00000001/part")).unwrap();
    fs::write(root.path().join(".trash-step-00000001/part/file"), "x").unwrap();
    for step in 1..=4 {
        save(root.path(), step, 1, &model());
    }
    let deleted = retain(root.path(), 2, 0).unwrap();
    assert_eq!(deleted, [root.path().join("step-00000001"), root.path().join("step-00000002")]);
    assert!(retain(root.path(), 2, 0).unwrap().is_empty());
    assert!(sweep(root.path()).unwrap().is_empty());
    let left: HashSet<String> =
        fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let expected = foreign.iter().copied().chain(["step-00000003", "step-00000004"]);
    assert_eq!(left, expected.map(String::from).collect());
}

#[test]
fn the_newest_stay_and_besides_them_those_of_every_so_many_steps() {
    // Steps that are there, keep, keep_every, steps that stay.
    let cases: [(&[u64], usize, u64, &[u64]); 7] = [
        (&[1, 2, 3], 2, 0, &[2, 3]),
        (&[1, 2], 2, 0, &[1, 2]),
        (&[10, 20, 30, 40, 50], 2, 20, &[20, 40, 50]),
        (&[10, 20, 30, 40, 50, 60], 2, 20, &[20, 40, 50, 60]),
        (&[10, 20, 30], 1, 100, &[30]),
        (&[0, 1, 2, 3], 1, 7, &[0, 3]),
        (&[1, 2, 3], 1, 1, &[1, 2, 3]),
    ];
    for (steps, keep, keep_every, expected) in cases {
        let root = tempfile::tempdir().unwrap();
        for &step in steps {
            save(root.path(), step, 1, &[("w".into(), vec![2])]);
        }
        retain(root.path(), keep, keep_every).unwrap();
        let left: Vec<u64> = list(root.path()).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(left, expected, "{steps:?}, keep {keep}, keep_every {keep_every}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), expected.len());
    }
}
