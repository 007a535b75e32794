//! Text that would make a parser take much more memory than it is long is refused, or parsed within bounds.
//!
//! This test brings its own `main`, as each text is parsed in a process of its own whose peak is measured.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use fsdp_checkpoint::sharded::{Chunk, Manifest, ManifestMeta, ShardWriter, State, commit};
use fsdp_checkpoint::{header, hf_folder};

const BOUND_BYTES: u64 = 64 << 20;

fn main() {
    let args: Vec<String> = env::args().collect();
    match &args[1..] {
        [mode, kind, path] if mode == "parse" => parse(kind, Path::new(path)),
        _ => no_text_takes_more_memory_than_its_length_and_64_mib(),
    }
}

fn no_text_takes_more_memory_than_its_length_and_64_mib() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    for (kind, what, text) in texts() {
        fs::write(&path, &text).unwrap();
        let child = Command::new(env::current_exe().unwrap()).arg("parse").arg(kind).arg(&path).output().unwrap();
        let output = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "{kind}, {what}: {}", String::from_utf8_lossy(&child.stderr));
        let (peak, said) = output.trim().split_once(' ').unwrap();
        println!("{kind}, {what}: {} bytes, {peak} bytes more at the peak: {said}", text.len());
        assert!(peak.parse::<u64>().unwrap() <= text.len() as u64 + BOUND_BYTES, "{kind}, {what}");
    }
}

/// Prints how much more memory than before it takes at its peak, and what came of it.
fn parse(kind: &str, path: &Path) {
    let bytes = fs::read(path).unwrap();
    let text = || std::str::from_utf8(&bytes).unwrap();
    let before = status_bytes("VmRSS:");
    let parsed = match kind {
        "header" => header::parse(&bytes, bytes.len() as u64, path).map(|header| header.tensors.len()),
        "index" => hf_folder::parse_index(text(), path).map(|files| files.len()),
        _ => Manifest::parse(text(), path).map(|manifest| manifest.chunks.len()),
    };
    let said = parsed.map_or_else(|error| error.to_string(), |num| num.to_string());
    println!("{} {:.150}", status_bytes("VmHWM:").saturating_sub(before), said);
}

fn status_bytes(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn texts() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut texts = Vec::new();
    let tensor = |i: usize, dims: &str| format!(r#""{i}":{{"dtype":"F32","shape":[{dims}],"data_offsets":[0,0]}}"#);
    for (what, json) in [
        ("most tensors", (0..1 << 18).map(|i| tensor(i, "1,1,1,1,1,1,1,0")).collect::<Vec<String>>().join(",")),
        ("many dimensions", (0..5_000).map(|i| tensor(i, &["1"; 2000].join(","))).collect::<Vec<String>>().join(",")),
        ("one long list", tensor(0, &vec!["1"; 5_000_000].join(","))),
        ("deep", "[".repeat(10_000_000)),
        ("many keys", (0..1_000_000).map(|i| format!("\"{i}\":0")).collect::<Vec<String>>().join(",")),
        ("metadata", format!(r#""__metadata__":{{"a":"{}"}}"#, "a".repeat(50_000_000))),
    ] {
        let json = format!("{{{json}}}");
        texts.push(("header", what, [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()));
    }

    for (what, num, num_files) in
        [("most tensors", 1 << 18, 10_000), ("most files", 1 << 18, 1 << 18), ("too many tensors", 1_000_000, 1)]
    {
        let entries: Vec<String> = (0..num).map(|i| format!(r#""{i}":"{}.safetensors""#, i % num_files)).collect();
        texts.push(("index", what, format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")).into_bytes()));
    }

    let good = good_manifest();
    let chunk = r#"{"state":"param","name":"w","shape":[1],"dtype":"F32","start":0,"len":1,"file":0,"offset_bytes":0,
"digest":""},"#;
    let versions: String = (0..100_000).map(|i| format!("\"{i}\":\"\",")).collect();
    let lists = "[],".repeat(5_000_000);
    for (what, from, to) in [
        ("many chunks", "\"chunks\": [", format!("\"chunks\": [{}", chunk.repeat(100_000))),
        ("many versions", "\"VERSION\"", format!("{versions}\"VERSION\"")),
        ("a large state", "\"TRAINER\"", format!("[{}0]", "[],".repeat(300_000))),
        ("too large a state", "\"TRAINER\"", format!("[{lists}0]")),
        ("many dimensions", "\"shape\": [", format!("\"shape\": [{}", "1,".repeat(5_000_000))),
        ("an unknown field", "\"step\"", format!("\"unknown\": [{lists}0], \"step\"")),
    ] {
        assert!(good.contains(from), "{from}");
        let body = good.replacen(from, &to, 1);
        let digest = xxhash_rust::xxh3::xxh3_128(body.as_bytes());
        texts.push(("manifest", what, format!("{{\n  \"digest\": \"{digest:032x}\",\n{body}").into_bytes()));
    }
    texts
}

/// What follows the digest.
fn good_manifest() -> String {
    let root = tempfile::tempdir().unwrap();
    let chunk = Chunk { state: State::Param, name: "w", shape: &[1], start: 0, len: 1 };
    let mut writer = ShardWriter::create(root.path(), 1, "id", 0, 1, &[chunk]).unwrap();
    writer.write_f32(&[1.0]).unwrap();
    let meta = ManifestMeta {
        config: String::new(),
        data_digest: String::new(),
        tokenizer_digest: String::new(),
        trainer: serde_json::json!("TRAINER"),
        versions: [("VERSION".to_string(), String::new())].into(),
    };
    let dir = commit(root.path(), 1, "id", &[writer.finish().unwrap()], meta).unwrap();
    let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
    text.splitn(3, '\n').nth(2).unwrap().to_string()
}
