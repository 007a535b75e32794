//! The invariants of ARCHITECTURE.md that a machine can check.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_path_buf()
}

/// Names of all crates that `package` is built from, itself included.
fn dependencies(package: &str) -> Vec<String> {
    let args = ["tree", "--offline", "--locked", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"];
    let output = Command::new(env!("CARGO")).args(args).args(["-p", package]).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<String> = text.lines().filter_map(|l| l.split_whitespace().next()).map(str::to_string).collect();
    assert!(names.contains(&package.to_string()), "{text}");
    names
}

#[test]
fn crates_depend_only_on_what_they_may_know() {
    let tensor_free = ["fsdp-launch", "fsdp-config", "fsdp-plan", "fsdp-data", "fsdp-checkpoint", "fsdp-control"];
    let mut forbidden: Vec<(&str, &str)> =
        tensor_free.iter().flat_map(|&p| [(p, "tch"), (p, "torch-sys"), (p, "fsdp-torch-ext")]).collect();
    forbidden.extend([
        ("fsdp-control", "fsdp-config"),
        ("fsdp-checkpoint", "fsdp-config"),
        ("fsdp-checkpoint", "fsdp-plan"),
        ("fsdp-comm", "fsdp-plan"),
        ("fsdp-comm", "fsdp-config"),
        ("fsdp-model", "fsdp-comm"),
        ("fsdp-model", "fsdp-control"),
        ("fsdp-model", "fsdp-checkpoint"),
        ("fsdp", "fsdp-data"),
        ("fsdp", "fsdp-checkpoint"),
        ("fsdp-train", "fsdp-launch"),
    ]);
    for (package, other) in forbidden {
        assert!(!dependencies(package).contains(&other.to_string()), "{package} must not depend on {other}");
    }
}

#[test]
fn unsafe_code_is_only_where_it_is_allowed() {
    let allowed = ["crates/torch-ext", "crates/comm", "crates/control"].map(|p| root().join(p));
    let members = ["launcher", "crates", "tests"].map(|p| root().join(p));
    let mut sources = Vec::new();
    members.iter().for_each(|dir| collect_sources(dir, &mut sources));
    assert!(sources.len() > 50, "{} source files", sources.len());
    // Spelt in two parts, so that this file does not find itself.
    let word = concat!("un", "safe");
    for path in sources.iter().filter(|path| !allowed.iter().any(|a| path.starts_with(a))) {
        let text = std::fs::read_to_string(path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let found = code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word);
            assert!(!found, "{}:{}: {line}", path.display(), number + 1);
        }
    }
}

fn collect_sources(dir: &Path, sources: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_sources(&path, sources);
        } else if path.extension().is_some_and(|e| e == "rs") {
            sources.push(path);
        }
    }
}
