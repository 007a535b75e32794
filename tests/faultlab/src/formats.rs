//! Checkpoints of released versions go on in this one; one of a later version is refused with both numbers.

use std::path::{Path, PathBuf};

use fsdp_checkpoint::sharded::Manifest;
use fsdp_tests_behaviour::job::Job;

use crate::tally::Tally;

/// Versions that wrote checkpoints as none before them; `examples/make_fixture.rs` of each made its folder.
const VERSIONS: [&str; 1] = ["0.1.0"];

/// Processors may round their sums in another order.
const LARGEST_DIFFERENCE: f64 = 1e-5;

const CHECKPOINT: &str = "out/checkpoints/step-00000004";

/// Row 28: all versions, on as many ranks as they were saved by and on others, whatever `n` is.
pub fn read(tally: &mut Tally, _n: usize) {
    for version in VERSIONS {
        for nproc in 1..=3 {
            tally.check(format_args!("{version} on {nproc} ranks"), || goes_on(version, nproc));
        }
    }
    tally.check("a later version", || {
        let job = job_of(VERSIONS[0]);
        let path = job.path(CHECKPOINT).join("manifest.json");
        let mut manifest =
            Manifest::parse(&job.read(&format!("{CHECKPOINT}/manifest.json")), &path).expect("a manifest");
        let version = manifest.format_version;
        manifest.format_version += 1;
        std::fs::write(&path, manifest.to_sealed_text()).expect("a file of the test");
        for resume in ["auto", CHECKPOINT] {
            let ended = job.run(2, &["--set", &format!("checkpoint.resume={resume}")]);
            assert_eq!(ended.status, 2, "{ended:?}");
            let says = format!("format version {}, but this program reads version {version}", version + 1);
            assert!(ended.stderr.contains(&says) && ended.stderr.contains("manifest.json"), "{ended:?}");
            assert!(job.path(CHECKPOINT).is_dir(), "it is left for a newer program");
        }
    });
}

fn goes_on(version: &str, nproc: usize) {
    let job = job_of(version);
    let ended = job.finish(nproc, &[]);
    assert!(ended.stderr.contains("resuming after step 4 "), "{ended:?}");
    let then = std::fs::read_to_string(fixture(version).join("out/metrics.jsonl")).expect("a file of the fixture");
    let loss = |line: &str| line.split_once("\"loss\":")?.1.split_once(',')?.0.parse::<f64>().ok();
    let then: Vec<f64> = then.lines().map(|line| loss(line).expect("a loss")).collect();
    let now = job.losses();
    assert_eq!(now.len(), then[4..].len());
    for (now, then) in now.iter().zip(&then[4..]) {
        assert!((now - then).abs() <= LARGEST_DIFFERENCE * then, "a loss of {now}, in {version} it was {then}");
    }
}

fn fixture(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(version)
}

/// The fixture's job with its checkpoint, and no metrics.
fn job_of(version: &str) -> Job {
    let job = Job::new();
    for folder in ["", "model", CHECKPOINT] {
        let from = fixture(version).join(folder);
        std::fs::create_dir_all(job.path(folder)).expect("a folder of the test");
        for entry in std::fs::read_dir(&from).expect("a folder of the fixture").map(|entry| entry.expect("an entry")) {
            if entry.path().is_file() {
                std::fs::copy(entry.path(), job.path(folder).join(entry.file_name())).expect("a copy");
            }
        }
    }
    job
}
