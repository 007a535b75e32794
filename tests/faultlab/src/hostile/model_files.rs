//! Weights, their index, and `config.json`.

use std::fs;
use std::os::unix::fs::symlink;

use fsdp_tests_behaviour::job::Job;
use fsdp_tests_behaviour::model;
use rustix::fs::{CWD, FileType, mknodat};
use safetensors::tensor::Dtype;

use super::{Case, Change, File, ModelConfig, Refused, Weights, Works, run, weights};
use crate::tally::Tally;

const WEIGHTS: &str = "model/model.safetensors";
const INDEX: &str = "model/model.safetensors.index.json";
const CONFIG: &str = "model/config.json";

/// Row 21: each of them.
pub fn model_files(tally: &mut Tally, n: usize) {
    run(tally, n, CASES, Job::new, |name| name.ends_with(".json") || name.ends_with(".safetensors"));
}

/// An index in place of the job's only file.
fn with_index(job: &Job, index: &str) {
    fs::rename(job.path(WEIGHTS), job.path("model/m.safetensors")).expect("the job's weights");
    job.write(INDEX, index);
}

/// An index that names one file for all tensors of the job, whose weights go there.
fn index_of(job: &Job, name: &str, place: &str) {
    let names = model::read(&job.path("model")).into_keys();
    let entries: Vec<String> = names.map(|tensor| format!("{tensor:?}: {name:?}")).collect();
    fs::rename(job.path(WEIGHTS), job.path(place)).expect("the job's weights");
    job.write(INDEX, format!("{{\"weight_map\": {{{}}}}}", entries.join(", ")));
}

fn fifo(job: &Job, name: &str) {
    let _ = fs::remove_file(job.path(name));
    mknodat(CWD, job.path(name), FileType::Fifo, 0o600.into(), 0).expect("a folder of the test");
}

/// Puts `key` with a value of so many bytes in front of the keys of `config.json`.
fn with_long_value(job: &Job, start: &str, piece: &str, num_bytes: usize, end: &str) {
    let value = [start, &piece.repeat(num_bytes / piece.len()), end].concat();
    job.replace(CONFIG, "{", &format!("{{\"more\": {value},"));
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    // Headers.
    Case::new("no bytes", File(WEIGHTS, b""), Refused(&[WEIGHTS, "only 0 bytes long"])),
    Case::new("half a length", File(WEIGHTS, b"1234567"), Refused(&[WEIGHTS, "only 7 bytes long"])),
    Case::new("a pointer of Git LFS", File(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), Refused(&[WEIGHTS, "git lfs pull"])),
    Case::new("a length of all ones", File(WEIGHTS, &[0xff; 16]), Refused(&[WEIGHTS, "header length", "at most 100000000"])),
    Case::new("a length just beyond the bound", File(WEIGHTS, b"\x01\xe1\xf5\x05\0\0\0\0{}"), Refused(&[WEIGHTS, "header length", "at most 100000000"])),
    Case::new("a length beyond the file", File(WEIGHTS, b"\0\xe0\xf5\x05\0\0\0\0{}"), Refused(&[WEIGHTS, "header length", "truncated?"])),
    Case::new("a header of no JSON", Weights("hello", 0), Refused(&[WEIGHTS, "not a JSON object"])),
    Case::new("a header that is an array", Weights("[]", 0), Refused(&[WEIGHTS, "not a JSON object"])),
    Case::new("a header that is not UTF-8", File(WEIGHTS, b"\x02\0\0\0\0\0\0\0{\xff"), Refused(&[WEIGHTS, "not UTF-8"])),
    Case::new("a header that is cut", Weights(r#"{"a":"#, 0), Refused(&[WEIGHTS, "not a JSON object"])),
    Case::new("deep brackets", Change(|job| job.write(WEIGHTS, weights(&format!("{{\"a\":{}", "[".repeat(1_000_000)), 0))), Refused(&[WEIGHTS, "not a JSON object"])),
    Case::new("a key twice", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\u0061":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16), Refused(&[WEIGHTS, "\"a\" occurs twice"])),
    Case::new("no data type", Weights(r#"{"a":{"shape":[2],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "`dtype`"])),
    Case::new("an unheard data type", Weights(r#"{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "`F31`"])),
    Case::new("a negative size", Weights(r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "-2"])),
    Case::new("a fractional size", Weights(r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "2.0"])),
    Case::new("offsets that run backwards", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "8..0"])),
    Case::new("offsets beyond the file", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7), Refused(&[WEIGHTS, "tensor \"a\"", "7 bytes"])),
    Case::new("offsets beyond 64 bits", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\""])),
    Case::new("a shape beyond 64 bits", Weights(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "an impossible number of bytes"])),
    Case::new("a shape of another size", Weights(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8), Refused(&[WEIGHTS, "tensor \"a\"", "12 bytes"])),
    Case::new("tensors that overlap", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12), Refused(&[WEIGHTS, "tensor \"b\"", "overlaps"])),
    Case::new("a hole", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#, 16), Refused(&[WEIGHTS, "tensor \"b\"", "hole"])),
    Case::new("bytes behind the last tensor", Weights(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 12), Refused(&[WEIGHTS, "4 bytes follow"])),
    Case::new("no tensors", Weights("{}", 0), Refused(&["model", "no tensors"])),
    Case::new("a shape of thousands of dimensions", Change(|job| {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(5000));
        job.write(WEIGHTS, weights(&header, 4));
    }), Refused(&[WEIGHTS, "tensor \"a\"", "more than 4096 bytes"])),
    Case::new("hundreds of thousands of tensors", Change(|job| {
        let entries: Vec<String> = (0..300_000).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
        job.write(WEIGHTS, weights(&format!("{{{}}}", entries.join(",")), 0));
    }), Refused(&[WEIGHTS, "more than 262144 keys"])),
    Case::new("a header of blanks", Change(|job| job.write(WEIGHTS, weights(&" ".repeat(90_000_000), 0))), Refused(&[WEIGHTS, "not a JSON object"])),
    // What is no file.
    Case::new("weights that are a folder", Change(|job| {
        fs::remove_file(job.path(WEIGHTS)).expect("the job's weights");
        fs::create_dir(job.path(WEIGHTS)).expect("a folder of the test");
    }), Refused(&[WEIGHTS, "not a regular file"])),
    Case::new("weights that are a FIFO", Change(|job| fifo(job, WEIGHTS)), Refused(&[WEIGHTS, "not a regular file"])),
    Case::new("weights that are a device", Change(|job| {
        fs::remove_file(job.path(WEIGHTS)).expect("the job's weights");
        symlink("/dev/zero", job.path(WEIGHTS)).expect("a folder of the test");
    }), Refused(&[WEIGHTS, "not a regular file"])),
    Case::new("weights that are a link to nothing", Change(|job| {
        fs::remove_file(job.path(WEIGHTS)).expect("the job's weights");
        symlink("nowhere", job.path(WEIGHTS)).expect("a folder of the test");
    }), Refused(&[WEIGHTS, "No such file"])),
    Case::new("weights that are a pickle", Change(|job| {
        fs::rename(job.path(WEIGHTS), job.path("model/pytorch_model.bin")).expect("the job's weights");
    }), Refused(&["model", "pytorch_model.bin", "pickle", "convert"])),
    // Indexes.
    Case::new("an index of no JSON", Change(|job| with_index(job, "weights")), Refused(&[INDEX])),
    Case::new("an index without a map", Change(|job| with_index(job, "{}")), Refused(&[INDEX, "`weight_map`"])),
    Case::new("an index of numbers", Change(|job| with_index(job, r#"{"weight_map": {"a": 1}}"#)), Refused(&[INDEX, "weight_map", "string"])),
    Case::new("an index with a key twice", Change(|job| with_index(job, r#"{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}"#)), Refused(&[INDEX, "\"a\" occurs twice"])),
    Case::new("an index that names a file above", Change(|job| index_of(job, "../m.safetensors", "m.safetensors")), Refused(&[INDEX, "\"../m.safetensors\"", "inside"])),
    Case::new("an index that goes down and up", Change(|job| {
        fs::create_dir(job.path("model/sub")).expect("a folder of the test");
        index_of(job, "sub/../../m.safetensors", "m.safetensors");
    }), Refused(&[INDEX, "\"sub/../../m.safetensors\"", "inside"])),
    Case::new("an index that names a place", Change(|job| {
        let place = job.path("m.safetensors");
        index_of(job, place.to_str().expect("a path of the test"), "m.safetensors");
    }), Refused(&[INDEX, "/m.safetensors\"", "inside"])),
    Case::new("an index that goes through a link", Change(|job| {
        fs::create_dir(job.path("outside")).expect("a folder of the test");
        symlink("../outside", job.path("model/link")).expect("a folder of the test");
        index_of(job, "link/m.safetensors", "outside/m.safetensors");
    }), Refused(&[INDEX, "\"link/m.safetensors\"", "inside"])),
    Case::new("an index that names a pickle", Change(|job| index_of(job, "m.bin", "model/m.bin")), Refused(&[INDEX, "\"m.bin\"", ".safetensors"])),
    Case::new("an index that names nothing", Change(|job| index_of(job, "", "m.safetensors")), Refused(&[INDEX, "\"\""])),
    Case::new("an index with a NUL", Change(|job| with_index(job, r#"{"weight_map": {"a": "m\u0000.safetensors"}}"#)), Refused(&["model/m\0.safetensors"])),
    Case::new("an index of what is not there", Change(|job| with_index(job, r#"{"weight_map": {"a": "m.safetensors"}}"#)), Refused(&[INDEX, "weight_map[\"a\"]", "no such tensor"])),
    Case::new("an index that is a FIFO", Change(|job| {
        with_index(job, "");
        fifo(job, INDEX);
    }), Refused(&[INDEX, "not a regular file"])),
    Case::new("an index of hundreds of thousands of tensors", Change(|job| {
        let entries: Vec<String> = (0..300_000).map(|i| format!("\"{i}\":\"m.safetensors\"")).collect();
        with_index(job, &format!("{{\"weight_map\":{{{}}}}}", entries.join(",")));
    }), Refused(&[INDEX, "more than 262144 keys"])),
    Case::new("an index with a long list beside the map", Change(|job| {
        with_index(job, &format!("{{\"more\":[{}0],\"weight_map\":{{}}}}", "0,".repeat(20_000_000)));
    }), Refused(&["model", "no tensors"])),
    // `config.json`.
    Case::new("a config of no JSON", File(CONFIG, b"\x80\x04\x95"), Refused(&[CONFIG])),
    Case::new("a config that is an array", File(CONFIG, b"[]"), Refused(&[CONFIG, "JSON"])),
    Case::new("deep brackets in the config", Change(|job| with_long_value(job, "", "[", 1_000_000, "")), Refused(&[CONFIG, "JSON"])),
    Case::new("a config that is a FIFO", Change(|job| fifo(job, CONFIG)), Refused(&[CONFIG, "not a regular file"])),
    Case::new("a config that is a device", Change(|job| {
        fs::remove_file(job.path(CONFIG)).expect("the job's config");
        symlink("/dev/zero", job.path(CONFIG)).expect("a folder of the test");
    }), Refused(&[CONFIG, "not a regular file"])),
    Case::new("a config with a long list", Change(|job| with_long_value(job, "[", "0,", 30_000_000, "0]")), Refused(&[CONFIG, "bytes"])),
    Case::new("a size beyond any model", ModelConfig("\"hidden_size\": 16", "\"hidden_size\": 1073741824"), Refused(&[CONFIG, "`hidden_size`", "1073741824"])),
    Case::new("a size beyond 64 bits", ModelConfig("\"vocab_size\": 48", "\"vocab_size\": 18446744073709551616"), Refused(&[CONFIG, "`vocab_size`"])),
    Case::new("sizes that make too large a model", ModelConfig("\"hidden_size\": 16, \"intermediate_size\": 24", "\"hidden_size\": 4194304, \"intermediate_size\": 4194304"), Refused(&[CONFIG, "`hidden_size`", "parameters"])),
    Case::new("no layers", ModelConfig("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 0"), Refused(&[CONFIG, "`num_hidden_layers`", "got 0"])),
    Case::new("a billion layers", ModelConfig("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000"), Refused(&[CONFIG, "`num_hidden_layers`", "1000000000"])),
    Case::new("as many layers as may be", ModelConfig("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 10000"), Refused(&["model", "model.layers.2.", "missing", "more"])),
    Case::new("a negative number of heads", ModelConfig("\"num_attention_heads\": 4", "\"num_attention_heads\": -4"), Refused(&[CONFIG, "`num_attention_heads`", "got -4"])),
    Case::new("heads that do not divide", ModelConfig("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"), Refused(&[CONFIG, "`num_key_value_heads`", "got 3"])),
    Case::new("an infinite number", ModelConfig("1e-6", "1e999"), Refused(&[CONFIG])),
    Case::new("another model's code", ModelConfig("LlamaForCausalLM", "EvilForCausalLM\", \"auto_map"), Refused(&[CONFIG, "`architectures`", "EvilForCausalLM"])),
    // A cache's folder of links is as good as any.
    Case::new("the links of a model hub's cache", Change(cache), Works(&["21 tensors", "F32"])),
];

/// The job's model as a hub's cache has it: a folder of links into another one.
fn cache(job: &Job) {
    let snapshot = job.path("hub/models--a--b/snapshots/0123");
    let blobs = job.path("hub/models--a--b/blobs");
    fs::create_dir_all(&snapshot).expect("a folder of the test");
    fs::create_dir(&blobs).expect("a folder of the test");
    fs::remove_file(job.path(WEIGHTS)).expect("the job's weights");
    model::write_sharded(&job.path("model"), &model::tensors(&job.path("model"), Dtype::F32));
    for (number, entry) in fs::read_dir(job.path("model")).expect("the job's model").enumerate() {
        let path = entry.expect("an entry").path();
        let blob = format!("{number:040x}");
        fs::rename(&path, blobs.join(&blob)).expect("a folder of the test");
        let name = path.file_name().expect("a name");
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).expect("a folder of the test");
    }
    job.replace("job.toml", "path = \"model\"", "path = \"hub/models--a--b/snapshots/0123\"");
}
