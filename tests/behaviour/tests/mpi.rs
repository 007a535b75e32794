//! Back end `mpi` through the real binaries: the numbers of `shm`, whoever starts the ranks. Where there is no `mpirun`, or
//! the worker is built without MPI, the tests say so and pass.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fsdp_tests_behaviour::job::Job;

const MPI: &[&str] = &["--backend", "mpi"];
const SETTINGS: &[&str] = &["--set", "training.steps=5", "--set", "precision.param=fp32"];
const HYBRID: &[&str] = &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=2"];

/// `fsdp-train` beside the running test.
fn worker() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.parent().and_then(Path::parent).expect("a target folder").join("fsdp-train")
}

/// Whether MPI can be tested here; says what is missing.
fn has_mpi() -> bool {
    let features = Command::new(worker()).arg("--features").output().expect("fsdp-train: run `cargo build` first");
    let is_built = String::from_utf8_lossy(&features.stdout).lines().any(|line| line == "mpi");
    let is_installed = Command::new("mpirun").arg("--version").output().is_ok();
    for (is_there, what) in
        [(is_built, "fsdp-train is built without --features mpi"), (is_installed, "no mpirun on PATH")]
    {
        if !is_there {
            println!("skipped: {what}");
        }
    }
    is_built && is_installed
}

#[test]
fn losses_are_those_of_shared_memory() {
    if !has_mpi() {
        return;
    }
    for (nproc, more) in [(2, &[][..]), (4, &[]), (4, HYBRID)] {
        let (shm, mpi) = (Job::new(), Job::new());
        shm.finish(nproc, &[SETTINGS, more].concat());
        mpi.finish(nproc, &[MPI, SETTINGS, more].concat());
        mpi.assert_losses_of(&shm);
        // Sums have one order in both.
        assert_eq!(mpi.curve(), shm.curve(), "{nproc} ranks, {more:?}");
        assert!(mpi.exported() == shm.exported(), "{nproc} ranks, {more:?}: the exported models differ");
    }
}

/// The quickstart's own config and data.
#[test]
fn the_quickstart_has_the_losses_of_shared_memory() {
    if !has_mpi() {
        return;
    }
    for nproc in [2, 4] {
        let (shm, mpi) = (Job::quickstart(), Job::quickstart());
        shm.finish(nproc, SETTINGS);
        mpi.finish(nproc, &[MPI, SETTINGS].concat());
        mpi.assert_losses_of(&shm);
    }
}

#[test]
fn mpirun_starts_workers_without_a_launcher() {
    if !has_mpi() {
        return;
    }
    let (shm, mpi) = (Job::new(), Job::new());
    shm.finish(2, SETTINGS);
    let version = Command::new("mpirun").arg("--version").output().expect("it was there").stdout;
    let mut command = Command::new("mpirun");
    if String::from_utf8_lossy(&version).contains("Open MPI") {
        command.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    } else {
        // MPICH tells its ranks nothing from which they could make a port.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        command.env("MASTER_PORT", port.to_string());
    }
    command.args(["-n", "2"]).arg(worker()).arg("job.toml").args(SETTINGS);
    command.current_dir(mpi.path("")).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    let ended = command.output().expect("mpirun");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    mpi.assert_losses_of(&shm);
}
