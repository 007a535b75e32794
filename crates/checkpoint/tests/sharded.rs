//! Checkpoints: any world size loads any other's, nothing damaged loads, nothing whole is lost.

mod fixture;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fixture::*;
use fsdp_checkpoint::CheckpointError;
use fsdp_checkpoint::sharded::*;
use proptest::prelude::*;

fn open_error(dir: &Path) -> String {
    Checkpoint::open(dir).map(|_| ()).expect_err("a damaged checkpoint opened").to_string()
}

/// Loads everything as `world_size` ranks would and compares each element.
fn assert_loads(checkpoint: &Checkpoint, step: u64, world_size: usize, tensors: &[Named]) {
    assert_eq!(checkpoint.manifest().step, step);
    assert_eq!(checkpoint.manifest().meta, meta(step));
    for rank in 0..world_size {
        for state in STATES {
            checkpoint.expect(state, tensors).unwrap();
            for (tensor, start, len) in shard(tensors, rank, world_size) {
                let mut out = vec![f32::NAN; len];
                checkpoint.read_f32(state, &tensors[tensor].0, start, &mut out).unwrap();
                for (i, got) in out.into_iter().enumerate() {
                    assert_eq!(got, saved_value(step, state, tensor, start + i));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_world_size_loads_what_any_other_saved(
        shapes in prop::collection::vec(prop::collection::vec(1usize..40, 1..3), 1..6),
        saved_by in 1usize..6,
        loaded_by in 1usize..6,
    ) {
        let tensors: Vec<Named> = shapes.into_iter().enumerate().map(|(i, shape)| (format!("t{i}"), shape)).collect();
        let root = tempfile::tempdir().unwrap();
        let dir = save(root.path(), 7, saved_by, &tensors);
        assert_loads(&Checkpoint::open(&dir).unwrap(), 7, loaded_by, &tensors);
        assert_loads(&Checkpoint::attach(&dir, "save-7").unwrap(), 7, loaded_by, &tensors);
    }
}

#[test]
fn a_shard_is_a_safetensors_file_and_the_manifest_counts_what_is_not_finite() {
    let root = tempfile::tempdir().unwrap();
    let shape = [3, 100_000];
    let chunks: Vec<Chunk> =
        STATES.iter().map(|&state| Chunk { state, name: "w", shape: &shape, start: 0, len: 300_000 }).collect();
    let mut writer = ShardWriter::create(root.path(), 1, "id", 0, 1, &chunks).unwrap();
    let mut data = vec![1.5f32; 900_000];
    (data[5], data[700_000]) = (f32::NAN, f32::INFINITY);
    writer.write_f32(&data).unwrap();
    let report = writer.finish().unwrap();
    // Reports travel as JSON.
    let report: ShardReport = serde_json::from_slice(&serde_json::to_vec(&report).unwrap()).unwrap();
    let dir = commit(root.path(), 1, "id", &[report], meta(1)).unwrap();

    let bytes = fs::read(dir.join("rank-00000-of-00001.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        file.tensor("exp_avg:w[0..300000]").unwrap().data(),
        bytes_of(safetensors::Dtype::F32, &data[300_000..600_000])
    );
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.manifest().files[0].num_nonfinite, 2);
    let mut out = vec![0.0; 2];
    checkpoint.read_f32(State::Param, "w", 4, &mut out).unwrap();
    assert!(out[0] == 1.5 && out[1].is_nan());
}

#[test]
fn no_mutation_of_any_file_loads_and_each_is_named() {
    let root = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let older = save(other.path(), 4, 2, &model());
    let dir = save(root.path(), 5, 2, &model());
    let names = ["manifest.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    let mut random = Random(0x5eed);
    let num_mutations = 300;
    for round in 0..num_mutations {
        let name = names[round % 3];
        let path = dir.join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = random.below(good.len());
        match (round / 3) % 8 {
            0 => bad.truncate(at),
            1 => bad.extend([0, 1, 2]),
            2 => bad = fs::read(older.join(name)).unwrap(),
            3 => bad = fs::read(dir.join(names[(round + 1) % 3])).unwrap(),
            4 => {
                bad.remove(at);
            }
            5 => bad[at..].fill(0),
            _ => bad[at] ^= 1 << random.below(8),
        }
        if bad == good {
            bad[at] ^= 1;
        }
        fs::write(&path, &bad).unwrap();
        let message = open_error(&dir);
        assert!(message.contains(name), "round {round}, {name} is not named in: {message}");
        let found = newest_valid(root.path()).unwrap();
        assert!(found.checkpoint.is_none() && found.skipped.len() == 1);
        fs::write(&path, &good).unwrap();
    }
    for name in names {
        let hidden = root.path().join("hidden");
        fs::rename(dir.join(name), &hidden).unwrap();
        assert!(open_error(&dir).contains(name));
        fs::rename(&hidden, dir.join(name)).unwrap();
    }
    let (a, b) = (dir.join(names[1]), dir.join(names[2]));
    let (content_a, content_b) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
    fs::write(&a, &content_b).unwrap();
    fs::write(&b, &content_a).unwrap();
    assert!(open_error(&dir).contains(names[1]));
    fs::write(&a, &content_a).unwrap();
    fs::write(&b, &content_b).unwrap();
    assert_loads(&Checkpoint::open(&dir).unwrap(), 5, 2, &model());
    println!("{num_mutations} mutations: 0 loaded, all named");
}

#[test]
fn a_damaged_tensor_is_named_with_its_bytes_also_by_a_rank_that_only_attached() {
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
    let attached = Checkpoint::attach(&dir, "save-1").unwrap();
    // Also when the damaged element itself is not asked for.
    let read = attached.read_f32(State::ExpAvg, &chunk.name, chunk.start, &mut [0.0]);
    for message in [open_error(&dir), read.unwrap_err().to_string()] {
        for part in &expected {
            assert!(message.contains(part), "{part:?} not in {message}");
        }
    }
    let message = Checkpoint::attach(&dir, "save-2").unwrap_err().to_string();
    assert!(message.contains("save-1") && message.contains("save-2"), "{message}");
}

/// Writes a manifest with a digest that matches.
fn write_sealed(path: &Path, body: &str) {
    let digest = xxhash_rust::xxh3::xxh3_128(body.as_bytes());
    fs::write(path, format!("{{\n  \"digest\": \"{digest:032x}\",\n{body}")).unwrap();
}

fn body_of(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.splitn(3, '\n').nth(2).unwrap().to_string()
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused_with_field_and_reason() {
    let root = tempfile::tempdir().unwrap();
    let tensors = vec![("w".to_string(), vec![4, 5])];
    let dir = save(root.path(), 3, 2, &tensors);
    let path = dir.join("manifest.json");
    let good = body_of(&path);
    let cases = [
        ("\"format_version\": 1", "\"format_version\": 2", "this program reads version 1"),
        ("\"step\": 3", "\"step\": 4", "the folder is named for step 3"),
        ("\"step\": 3", "\"step\": -3", "content: invalid value"),
        ("\"step\": 3", "\"stop\": 3", "missing field `step`"),
        ("\"world_size\": 2", "\"world_size\": 3", "3, but 2 files are listed"),
        ("\"rank-00000-of-00002.safetensors\"", "\"../rank-00000-of-00002.safetensors\"", "files[0].name"),
        ("\"rank-00000-of-00002.safetensors\"", "\"/etc/passwd\"", "files[0].name"),
        ("\"dtype\": \"F32\"", "\"dtype\": \"F16\"", "dtype \"F16\", expected \"F32\""),
        ("\"state\": \"param\"", "\"state\": \"parm\"", "unknown variant `parm`"),
        ("\"start\": 0", "\"start\": 1", "chunks of param w: they leave a hole"),
        ("\"start\": 10", "\"start\": 9", "chunks of param w: they overlap at element 9"),
        ("\"start\": 10", "\"start\": 18446744073709551615", "10 elements from 18446744073709551615 on, of 20"),
        ("\"len\": 10", "\"len\": 0", "0 elements from 0 on"),
        ("\"len\": 10", "\"len\": 4611686018427387904", "of 20"),
        ("\"file\": 0", "\"file\": 2", "file 2 of 2"),
        ("\"offset_bytes\": ", "\"offset_bytes\": 9", "does not fit rank-00000"),
        ("\"offset_bytes\": ", "\"offset_bytes\": 999999999999999", "does not fit rank-00000"),
        ("4,\n        5", "4294967296,\n 4294967296", "impossible shape"),
        ("4,\n        5", "5,\n        4", "several shapes: {[4, 5], [5, 4]}"),
        ("\"name\": \"w\"", "\"name\": \"v\"", "they cover 10 of 20"),
        ("\"len_bytes\": ", "\"len_bytes\": 1", "the manifest says 1"),
    ];
    for (from, to, reason) in cases {
        assert!(good.contains(from), "{from:?} is not in the manifest");
        write_sealed(&path, &good.replacen(from, to, 1));
        let message = open_error(&dir);
        assert!(message.contains(reason), "{from} -> {to}: expected {reason:?} in: {message}");
        assert!(message.contains(dir.to_str().unwrap()), "no path in: {message}");
    }
    for body in ["", "}", "\"format_version\": 1}", &"[".repeat(100_000), "\u{0}"] {
        write_sealed(&path, body);
        open_error(&dir);
    }
    write_sealed(&path, &good);
    assert_loads(&Checkpoint::open(&dir).unwrap(), 3, 2, &tensors);
}

#[test]
fn no_sealed_manifest_panics_and_what_opens_reads_or_fails_cleanly() {
    let root = tempfile::tempdir().unwrap();
    let tensors = vec![("w".to_string(), vec![4, 5]), ("v".to_string(), vec![3])];
    let dir = save(root.path(), 3, 2, &tensors);
    let path = dir.join("manifest.json");
    let good = body_of(&path).into_bytes();
    let mut random = Random(0xbad);
    for _ in 0..2000 {
        let mut body = good.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(body.len());
            match random.below(3) {
                0 => body[at] = b"0123456789-.\"{}[],:e"[random.below(20)],
                1 => {
                    body.remove(at);
                }
                _ => body.insert(at, b'0' + random.below(10) as u8),
            }
        }
        write_sealed(&path, std::str::from_utf8(&body).unwrap());
        if let Ok(checkpoint) = Checkpoint::open(&dir) {
            for state in STATES {
                let _ = checkpoint.read_f32(state, "w", 0, &mut [0.0; 20]);
                let _ = checkpoint.read_f32(state, "v", 1, &mut [0.0; 2]);
            }
        }
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_both_values() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint =
        Checkpoint::open(&save(root.path(), 1, 1, &[("w".into(), vec![4, 5]), ("b".into(), vec![4])])).unwrap();
    let wanted = [("w".to_string(), vec![5, 4]), ("head".to_string(), vec![2])];
    let message = checkpoint.expect(State::Param, &wanted).unwrap_err().to_string();
    for part in ["w has shape [4, 5], the model has [5, 4]", "head is missing", "b is not part of the model"] {
        assert!(message.contains(part), "{part:?} not in {message}");
    }
    let message = checkpoint.read_f32(State::Param, "w", 18, &mut [0.0; 3]).unwrap_err().to_string();
    assert!(message.contains("param of w has 20 elements, elements 18..21"), "{message}");
    let message = checkpoint.read_f32(State::ExpAvg, "x", 0, &mut []).unwrap_err().to_string();
    assert!(message.contains("exp_avg of x is missing"), "{message}");
}

#[test]
fn a_commit_needs_every_rank_of_this_save_exactly_once() {
    let root = tempfile::tempdir().unwrap();
    let report = |save_id: &str, rank| save_rank(root.path(), 1, save_id, rank, 2, &model());
    let (a0, a1, b1) = (report("a", 0), report("a", 1), report("b", 1));
    let mut hole = a1.clone();
    hole.chunks.remove(0);
    let cases: [(&[ShardReport], &str); 6] = [
        (&[], "world_size: 0"),
        (
            std::slice::from_ref(&a0),
            "a report is of (step, save, rank, world size) (1, \"a\", 0, 2), expected (1, \"a\", 0, 1)",
        ),
        (&[a0.clone(), a0.clone()], "(1, \"a\", 0, 2), expected (1, \"a\", 1, 2)"),
        (&[a0.clone(), b1.clone()], "(1, \"b\", 1, 2), expected (1, \"a\", 1, 2)"),
        (&[a0.clone(), a1.clone(), b1], "expected (1, \"a\", 0, 3)"),
        (&[a0.clone(), hole], "they cover"),
    ];
    for (reports, reason) in cases {
        let message = commit(root.path(), 1, "a", reports, meta(1)).unwrap_err().to_string();
        assert!(message.contains(reason), "expected {reason:?} in: {message}");
        assert!(list(root.path()).unwrap().is_empty());
    }
    let dir = commit(root.path(), 1, "a", &[a1, a0], meta(1)).unwrap();
    assert_loads(&Checkpoint::open(&dir).unwrap(), 1, 2, &model());

    let again = ShardWriter::create(root.path(), 1, "c", 0, 1, &[]).unwrap_err();
    assert!(matches!(&again, CheckpointError::Exists { path } if *path == dir), "{again}");
}

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
    assert_loads(&found.checkpoint.unwrap(), 10, 1, &model());
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
    for step in 1..=4 {
        save(root.path(), step, 1, &model());
    }
    let deleted = keep_newest(root.path(), 2).unwrap();
    assert_eq!(deleted, [root.path().join("step-00000001"), root.path().join("step-00000002")]);
    assert!(keep_newest(root.path(), 2).unwrap().is_empty());
    assert!(sweep(root.path()).unwrap().is_empty());
    let left: HashSet<String> =
        fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let expected = foreign.iter().copied().chain(["step-00000003", "step-00000004"]);
    assert_eq!(left, expected.map(String::from).collect());
}

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
    assert!(*needed_bytes > 3 * 32 * 1024 * 4 && *free_bytes <= free && *free_bytes > 0, "{error}");
    assert_eq!(cause.raw_os_error(), Some(28), "{error}");
    abort(&root, 2, "full").unwrap();
    assert_eq!(disk.free_bytes(), before);
    let found = newest_valid(&root).unwrap();
    assert!(found.skipped.is_empty());
    assert_loads(&found.checkpoint.unwrap(), 1, 2, &tensors);

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
