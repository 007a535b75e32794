//! `fsdp-launch inspect`: says what a checkpoint holds, and nothing damaged or poisoned passes unseen.

mod saved;

use std::fs;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use saved::{Ended, Run, SMALL, STATES, value};
use serde_json::Value;

const LAUNCHER: &str = env!("CARGO_BIN_EXE_fsdp-launch");
const STEP: &str = "out/checkpoints/step-00000007";
const SHARD: &str = "out/checkpoints/step-00000007/rank-00001-of-00002.safetensors";

fn inspect(run: &Run, args: &[&str]) -> Ended {
    run.output(LAUNCHER, &[&["inspect"], args].concat())
}

fn json(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

/// Flips a bit of the last value of rank 1's file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 4;
    fs::write(path, bytes).unwrap();
}

fn set_time(path: &Path, secs: i64) {
    let time = match u64::try_from(secs) {
        Ok(secs) => UNIX_EPOCH + Duration::from_secs(secs),
        Err(_) => UNIX_EPOCH - Duration::from_secs(secs.unsigned_abs()),
    };
    fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn everything_in_a_checkpoint_is_said() {
    let run = Run::new(SMALL);
    let manifest = run.save(7, 2).join("manifest.json");
    set_time(&manifest, 1_800_000_000);
    let ended = inspect(&run, &[STEP]);
    assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{ended:?}");
    let size: u64 = [0, 1]
        .map(|r| fs::metadata(run.path(&format!("{STEP}/rank-0000{r}-of-00002.safetensors"))).unwrap().len())
        .iter()
        .sum();
    for line in [
        "checkpoint     out/checkpoints/step-00000007",
        "step           7",
        "save id        save-7",
        "written        2027-01-15T08:00:00Z",
        "world size     2 shards, one a rank",
        "format         version 1; by fsdp-launch 0.1.0",
        "data position  epoch 3, sample 12",
        "seen           56 sequences",
        "trainer        optimizer_steps 7, scaler [1024.0,7], global_batch_size 8",
        "model          model, pretrained",
        "training       90 steps on data.jsonl, seq_len 8, micro_batch_size 1, grad_accumulation 1, seed 0",
        "values         all finite",
        "tensor                                          shape     dtype     size  not finite  states",
        "model.layers.1.mlp.down_proj.weight             [12, 20]  F32    2.8 KiB           0  param, exp_avg, exp_avg_sq",
        &format!("verified: 2 files, 63 chunks, {:.1} KiB", size as f64 / 1024.0),
    ] {
        assert!(ended.stdout.lines().any(|got| got == line), "{line:?} is not in\n{}", ended.stdout);
    }

    let value = json(&inspect(&run, &[STEP, "--json"]));
    for (key, expected) in [
        ("step", Value::from(7)),
        ("save_id", "save-7".into()),
        ("world_size", 2.into()),
        ("verified", true.into()),
        ("damage", Value::Null),
        ("num_nonfinite", 0.into()),
        ("num_chunks", 63.into()),
        ("len_bytes", size.into()),
        ("written", "2027-01-15T08:00:00Z".into()),
        ("path", STEP.into()),
    ] {
        assert_eq!(value[key], expected, "{key}");
    }
    assert_eq!(value["tensors"].as_array().unwrap().len(), run.tensors.len());
    assert_eq!(value["tensors"][0]["name"], "model.embed_tokens.weight");
    assert_eq!(value["tensors"][0]["shape"], serde_json::json!([37, 12]));
    assert_eq!(value["files"][1]["name"], "rank-00001-of-00002.safetensors");
    assert_eq!(value["trainer"]["position"]["sample"], 12);
    assert!(value["config"].as_str().unwrap().contains("steps = 90"));

    // Such times come from archives.
    set_time(&manifest, -5);
    assert!(inspect(&run, &[STEP]).stdout.contains("written        ?\n"));
}

#[test]
fn damage_is_named_and_exits_2_and_what_can_be_known_is_still_said() {
    let run = Run::new(SMALL);
    run.save(7, 2);
    damage(&run.path(SHARD));
    let says = format!("{SHARD} is damaged in bytes ");
    for flags in [&[STEP] as &[&str], &[STEP, "--json"]] {
        let ended = inspect(&run, flags);
        assert_eq!(ended.status, 2, "{ended:?}");
        assert!(ended.stderr.starts_with(&format!("fsdp-launch: {says}")), "{ended:?}");
        assert!(ended.stderr.contains("(exp_avg_sq of model.norm.weight, elements 0..12): digest "), "{ended:?}");
        assert!(ended.stdout.contains("save-7") && !ended.stdout.contains("verified: "), "{ended:?}");
    }
    let value = json(&inspect(&run, &[STEP, "--json"]));
    assert_eq!((&value["verified"], &value["step"]), (&false.into(), &7.into()));
    assert!(value["damage"].as_str().unwrap().starts_with(&says));

    // Only the digests of the tensors are left out without verifying.
    let ended = inspect(&run, &[STEP, "--no-verify"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stdout.contains("not verified: 2 files, 63 chunks, "), "{ended:?}");
    assert_eq!(json(&inspect(&run, &[STEP, "--no-verify", "--json"]))["verified"], Value::Null);
    let bytes = fs::read(run.path(SHARD)).unwrap();
    fs::write(run.path(SHARD), &bytes[1..]).unwrap();
    let ended = inspect(&run, &[STEP, "--no-verify"]);
    assert_eq!((ended.status, ended.stdout.as_str()), (2, ""), "{ended:?}");
    assert!(ended.stderr.contains(&format!(
        "{SHARD} has {} bytes, the manifest says {}",
        bytes.len() - 1,
        bytes.len()
    )));

    let manifest = run.path(STEP).join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    for (changed, says) in [
        (text.replace("\"sample\": 12", "\"sample\": 13"), "manifest.json is damaged in bytes "),
        (text[..text.len() / 2].to_owned(), "manifest.json is damaged in bytes "),
        (String::new(), "manifest.json: digest: the file does not start with its digest"),
    ] {
        fs::write(&manifest, changed).unwrap();
        let ended = inspect(&run, &[STEP]);
        assert_eq!((ended.status, ended.stdout.as_str(), ended.stderr.lines().count()), (2, "", 1), "{ended:?}");
        assert!(ended.stderr.contains(says), "{ended:?}");
        let value = json(&inspect(&run, &[STEP, "--json"]));
        assert_eq!((&value["verified"], &value["step"]), (&false.into(), &Value::Null));
    }
}

#[test]
fn poisoned_values_are_counted_where_they_are() {
    let run = Run::new(SMALL);
    run.save_states(7, 3, &STATES, |step, state, tensor, element| match (state as usize, tensor, element) {
        (0, 2, 5 | 6) => f32::NAN,
        (2, 2, 5) | (1, 0, 443) => f32::INFINITY,
        _ => value(step, state, tensor, element),
    });
    let name = &run.tensors[2].0;
    let ended = inspect(&run, &[STEP]);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stdout.contains("\nvalues         POISONED: 4 are NaN or infinite\n"), "{ended:?}");
    let value = json(&inspect(&run, &[STEP, "--json"]));
    assert_eq!(value["num_nonfinite"], 4);
    for tensor in value["tensors"].as_array().unwrap() {
        let expected = match tensor["name"].as_str().unwrap() {
            "model.embed_tokens.weight" => 1,
            other if other == name => 3,
            _ => 0,
        };
        assert_eq!(tensor["num_nonfinite"], expected, "{tensor}");
    }
    let in_files: u64 = value["files"].as_array().unwrap().iter().map(|f| f["num_nonfinite"].as_u64().unwrap()).sum();
    assert_eq!(in_files, 4);
    let ended = inspect(&run, &["out"]);
    assert!(ended.stdout.contains("  verified, 4 values are not finite\n"), "{ended:?}");
}

#[test]
fn an_output_folder_is_a_list_of_checkpoints_with_verdicts() {
    let run = Run::new(SMALL);
    for (step, world_size) in [(2, 1), (7, 2), (1000, 3)] {
        run.save(step, world_size);
    }
    for path in ["out", "out/checkpoints"] {
        let ended = inspect(&run, &[path]);
        assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{ended:?}");
        let rows: Vec<Vec<&str>> = ended.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
        let found: Vec<(&str, &str, &str)> = rows[1..].iter().map(|row| (row[0], row[2], row[5])).collect();
        assert_eq!(found, [("2", "1", "verified"), ("7", "2", "verified"), ("1000", "3", "verified")], "{ended:?}");
    }
    damage(&run.path(SHARD));
    fs::remove_file(run.path("out/checkpoints/step-00001000/manifest.json")).unwrap();
    let ended = inspect(&run, &["out"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert_eq!(ended.stderr, "fsdp-launch: damaged: 2 of 3 checkpoints under out/checkpoints\n");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(lines[1].ends_with("  verified"), "{ended:?}");
    assert!(lines[2].contains(&format!("  {SHARD} is damaged in bytes ")), "{ended:?}");
    assert!(lines[3].starts_with("1000  ?") && lines[3].contains("manifest.json is missing"), "{ended:?}");
    let ended = inspect(&run, &["out", "--json"]);
    let verified: Vec<Value> =
        json(&ended)["checkpoints"].as_array().unwrap().iter().map(|c| c["verified"].clone()).collect();
    assert_eq!((ended.status, verified), (2, vec![true.into(), false.into(), false.into()]));
}

#[test]
fn bad_paths_exit_2_with_one_line() {
    let run = Run::new(SMALL);
    fs::create_dir(run.path("out")).unwrap();
    fs::create_dir_all(run.path("step-00000003.tmp-abc")).unwrap();
    fs::create_dir_all(run.path("pipe")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        run.path("pipe/manifest.json"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    for (path, says) in [
        ("nowhere", "nowhere: expected a checkpoint such as out/checkpoints/step-00000010, an output folder"),
        ("model/config.json", "got a file"),
        ("model", "got a folder without any"),
        ("out", "got a folder without any"),
        ("step-00000003.tmp-abc", "without manifest.json, so it was never committed or is damaged"),
        ("pipe", "pipe/manifest.json is missing, or no regular file"),
    ] {
        for flags in [&[path] as &[&str], &[path, "--no-verify"]] {
            let ended = inspect(&run, flags);
            assert_eq!((ended.status, ended.stdout.as_str(), ended.stderr.lines().count()), (2, "", 1), "{ended:?}");
            assert!(ended.stderr.contains(says), "{ended:?}");
        }
    }
    assert_eq!(inspect(&run, &[]).status, 2);
    let help = run.output(LAUNCHER, &["help"]);
    for command in ["  export   Write a checkpoint's weights", "  inspect  Print what a checkpoint holds"] {
        assert!(help.stdout.contains(command), "{help:?}");
    }
}
