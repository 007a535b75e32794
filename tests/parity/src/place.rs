//! What the runs compute on, and where binaries and goldens lie, by variables:
//!
//! | variable | default | |
//! |---|---|---|
//! | `FSDP_TEST_DEVICE` | `cpu` | `[fsdp] device` of all runs: `cpu` or `cuda` |
//! | `FSDP_TEST_NCCL_RANKS` | 1 | on `cuda`: the most ranks that NCCL connects, one GPU each; more share GPUs through `shm` |
//! | `FSDP_TEST_BINARIES` | the tests' target folder | the folder of `fsdp-launch` and `fsdp-train` |
//! | `FSDP_TEST_GOLDENS` | `goldens/` beside this package's `Cargo.toml` | the goldens' folder |

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

/// What a run computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestDevice {
    Cpu,
    Cuda { nccl_ranks: u64 },
}

impl TestDevice {
    /// # Errors
    /// A variable has a value that is none of its values.
    pub fn from_env() -> Result<Self> {
        match std::env::var("FSDP_TEST_DEVICE").as_deref().unwrap_or("cpu") {
            "cpu" => Ok(TestDevice::Cpu),
            "cuda" => {
                let ranks = std::env::var("FSDP_TEST_NCCL_RANKS").unwrap_or_else(|_| "1".to_owned());
                let what = || format!("FSDP_TEST_NCCL_RANKS: expected a number of ranks, got {ranks:?}");
                Ok(TestDevice::Cuda { nccl_ranks: ranks.parse().with_context(what)? })
            }
            other => bail!("FSDP_TEST_DEVICE: expected \"cpu\" or \"cuda\", got {other:?}"),
        }
    }

    /// `[fsdp] device` and `backend` of a run of `nproc` ranks.
    pub fn device_and_backend(self, nproc: u64) -> (&'static str, &'static str) {
        match self {
            TestDevice::Cpu => ("cpu", "shm"),
            TestDevice::Cuda { nccl_ranks } if nproc <= nccl_ranks => ("cuda", "nccl"),
            TestDevice::Cuda { .. } => ("cuda", "shm"),
        }
    }
}

/// The launcher, with the worker beside it.
///
/// # Errors
/// They are not built.
pub fn launcher() -> Result<PathBuf> {
    let folder = match std::env::var_os("FSDP_TEST_BINARIES") {
        Some(folder) => PathBuf::from(folder),
        // target/<profile>/deps/<test>
        None => {
            let test = std::env::current_exe()?;
            test.ancestors().nth(2).context("the test is in no target folder")?.to_owned()
        }
    };
    for binary in ["fsdp-launch", "fsdp-train"] {
        let path = folder.join(binary);
        let profile = if folder.ends_with("release") { " --release" } else { "" };
        ensure!(path.exists(), "{} is missing: run `cargo build{profile}` first", path.display());
    }
    Ok(folder.join("fsdp-launch"))
}

/// The folder of all goldens.
pub fn goldens() -> PathBuf {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens");
    std::env::var_os("FSDP_TEST_GOLDENS").map_or_else(default, PathBuf::from)
}
