//! Manifests: what contradicts itself, or the files, is refused with field and reason, whatever its digest says.

mod fixture;

use std::fs;
use std::path::Path;

use fixture::*;
use fsdp_checkpoint::sharded::*;

fn open_error(dir: &Path) -> String {
    Checkpoint::open(dir).map(|_| ()).expect_err("a damaged checkpoint opened").to_string()
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
        ("\"dtype\": \"F32\"", "\"dtype\": \"F16\"", "has dtype \"F16\", expected \"F32\""),
        ("\"state\": \"param\"", "\"state\": \"parm\"", "unknown variant `parm`"),
        ("\"start\": 0", "\"start\": 1", "chunks of param w: they leave a hole"),
        ("\"start\": 10", "\"start\": 9", "chunks of param w: they overlap at element 9"),
        ("\"start\": 10", "\"start\": 18446744073709551615", "10 elements from 18446744073709551615 on, of 20"),
        ("\"len\": 10", "\"len\": 0", "0 elements from 0 on"),
        ("\"len\": 10", "\"len\": 4611686018427387904", "of 20"),
        ("\"file\": 0", "\"file\": 2", "file 2 of 2"),
        ("\"offset_bytes\": ", "\"offset_bytes\": 9", "does not fit rank-00000"),
        ("\"digest\": \"", "\"digest\": \"0", "damaged"),
        ("\"save_id\": \"save-3\"", "\"save_id\": \"other\"", "its save_id is save-3, expected other"),
        ("\"offset_bytes\": ", "\"offset_bytes\": 999999999999999", "does not fit rank-00000"),
        ("4,\n        5", "4294967296,\n 4294967296", "impossible shape"),
        ("4,\n        5", "5,\n        4", "several shapes: {[4, 5], [5, 4]}"),
        ("\"name\": \"w\"", "\"name\": \"v\"", "they cover 10 of 20"),
        ("\"len_bytes\": ", "\"len_bytes\": 1", "chunks of rank-00000-of-00002.safetensors: they cover 120 of"),
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
    assert_loads_all(&Checkpoint::open(&dir).unwrap(), 3, &tensors);
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
