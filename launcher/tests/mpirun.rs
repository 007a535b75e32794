//! Back end `mpi`: the ranks are mpirun's children, and all else is as with ranks of the launcher's own. The worker of
//! the tests needs no MPI to be one of its ranks.

mod job;

use std::process::Command;
use std::time::Duration;

use job::{Job, end, named, send};
use rustix::process::Signal;

/// What the installed MPI says of itself; says so where there is none.
fn mpirun_version() -> Option<String> {
    match Command::new("mpirun").arg("--version").output() {
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => {
            println!("skipped: mpirun (Debian: openmpi-bin): {error}");
            None
        }
    }
}

const MPI: [&str; 2] = ["--backend", "mpi"];

#[test]
fn ranks_are_numbered_by_mpi_and_print_where_they_should() {
    if mpirun_version().is_none() {
        return;
    }
    let job = Job::new(5);
    let ended = job.run(3, "0 2 print=progress;1 3 print=words", &MPI);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stderr, "rank 0 says progress\n");
    assert_eq!(job.read("out/logs/rank-1.out"), "rank 1 says words\n");
    for rank in 0..3 {
        let started = job.read(&format!("out/started-{rank}"));
        let place = format!("rank: {rank}, local_rank: {rank}, world_size: 3, local_world_size: 3");
        assert!(started.contains("started_by: Mpi") && started.contains(&place), "{started}");
        assert!(started.contains("run_id: None") && started.contains("threads=1 "), "{started}");
    }
    assert!(!job.path("out/logs/rank-2.out").exists(), "it printed nothing");
    assert!(job.read("out/config.toml").contains("backend = \"mpi\""));
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn the_first_failure_is_named_and_its_status_comes_through() {
    let Some(version) = mpirun_version() else { return };
    for (script, args, status, culprit, says) in [
        ("1 3 fail=93", &[][..], 93, "1", "failed at step 3: the loss is NaN"),
        ("2 3 print=words;2 4 fail=2", &[][..], 2, "2", "  | rank 2 says words"),
        ("2 3 signal=9", &[][..], 1, "2", "was killed by SIGKILL"),
        ("1 0 exit=3", &[][..], 1, "1", "exited with status 3"),
        ("2 0 exit=2", &[][..], 2, "2", "exited with status 2"),
        ("0 4 fail=1", &["--set", "checkpoint.every_steps=2"][..], 75, "0", "step-00000002 is committed; run the same"),
    ] {
        let job = Job::new(100_000);
        let ended = job.run(3, script, &[&MPI[..], args].concat());
        assert_eq!((ended.status, named(&ended.stderr)), (status, vec![culprit.to_owned()]), "{script}: {ended:?}");
        // Where the MPI does not tell how a rank ended, the store knows that it is gone.
        let is_silent = script.contains("signal") || script.contains("exit");
        let is_gone = is_silent && ended.stderr.contains(") ended without a word");
        assert!(is_gone || ended.stderr.contains(says), "{script}: {ended:?}");
        let started = job.read(&format!("out/started-{culprit}"));
        let pid = started.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
        assert!(ended.stderr.contains(&format!(", pid {pid})")), "{script}: {ended:?}");
        // What mpirun says of it goes to its own file; MPICH's says it on stdout, where rank 0 prints.
        if version.contains("Open MPI") {
            assert!(!ended.stderr.contains("rimary job"), "{ended:?}");
            assert!(job.read("out/logs/mpirun.out").contains("rimary job"), "{ended:?}");
        }
        assert!(ended.took < Duration::from_secs(8), "{script}: {ended:?}");
        job.assert_no_survivors(Duration::from_secs(1));
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_and_killed() {
    if mpirun_version().is_none() {
        return;
    }
    for script in ["2 3 hang", "0 3 spin", "1 3 signal=19"] {
        let job = Job::new(100);
        let ended = job.run(3, script, &[&MPI[..], &["--set", "fsdp.timeout_secs=1"]].concat());
        let culprit = script.split(' ').next().unwrap();
        assert_eq!((ended.status, named(&ended.stderr)), (1, vec![culprit.to_owned()]), "{script}: {ended:?}");
        let line = ended.stderr.lines().next().unwrap();
        let started = job.read(&format!("out/started-{culprit}"));
        let pid = started.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
        let says = format!(", pid {pid}) did not come to all_reduce number 3 for layers.0 (1.0 MiB)");
        assert!(line.ends_with(&says), "{says:?} is not in {ended:?}");
        assert!(ended.took < Duration::from_secs(5), "{script}: {ended:?}");
        job.assert_no_survivors(Duration::from_secs(1));
    }
}

#[test]
fn signals_make_the_ranks_save_and_exit_75() {
    if mpirun_version().is_none() {
        return;
    }
    for signals in [vec![Signal::TERM], vec![Signal::INT, Signal::TERM, Signal::TERM]] {
        let job = Job::new(1_000_000);
        let child = job.start(3, "", &MPI);
        job.wait_for_ranks(3);
        for &signal in &signals {
            send(child.id(), signal);
        }
        let ended = end(child);
        assert_eq!((ended.status, job.checkpoints().len()), (75, 1), "{ended:?}\n{}", job.read("out/logs/mpirun.out"));
        assert!(ended.stderr.contains("fsdp-launch: stopped; out/checkpoints/step-"), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 2, "{ended:?}");
        job.assert_no_survivors(Duration::from_secs(1));
    }
}

#[test]
fn a_signal_while_ranks_start_ends_the_run_too() {
    if mpirun_version().is_none() {
        return;
    }
    for delay_ms in [0, 6, 20, 60, 120, 250] {
        let job = Job::new(1_000_000);
        let child = job.start(2, "", &MPI);
        job.wait_for("out/config.toml");
        std::thread::sleep(Duration::from_millis(delay_ms));
        send(child.id(), Signal::TERM);
        let ended = end(child);
        assert_eq!(ended.status, 75, "{delay_ms} ms: {ended:?}\n{}", job.read("out/logs/mpirun.out"));
        job.assert_no_survivors(Duration::from_secs(1));
    }
}

#[test]
fn a_killed_launcher_leaves_no_mpirun_and_no_rank() {
    if mpirun_version().is_none() {
        return;
    }
    let job = Job::new(1_000_000);
    let mut child = job.start(3, "1 2 hang", &MPI);
    job.wait_for("out/acted-1-2");
    assert!(job.survivors().len() >= 5, "launcher, mpirun, three ranks");
    child.kill().unwrap();
    child.wait().unwrap();
    job.assert_no_survivors(Duration::from_secs(10));
}

#[test]
fn a_machine_without_mpi_is_told_what_to_install() {
    let job = Job::new(3);
    std::fs::create_dir(job.path("path")).unwrap();
    std::os::unix::fs::symlink("/usr/bin/env", job.path("path/env")).unwrap();
    let mut command = job.command(&["--backend", "mpi", "job.toml"]);
    let ended = end(command.env("PATH", job.path("path")).spawn().unwrap());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("expected mpirun or mpiexec in PATH, got neither; install Open MPI"), "{ended:?}");
    // Something that is called so, but is no MPI's.
    job.write("path/mpirun", "#!/bin/sh\necho sweets 1.0\n");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(job.path("path/mpirun"), executable).unwrap();
    let mut command = job.command(&["--backend", "mpi", "job.toml"]);
    let ended = end(command.env("PATH", job.path("path")).spawn().unwrap());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("expected Open MPI or MPICH (Hydra, Intel MPI), got \"sweets 1.0\""), "{ended:?}");
}

#[test]
fn a_worker_without_mpi_is_refused_before_mpirun_starts_it() {
    if mpirun_version().is_none() {
        return;
    }
    let job = Job::new(3);
    std::fs::remove_file(job.path("bin/fsdp-train")).unwrap();
    job.write("bin/fsdp-train", "#!/bin/sh\necho shm\necho nccl\n");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(job.path("bin/fsdp-train"), executable).unwrap();
    let ended = job.run(2, "", &MPI);
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("to be built with MPI, got one with shm, nccl; build it with"), "{ended:?}");
    assert!(!job.path("out").exists());
}

/// SLURM may have mpirun start ranks on another node, from where this one's loopback cannot be reached; and one run of a
/// job of several nodes may have been meant to use all of them.
#[test]
fn within_a_slurm_job_the_store_can_be_reached_from_other_nodes() {
    if mpirun_version().is_none() {
        return;
    }
    let job = Job::new(3);
    let slurm = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "1")];
    let mut command = job.command(&["--nproc", "2", "--backend", "mpi", "job.toml"]);
    // Open MPI would ask SLURM.
    let mpirun = [("OMPI_MCA_plm", "isolated"), ("OMPI_MCA_ras", "simulator")];
    let ended = end(command.envs(slurm).envs(mpirun).spawn().unwrap());
    assert_eq!(ended.status, 0, "{ended:?}\n{}", job.read("out/logs/mpirun.out"));
    let addr = format!("master_addr: {:?}", fsdp_control::host_name());
    assert!(job.read("out/started-1").contains(&addr), "{}", job.read("out/started-1"));

    let job = Job::new(3);
    let mut command = job.command(&["--nproc", "1", "--backend", "shm", "job.toml"]);
    let ended = end(command.envs([("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "2")]).spawn().unwrap());
    assert_eq!(ended.status, 0, "{ended:?}");
    let warning = "fsdp-launch: warning: this SLURM job has 2 nodes, and this run uses one; use all with srun";
    assert!(ended.stderr.starts_with(warning) && ended.stderr.lines().count() == 1, "{ended:?}");
}
