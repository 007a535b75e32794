//! The files of `scripts/slurm/` on a real SLURM of two nodes, which `scripts/local_slurm.sh` makes of this machine. Where
//! it cannot, the tests say why and pass. (What SLURM does to jobs that train is in `tests/faultlab/src/slurm.rs`.)

use fsdp_tests_behaviour::job::{Job, built};
use fsdp_tests_behaviour::slurm::{Cluster, Submitted, batch_file};

const SETTINGS: &[&str] = &["--set", "training.steps=5", "--set", "precision.param=fp32"];
/// Both nodes are one machine, so shared memory reaches both.
const SHM: &[&str] = &["--set", "fsdp.backend=shm"];
/// Shards within a node of two ranks, replicas across.
const HYBRID: &[&str] = &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=2"];

fn start() -> Option<Cluster> {
    Cluster::start().map_err(|reason| println!("skipped: {reason}")).ok()
}

/// Submits one of the project's files with `num_tasks` tasks on each of two nodes, and the arguments for the program.
fn submit<'a>(cluster: &'a Cluster, job: &'a Job, file: &str, num_tasks: usize, args: &[&[&str]]) -> Submitted<'a> {
    let bin = built("fsdp-launch");
    let bin = bin.parent().expect("a folder").display().to_string();
    let tasks = format!("--ntasks-per-node={num_tasks}");
    let file = batch_file(file).display().to_string();
    // There are no GPUs here, and no time for a second try.
    let options = ["--time=5", "--gpus-per-node=0", "--no-requeue", &tasks, &file];
    let _ = std::fs::remove_file(job.path("log"));
    cluster.submit(job, &[("FSDP_BIN", &bin)], &[&options, &args.concat()[..]].concat())
}

#[test]
fn mpi_trains_over_two_nodes_to_the_losses_of_shared_memory() {
    let Some(cluster) = start() else { return };
    if let Err(reason) = cluster.has_mpi(&built("fsdp-train")) {
        return println!("skipped: {reason}");
    }
    for (num_tasks, more) in [(1, &[][..]), (2, HYBRID)] {
        let (slurm, shm) = (Job::new(), Job::new());
        shm.finish(2 * num_tasks, &[SETTINGS, more].concat());
        submit(&cluster, &slurm, "mpi.sbatch", num_tasks, &[&["job.toml"], SETTINGS, more]).finish();
        slurm.assert_losses_of(&shm);
        assert!(slurm.exported() == shm.exported(), "{num_tasks} ranks a node: the exported models differ");
    }
    let (slurm, shm) = (Job::quickstart(), Job::quickstart());
    shm.finish(2, SETTINGS);
    submit(&cluster, &slurm, "mpi.sbatch", 1, &[&["job.toml"], SETTINGS]).finish();
    slurm.assert_losses_of(&shm);
}

#[test]
fn a_launcher_a_node_trains_over_two_nodes() {
    let Some(cluster) = start() else { return };
    for (nproc, more) in [("1", &[][..]), ("2", HYBRID)] {
        let (slurm, shm) = (Job::new(), Job::new());
        shm.finish(2 * nproc.parse::<usize>().expect("a number"), &[SETTINGS, more].concat());
        let args = [&["--nproc", nproc, "job.toml"], SETTINGS, SHM, more];
        submit(&cluster, &slurm, "one_task_per_node.sbatch", 1, &args).finish();
        slurm.assert_losses_of(&shm);
        assert!(slurm.exported() == shm.exported(), "{nproc} ranks a node: the exported models differ");
    }
}

#[test]
fn a_task_a_rank_trains_over_two_nodes_without_a_launcher() {
    let Some(cluster) = start() else { return };
    let (slurm, shm) = (Job::new(), Job::new());
    shm.finish(4, SETTINGS);
    submit(&cluster, &slurm, "one_task_per_gpu.sbatch", 2, &[&["job.toml"], SETTINGS, SHM]).finish();
    slurm.assert_losses_of(&shm);

    // Over nodes, CPU ranks need MPI unless told otherwise.
    let job = Job::new();
    let refused = submit(&cluster, &job, "one_task_per_gpu.sbatch", 1, &[&["job.toml"]]);
    assert_eq!(refused.end(), ("FAILED".to_owned(), "2:0".to_owned()), "{}", refused.log());
    assert!(refused.log().contains("srun --mpi=pmix"), "{}", refused.log());
}
