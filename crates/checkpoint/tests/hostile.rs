//! Model folders made to break a reader: each is refused with the file, the field and the reason.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use fsdp_checkpoint::hf_folder::ModelFolder;

/// A file with a header of any text and `data_bytes` bytes of zeros.
fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn refusal(dir: &Path) -> String {
    match ModelFolder::open(dir) {
        Ok(folder) => panic!("accepted: {:?}", folder.tensors().collect::<Vec<_>>()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn hostile_safetensors_headers_are_refused_with_field_and_reason() {
    let ok = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let b = |offsets: &str| format!(r#"{{{ok},"b":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#);
    let a = |rest: &str| format!(r#"{{"a":{{{rest}}}}}"#);
    let many_dims = a(&format!(r#""dtype":"F32","shape":[{}1],"data_offsets":[0,4]"#, "1,".repeat(5000)));
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let mut not_utf8 = file("{}  ", 0);
    not_utf8[10] = 0xff;
    let header_over_limit = {
        let mut bytes = 100_000_001u64.to_le_bytes().to_vec();
        bytes.resize(64, b' ');
        bytes
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "only 0 bytes long"),
        (b"1234567".to_vec(), "only 7 bytes long"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n".to_vec(), "git lfs pull"),
        (u64::MAX.to_le_bytes().to_vec(), "header length"),
        (header_over_limit, "at most 100000000"),
        (99_000_000u64.to_le_bytes().to_vec(), "the file has only 8; truncated?"),
        (file("", 0), "not a JSON object"),
        (not_utf8, "not UTF-8"),
        (file("hello", 0), "not a JSON object"),
        (file("[1,2]", 0), "not a JSON object"),
        (file("null", 0), "not a JSON object"),
        (file("{} x", 0), "not a JSON object"),
        (file(r#"{"a":"#, 0), "not a JSON object"),
        (file(&deep, 0), "not a JSON object"),
        (file(&format!("{{{ok},{ok}}}"), 8), r#""a" occurs twice"#),
        (file(&format!(r#"{{{ok},"\u0061":{{}}}}"#), 8), r#""a" occurs twice"#),
        (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "occurs twice"),
        (file(&a(""), 0), "missing field `dtype`"),
        (file(&a(r#""dtype":"F32","shape":[2]"#), 8), "missing field `data_offsets`"),
        (file(&a(r#""dtype":"F33","shape":[2],"data_offsets":[0,8]"#), 8), "unknown variant `F33`"),
        (file(&a(r#""dtype":"F32","shape":2,"data_offsets":[0,8]"#), 8), "tensor \"a\": invalid type"),
        (file(&a(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#), 8), "tensor \"a\": invalid value"),
        (file(&a(r#""dtype":"F32","shape":[2.0],"data_offsets":[0,8]"#), 8), "tensor \"a\": invalid type"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[0]"#), 8), "tensor \"a\": invalid length"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[-1,7]"#), 8), "tensor \"a\": invalid value"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), 8), "data_offsets 8..0"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), 7), "holds 7 bytes of data; truncated?"),
        (file(&a(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), 8), "needs 12 bytes"),
        (
            file(&a(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]"#), 8),
            "an impossible number of bytes",
        ),
        (
            file(&a(r#""dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]"#), 8),
            "an impossible number of bytes",
        ),
        (file(&a(r#""dtype":"F4","shape":[3],"data_offsets":[0,1]"#), 1), "an impossible number of bytes"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]"#), 8), "truncated?"),
        (file(&many_dims, 4), "more than 4096 bytes"),
        (file(&b("[4,12]"), 16), "overlaps"),
        (file(&b("[0,8]"), 8), "overlaps"),
        (file(&b("[12,20]"), 20), "leaves a hole"),
        (file(&b("[8,16]"), 20), "4 bytes follow the last tensor"),
        (file(&a(r#""dtype":"F32","shape":[2],"data_offsets":[4,12]"#), 12), "leaves a hole"),
        (file("{}", 4), "4 bytes follow"),
        (file("{}", 0), "hold no tensors"),
        (file(&a(r#""dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]"#), 2), "a is F8_E4M3"),
    ];
    for (bytes, reason) in &cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let message = refusal(dir.path());
        assert!(message.contains(reason), "expected {reason:?} in: {message}");
        assert!(message.contains(dir.path().to_str().unwrap()), "no path in: {message}");
    }
    println!("{} hostile headers refused", cases.len());
}

#[test]
fn every_truncation_and_byte_change_of_a_header_is_refused_or_harmless() {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;
    let good = file(header, 12);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for len in 0..good.len() {
        fs::write(&path, &good[..len]).unwrap();
        refusal(dir.path());
    }
    for at in 0..8 + header.len() {
        for change in [1u8, 2, 8, 16, 32, 128] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            fs::write(&path, &bytes).unwrap();
            // Another name or metadata is a valid file; what matters is that every element stays readable.
            if let Ok(folder) = ModelFolder::open(dir.path()) {
                for tensor in folder.tensors() {
                    folder.read_f32(&tensor.name, 0, &mut vec![0.0; tensor.numel()]).unwrap();
                }
            }
        }
    }
}

#[test]
fn hostile_indexes_are_refused_with_field_and_reason() {
    let outside = tempfile::tempdir().unwrap();
    let good = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
    fs::write(outside.path().join("m.safetensors"), &good).unwrap();
    let absolute = format!(r#"{{"weight_map":{{"a":"{}/m.safetensors"}}}}"#, outside.path().display());
    let up =
        format!(r#"{{"weight_map":{{"a":"../{}/m.safetensors"}}}}"#, outside.path().file_name().unwrap().display());
    let cases: [(&str, &str); 14] = [
        ("", "weight_map"),
        ("[]", "weight_map"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map":[]}"#, "expected a JSON object"),
        (r#"{"weight_map":{"a":1}}"#, "invalid type"),
        (r#"{"weight_map":{}}"#, "hold no tensors"),
        (r#"{"weight_map":{"a":"m.safetensors","a":"m.safetensors"}}"#, r#""a" occurs twice"#),
        (&absolute, "not a .safetensors file inside the folder"),
        (&up, "not a .safetensors file inside the folder"),
        (r#"{"weight_map":{"a":"./../x.safetensors"}}"#, "not a .safetensors file inside the folder"),
        (r#"{"weight_map":{"a":"pytorch_model.bin"}}"#, "not a .safetensors file inside the folder"),
        (r#"{"weight_map":{"a":""}}"#, "not a .safetensors file inside the folder"),
        (r#"{"weight_map":{"a":"missing.safetensors"}}"#, "missing.safetensors: No such file"),
        (r#"{"weight_map":{"b":"m.safetensors"}}"#, r#"weight_map["b"]: m.safetensors holds no such tensor"#),
    ];
    for (index, reason) in cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("m.safetensors"), &good).unwrap();
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let message = refusal(dir.path());
        assert!(message.contains(reason), "{index}: expected {reason:?} in: {message}");
        assert!(message.contains(dir.path().to_str().unwrap()), "no path in: {message}");
    }
}

#[test]
fn folders_that_are_no_model_say_what_to_do() {
    let cases: [(&[&str], &str); 5] = [
        (&[], "holds 0 files"),
        (&["config.json"], "none of them is safetensors"),
        (&["pytorch_model.bin"], "convert the model to safetensors"),
        (&["consolidated.00.pth"], "convert the model to safetensors"),
        (&["consolidated.safetensors"], "rename it to model.safetensors"),
    ];
    for (files, reason) in cases {
        let dir = tempfile::tempdir().unwrap();
        for name in files {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let message = refusal(dir.path());
        assert!(message.contains(reason), "expected {reason:?} in: {message}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(refusal(&dir.path().join("none")).contains("none: No such file"));

    let model = dir.path().join("model.safetensors");
    symlink("nowhere", &model).unwrap();
    assert!(refusal(dir.path()).contains("model.safetensors: No such file"));
    fs::remove_file(&model).unwrap();
    fs::create_dir(&model).unwrap();
    assert!(refusal(dir.path()).contains("not a regular file"));
    fs::remove_dir(&model).unwrap();
    // A pipe without a writer would block an open for ever.
    rustix::fs::mknodat(rustix::fs::CWD, &model, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(refusal(dir.path()).contains("not a regular file"));
}

#[test]
fn a_hostile_header_takes_no_more_memory_than_a_small_multiple_of_its_file() {
    let peak_kib = || -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let entries: Vec<String> = (0..300_000).map(entry).collect();
    let bytes = file(&format!("{{{}}}", entries.join(",")), 0);
    drop(entries);
    fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
    let (file_bytes, before) = (bytes.len() as u64, peak_kib());
    drop(bytes);
    assert!(refusal(dir.path()).contains("more than 262144 keys"));
    let grown = (peak_kib() - before) * 1024;
    assert!(grown <= file_bytes + (64 << 20), "{grown} bytes for a file of {file_bytes}");
}
