//! `fsdp-launch export`: the bytes of a run's own export from any checkpoint, in bounded memory; refused otherwise.

mod saved;

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fsdp_checkpoint::Dtype;
use fsdp_checkpoint::export::ExportLayout;
use fsdp_checkpoint::hf_folder::ModelFolder;
use fsdp_checkpoint::sharded::State;
use rustix::process::{Pid, Signal, kill_process};
use saved::{Ended, Model, Run, SMALL, contents, value};

const LAUNCHER: &str = env!("CARGO_BIN_EXE_fsdp-launch");

fn launch(run: &Run, args: &[&str]) -> Ended {
    run.output(LAUNCHER, args)
}

#[test]
fn a_checkpoint_of_any_number_of_ranks_gives_the_bytes_that_a_run_exports() {
    for is_tied in [true, false] {
        let run = Run::new(Model { is_tied, ..SMALL });
        let mut expected = Vec::new();
        for (flag, dtype) in [("auto", Dtype::BF16), ("fp32", Dtype::F32), ("bf16", Dtype::BF16)] {
            let into = format!("run-{flag}");
            run.export(&ExportLayout::new(&run.tensors, dtype, 5_000_000_000), 7, &run.path("model"), &into);
            expected.push((flag, contents(&run.path(&into))));
        }
        for world_size in 1..=4 {
            let checkpoint = run.save(7, world_size);
            for (flag, expected) in &expected {
                let ended = launch(&run, &["export", checkpoint.to_str().unwrap(), "hf", "--dtype", flag]);
                assert_eq!((ended.status, ended.stderr.as_str()), (0, ""), "{ended:?}");
                let message = "the weights after step 7, to hf: ";
                assert!(ended.stdout.contains(message), "{ended:?}");
                assert!(contents(&run.path("hf")) == *expected, "tied {is_tied}, {world_size} ranks, {flag}");
                fs::remove_dir_all(run.path("hf")).unwrap();
            }
            fs::remove_dir_all(checkpoint).unwrap();
        }

        // What that is, read by other code.
        let names: Vec<&str> = expected[1].1.keys().map(String::as_str).collect();
        let files = [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names, files);
        let text = String::from_utf8_lossy(&expected[1].1["model.safetensors"]).into_owned();
        assert!(text.contains(r#""__metadata__":{"format":"pt"}"#));
        assert_eq!(text.contains("lm_head.weight"), !is_tied);
        let folder = ModelFolder::open(&run.path("run-fp32")).unwrap();
        folder.expect(&run.tensors).unwrap();
        for (i, (name, shape)) in run.tensors.iter().enumerate() {
            let mut values = vec![0.0; shape.iter().product()];
            folder.read_f32(name, 0, &mut values).unwrap();
            let is_right = values.iter().enumerate().all(|(e, got)| *got == value(7, State::Param, i, e));
            assert!(is_right, "{name}");
        }
    }
}

#[test]
fn without_a_flag_the_dtype_is_the_runs() {
    // (source's weights, dtype in its config.json, [output] dtype, flags, expected)
    type Case = (Option<Dtype>, Option<&'static str>, &'static str, &'static [&'static str], Dtype);
    let cases: [Case; 8] = [
        (Some(Dtype::BF16), Some("float32"), "auto", &[], Dtype::BF16),
        (Some(Dtype::F16), None, "auto", &[], Dtype::F16),
        (Some(Dtype::BF16), None, "fp32", &[], Dtype::F32),
        (Some(Dtype::F32), None, "bf16", &[], Dtype::BF16),
        (Some(Dtype::F32), None, "bf16", &["--dtype", "auto"], Dtype::F32),
        (None, Some("float16"), "auto", &[], Dtype::F16),
        (None, Some("bfloat16"), "fp32", &["--dtype", "auto"], Dtype::BF16),
        (None, None, "auto", &[], Dtype::F32),
    ];
    for (source, torch_dtype, output_dtype, flags, expected) in cases {
        let run = Run::new(Model { source, torch_dtype, output_dtype, ..SMALL });
        run.save(7, 2);
        let ended = launch(&run, &[&["export", "out", "hf"], flags].concat());
        assert_eq!(ended.status, 0, "{ended:?}");
        let folder = ModelFolder::open(&run.path("hf")).unwrap();
        let what = format!("{source:?} {torch_dtype:?} {output_dtype} {flags:?}");
        assert!(folder.tensors().all(|tensor| tensor.dtype == expected), "{what}");
        let config: serde_json::Value = serde_json::from_slice(&fs::read(run.path("hf/config.json")).unwrap()).unwrap();
        assert_eq!(config["torch_dtype"], expected.torch_name(), "{what}");
    }
}

#[test]
fn of_several_checkpoints_the_newest_whole_one_is_exported_and_named() {
    let run = Run::new(SMALL);
    for step in [2, 4, 6] {
        run.save(step, 2);
    }
    let shard = run.path("out/checkpoints/step-00000006/rank-00001-of-00002.safetensors");
    fs::write(&shard, &fs::read(&shard).unwrap()[1..]).unwrap();
    run.export(&ExportLayout::new(&run.tensors, Dtype::BF16, 5_000_000_000), 4, &run.path("model"), "expected");
    for (i, path) in ["out", "out/checkpoints"].into_iter().enumerate() {
        let hf = format!("new/folders/hf-{i}");
        let ended = launch(&run, &["export", path, &hf]);
        assert_eq!(ended.status, 0, "{ended:?}");
        let lines: Vec<&str> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), 2, "{ended:?}");
        assert!(lines[0].starts_with(
            "out/checkpoints/step-00000006 is damaged and not used: out/checkpoints/step-00000006/rank-00001"
        ));
        assert_eq!(lines[1], "out/checkpoints/step-00000004 is the newest whole checkpoint");
        assert!(contents(&run.path(&hf)) == contents(&run.path("expected")));
    }
    // The one that was asked for is not replaced by another.
    let ended = launch(&run, &["export", "out/checkpoints/step-00000006", "hf"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    fs::remove_dir_all(run.path("out/checkpoints/step-00000004")).unwrap();
    fs::remove_file(run.path("out/checkpoints/step-00000002/manifest.json")).unwrap();
    let ended = launch(&run, &["export", "out", "hf"]);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.ends_with("no checkpoint under out/checkpoints is whole\n"), "{ended:?}");
}

/// A wrong change to a right run, what is exported from where to where, and what the message must say.
type Case = (&'static str, fn(&Run), &'static [&'static str], &'static [&'static str]);

const STEP: &str = "out/checkpoints/step-00000007";

fn flip(run: &Run, file: &str, byte: u64) {
    let file = fs::File::options().read(true).write(true).open(run.path(STEP).join(file)).unwrap();
    let mut value = [0];
    file.read_exact_at(&mut value, byte).unwrap();
    file.write_all_at(&[value[0] ^ 4], byte).unwrap();
}

/// A byte of the last piece of rank 1's file, which is one of `exp_avg_sq`.
fn last_byte(run: &Run) -> u64 {
    fs::metadata(run.path(STEP).join("rank-00001-of-00002.safetensors")).unwrap().len() - 1
}

fn edit(run: &Run, name: &str, from: &str, to: &str) {
    let text = fs::read_to_string(run.path(name)).unwrap();
    assert!(text.contains(from), "{name} has no {from}");
    fs::write(run.path(name), text.replace(from, to)).unwrap();
}

fn nothing(_: &Run) {}

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("parameter", |run| flip(run, "rank-00000-of-00002.safetensors", 8000), &[STEP, "hf"],
        &["rank-00000-of-00002.safetensors is damaged in bytes ", "bytes 7056..8016 (param of model.layers.0.mlp.gate_proj.weight, elements 0..240): digest "]),
    ("moment", |run| flip(run, "rank-00001-of-00002.safetensors", last_byte(run)), &[STEP, "hf"],
        &["rank-00001-of-00002.safetensors is damaged in bytes ", "exp_avg_sq of model.norm.weight, elements 0..12"]),
    ("header", |run| flip(run, "rank-00001-of-00002.safetensors", 20), &[STEP, "hf"],
        &["rank-00001-of-00002.safetensors is damaged in bytes 0..", "the header"]),
    ("manifest", |run| edit(run, "out/checkpoints/step-00000007/manifest.json", "\"step\": 7", "\"step\": 8"), &[STEP, "hf"],
        &["manifest.json is damaged in bytes "]),
    ("short file", |run| {
        let path = run.path(STEP).join("rank-00001-of-00002.safetensors");
        fs::write(&path, &fs::read(&path).unwrap()[..5000]).unwrap();
    }, &[STEP, "hf"], &["rank-00001-of-00002.safetensors has 5000 bytes, the manifest says "]),
    ("lost file", |run| fs::remove_file(run.path(STEP).join("rank-00000-of-00002.safetensors")).unwrap(), &[STEP, "hf"],
        &["rank-00000-of-00002.safetensors is missing"]),
    ("lost manifest", |run| fs::remove_file(run.path(STEP).join("manifest.json")).unwrap(), &[STEP, "hf"],
        &["step-00000007: expected a checkpoint", "without manifest.json", "never committed or is damaged"]),
    ("no checkpoint", nothing, &["nowhere", "hf"], &["nowhere: expected a checkpoint", "no such folder"]),
    ("no folder", nothing, &["model/config.json", "hf"], &["model/config.json: expected a checkpoint", "got a file"]),
    ("empty folder", |run| fs::create_dir(run.path("empty")).unwrap(), &["empty", "hf"],
        &["empty: expected a checkpoint", "got a folder without any"]),
    ("a run without any", |run| fs::remove_dir_all(run.path(STEP)).unwrap(), &["out", "hf"], &["out: expected a checkpoint"]),
    ("target with files", nothing, &[STEP, "model"], &["model: expected a folder that does not exist yet or is empty"]),
    ("target is a file", nothing, &[STEP, "model/config.json"], &["model/config.json: expected a folder", "Not a directory"]),
    ("target in a file", nothing, &[STEP, "model/config.json/hf"], &["model/config.json/hf", "Not a directory"]),
    ("target without a name", nothing, &[STEP, "new/.."], &["new/..: expected a folder", "without a name"]),
    ("target is a dangling link", |run| std::os::unix::fs::symlink("nowhere", run.path("hf")).unwrap(), &[STEP, "hf"],
        &["hf: expected a folder", "a link to no folder"]),
    ("root as target", nothing, &[STEP, "/"], &["/: expected a folder", "with files in it"]),
    ("target not writable", nothing, &[STEP, "/proc/hf"], &["/proc/"]),
    ("model is gone", |run| fs::rename(run.path("model"), run.path("moved")).unwrap(), &[STEP, "hf"],
        &["the model's folder model (a path relative to", "is not there", "--model FOLDER"]),
    ("no config.json", |run| fs::remove_file(run.path("model/config.json")).unwrap(), &[STEP, "hf"],
        &["model/config.json: cannot be read", "--model FOLDER"]),
    ("another model", |run| edit(run, "model/config.json", "\"vocab_size\": 37", "\"vocab_size\": 38"), &[STEP, "hf"],
        &["not of the model in model", "model.embed_tokens.weight has shape [37, 12], the model has [38, 12]", "--model FOLDER"]),
    ("another tokenizer", |run| fs::write(run.path("model/tokenizer.json"), "{}").unwrap(), &[STEP, "hf"],
        &["model/tokenizer.json is not the tokenizer of the run (digest ", "--model FOLDER"]),
    ("tokenizer is gone", |run| fs::remove_file(run.path("model/tokenizer.json")).unwrap(), &[STEP, "hf"],
        &["model/tokenizer.json is not the tokenizer of the run"]),
    ("weights are gone", |run| fs::remove_file(run.path("model/model.safetensors")).unwrap(), &[STEP, "hf"],
        &["model is not a model folder", "--dtype bf16 or fp32"]),
    ("dtype", nothing, &[STEP, "hf", "--dtype", "int8"], &["invalid value 'int8' for '--dtype", "auto, fp32, bf16"]),
    ("no target", nothing, &[STEP], &["<DIR>"]),
];

#[test]
fn damage_and_bad_paths_exit_2_with_one_message_and_write_nothing() {
    let mut wrong = Vec::new();
    for (name, change, args, says) in CASES {
        let run = Run::new(SMALL);
        run.save(7, 2);
        change(&run);
        let before = run.names();
        let ended = launch(&run, &[&["export"], *args].concat());
        let is_right = ended.status == 2
            && ended.stdout.is_empty()
            && says.iter().all(|part| ended.stderr.contains(part))
            && (ended.stderr.lines().count() == 1 || ended.stderr.contains("try '--help'"))
            && run.names() == before;
        if !is_right {
            wrong.push(format!("{name}: expected {says:?}, got {ended:?}, left {:?}", run.names()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
}

#[test]
fn another_folder_may_stand_in_for_a_model_that_is_gone() {
    let run = Run::new(SMALL);
    run.save(7, 3);
    assert_eq!(launch(&run, &["export", "out", "hf"]).status, 0);
    fs::rename(run.path("model"), run.path("moved")).unwrap();
    fs::create_dir(run.path("empty")).unwrap();
    // An earlier export has all that is needed, and an empty folder may be the target.
    for (model, hf) in [("moved", "hf-1"), ("hf", "empty")] {
        let ended = launch(&run, &["export", "out", hf, "--model", model]);
        assert_eq!(ended.status, 0, "{ended:?}");
        assert!(contents(&run.path(hf)) == contents(&run.path("hf")));
    }
    assert_eq!(run.names(), ["base", "empty", "hf", "hf-1", "moved", "out"]);
}

#[test]
fn a_full_disk_is_said_and_nothing_stays_on_it() {
    let run = Run::new(Model { vocab_size: 30_000, ..SMALL });
    run.save(7, 2);
    let disk = run.path("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=600k", "tmpfs"]).arg(&disk).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: a tmpfs cannot be mounted here (needs root)");
        return;
    }
    let ended = launch(&run, &["export", "out", "disk/hf"]);
    let left = contents(&disk);
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
    assert_eq!(ended.status, 1, "{ended:?}");
    for part in ["no space for ", "disk/.hf.tmp/model.safetensors: 7", " bytes needed, ", " free (No space left"] {
        assert!(ended.stderr.contains(part), "{ended:?}");
    }
    assert!(left.is_empty(), "{left:?}");
}

/// A checkpoint with a tensor of 200 MB, whole in one piece.
fn large() -> Run {
    let run = Run::new(Model { vocab_size: 3_125_000, hidden_size: 16, source: None, ..SMALL });
    run.save_states(7, 1, &[State::Param], |_, _, _, element| element as f32);
    run
}

/// The most memory that the process has had so far; `None` once it is gone.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[test]
fn memory_does_not_grow_with_the_tensor_and_a_signal_leaves_nothing() {
    let run = large();
    let mut child = run.command(LAUNCHER, &["export", "out", "hf"]).stdout(Stdio::null()).spawn().unwrap();
    let mut peak = 0;
    let status = loop {
        peak = peak_kib(child.id()).unwrap_or(peak);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(status.success());
    println!("peak RSS {peak} KiB for a tensor of 195313 KiB");
    // The program itself has about 10 MiB.
    assert!((1..64 << 10).contains(&peak), "{peak} KiB");
    assert!(fs::metadata(run.path("hf/model.safetensors")).unwrap().len() > 200_000_000);

    let child = run.command(LAUNCHER, &["export", "out", "hf-1"]).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !run.path(".hf-1.tmp/model.safetensors").exists() {
        assert!(Instant::now() < deadline, "the export does not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("stopped by a signal; nothing was exported"), "{stderr}");
    assert_eq!(run.names(), ["hf", "model", "out"]);
}
