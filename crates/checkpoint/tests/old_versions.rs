//! A checkpoint of each format version that was ever released loads, value by value; one of a later version is refused
//! with both numbers. The files are kept as `examples/make_fixture.rs` of that version wrote them.

use std::fs;
use std::path::Path;

use fsdp_checkpoint::faults::sample;
use fsdp_checkpoint::sharded::{Checkpoint, Manifest, newest_valid};

#[test]
fn every_released_version_loads_value_by_value() {
    let mut num_versions = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture")).unwrap() {
        let root = entry.unwrap().path();
        if root.is_dir() {
            let dir = root.join("step-00000003");
            assert_eq!(sample::check(&dir), Ok(3));
            assert_eq!(newest_valid(&root).unwrap().checkpoint.unwrap().dir(), dir);
            num_versions += 1;
        }
    }
    assert_eq!(num_versions, 1);
}

#[test]
fn a_later_version_is_refused_with_both_numbers() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture/v1/step-00000003");
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    assert_eq!(sample::check(dir.path()), Ok(3));
    let path = dir.path().join("manifest.json");
    let mut manifest = Manifest::parse(&fs::read_to_string(&path).unwrap(), &path).unwrap();
    manifest.format_version = 2;
    fs::write(&path, manifest.to_sealed_text()).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("format version 2, but this program reads version 1"), "{message}");
    assert!(message.contains(path.to_str().unwrap()), "{message}");
}
