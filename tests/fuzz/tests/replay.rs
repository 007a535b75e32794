//! Every promise holds on each input of the corpora, and on mutations of them. One test at a time: memory is the process's.

use std::path::{Path, PathBuf};

use fastrand::Rng;
use fsdp_tests_fuzz::mutation::mutated;
use fsdp_tests_fuzz::{TARGETS, Target};

/// Mutations of each target's corpus.
const NUM_MUTATIONS: usize = 5000;

#[test]
fn promises_hold_on_the_corpora_and_on_mutations_of_them() {
    let mut failed = Vec::new();
    for target in TARGETS {
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        for (path, input) in &corpus {
            if !holds(target, input) {
                failed.push(path.display().to_string());
            }
        }
        let mut rng = Rng::with_seed(7);
        for number in 0..NUM_MUTATIONS {
            let [(path, input), (_, other)] = [(); 2].map(|()| &corpus[rng.usize(0..corpus.len())]);
            let input = mutated(input, other, &mut rng);
            if !holds(target, &input) {
                let text: String = String::from_utf8_lossy(&input).chars().take(200).collect();
                failed.push(format!("mutation {number}, of {}: {text:?}", path.display()));
            }
        }
    }
    let shown: String = failed.iter().take(20).map(|input| format!("\n{input}")).collect();
    assert!(failed.is_empty(), "{} promises are broken, on{shown}", failed.len());
}

fn holds(target: &Target, input: &[u8]) -> bool {
    std::panic::catch_unwind(|| (target.run)(input)).is_ok()
}

/// Path and bytes of each input, in the order of the paths.
fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target.name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
}
