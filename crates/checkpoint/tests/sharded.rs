//! Checkpoints: any world size loads any other's, bit for bit, and reads no byte more than it wants.

mod fixture;

use std::fs;

use fixture::*;
use fsdp_checkpoint::CheckpointError;
use fsdp_checkpoint::sharded::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_world_size_loads_what_any_other_saved(
        shapes in prop::collection::vec(prop::collection::vec(1usize..40, 1..3), 1..6),
        saved_by in 1usize..6,
        loaded_by in 1usize..6,
        ranges in prop::collection::vec((0usize..6, 0usize..2000, 0usize..2000), 10),
    ) {
        let tensors: Vec<Named> = shapes.into_iter().enumerate().map(|(i, shape)| (format!("t{i}"), shape)).collect();
        let root = tempfile::tempdir().unwrap();
        let dir = save(root.path(), 7, saved_by, &tensors);
        // As ranks load together: each verifies its share of the files, then reads its ranges.
        for rank in 0..loaded_by {
            let checkpoint = Checkpoint::open_unread(&dir).unwrap();
            assert_eq!(checkpoint.bytes_read(), 0);
            let files: Vec<usize> = (rank..saved_by).step_by(loaded_by).collect();
            checkpoint.verify_files(files.iter().copied()).unwrap();
            let verified_bytes: u64 = files.iter().map(|&file| checkpoint.manifest().files[file].len_bytes).sum();
            assert_eq!(checkpoint.bytes_read(), verified_bytes);

            assert_loads(&checkpoint, 7, rank, loaded_by, &tensors);
            let wanted: usize = shard(&tensors, rank, loaded_by).iter().map(|(_, _, len)| len * STATES.len() * 4).sum();
            assert_eq!(checkpoint.bytes_read() - verified_bytes, wanted as u64);
        }
        let checkpoint = Checkpoint::open(&dir).unwrap();
        for (tensor, a, b) in ranges {
            let tensor = tensor % tensors.len();
            let (name, shape) = &tensors[tensor];
            let (a, b) = (a % (numel(shape) + 1), b % (numel(shape) + 1));
            let mut out = vec![f32::NAN; a.abs_diff(b)];
            let before = checkpoint.bytes_read();
            checkpoint.read_f32(State::ExpAvg, name, a.min(b), &mut out).unwrap();
            prop_assert_eq!(checkpoint.bytes_read() - before, 4 * out.len() as u64);
            for (i, got) in out.into_iter().enumerate() {
                prop_assert_eq!(got, saved_value(7, State::ExpAvg, tensor, a.min(b) + i));
            }
        }
        Checkpoint::attach(&dir, "save-7").unwrap();
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
    // On another thread, as a save behind the next steps is.
    let report = std::thread::spawn(move || writer.finish()).join().unwrap().unwrap();
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
    assert_loads_all(&Checkpoint::open(&dir).unwrap(), 1, &model());

    let again = ShardWriter::create(root.path(), 1, "c", 0, 1, &[]).unwrap_err();
    assert!(matches!(&again, CheckpointError::Exists { path } if *path == dir), "{again}");
}
