//! The back end `mpi`, with real ranks under `mpirun`. Without one the tests say so and pass.
#![cfg(feature = "mpi")]

mod ranks;

use std::time::{Duration, Instant};

use fsdp_comm::mpi::abort_job;
use fsdp_comm::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp, Segment};
use fsdp_control::ControlError;
use ranks::mpirun::{self, connect, is_there, report, run, start, start_some, store};
use ranks::walk::Walk;
use ranks::{LONG, table};
use rustix::process::{Pid, Signal};
use tch::{Device, Kind, Tensor};

/// Longer than a start, shorter than a test.
const SHORT: Duration = Duration::from_millis(3000);

/// What each of 3 ranks calls while rank 1 hangs, and how the others' error names it. Collectives 1 to 3 have made the
/// group and its buffers.
const WAITS: [(&str, &str); 5] = [
    ("all_gather", "all_gather number 4 (12 bytes of Float, layers.3)"),
    ("reduce_scatter", "reduce_scatter number 4 (12 bytes of Float, layers.3)"),
    ("small all_reduce", "all_reduce number 4 (sum, 8 bytes of Double)"),
    ("large all_reduce", "all_reduce number 4 (sum, 10000000 bytes of BFloat16)"),
    ("new_buffer", "new_buffer number 4 (12 bytes, slot)"),
];

/// What each of 2 ranks calls, and how both calls are named. On one communicator, as for two calls on plain tensors, it is
/// up to the MPI library what becomes of calls that differ.
const MISMATCHES: [([&str; 2], [&str; 2]); 2] = [
    (["reduce_scatter", "all_gather"], ["reduce_scatter number 4 (8 bytes", "all_gather number 4 (8 bytes"]),
    (["all_gather", "small all_reduce"], ["all_gather number 4", "all_reduce number 4 (sum, 8 bytes of Double)"]),
];

#[test]
fn collectives_agree_with_a_plain_computation() {
    if !is_there() {
        return;
    }
    for world_size in 1..=4 {
        let results = run("all", world_size);
        assert!(results.iter().all(|r| r == &results[0] && !r.is_empty()), "ranks differ");
    }
}

#[test]
fn large_all_reduces_and_buffers_may_be_under_way_together() {
    if is_there() {
        run("together", 3);
    }
}

#[test]
fn slots_keep_their_contents_while_ranks_drift_apart() {
    if is_there() {
        run("skew", 3);
    }
}

#[test]
fn groups_that_are_split_work_beside_each_other() {
    if is_there() {
        run("split", 4);
    }
}

#[test]
#[ignore = "needs 10 GiB of memory"]
fn ranges_may_be_longer_than_an_i32_counts() {
    if is_there() {
        run("long", 2);
    }
}

#[test]
fn a_rank_that_hangs_is_named() {
    if !is_there() {
        return;
    }
    let jobs: Vec<_> = WAITS.iter().map(|(case, _)| start_some(&format!("hang {case}"), 3, 3, SHORT)).collect();
    for (mut job, (case, call)) in jobs.into_iter().zip(WAITS) {
        for rank in [0, 2] {
            let line = job.wait_for_results(rank, 1).pop().unwrap();
            let start = format!("rank {rank}: rank 1 did not enter {call} within ");
            assert!(line.starts_with(&start), "{case}: {line}");
        }
        assert_eq!(job.wait(), Some(7), "{case}: the job ends with the failed rank's status");
    }
}

#[test]
fn ranks_that_call_different_things_are_told_both() {
    if !is_there() {
        return;
    }
    let jobs: Vec<_> = (0..MISMATCHES.len()).map(|i| start_some(&format!("mismatch {i}"), 2, 2, SHORT)).collect();
    for (job, (calls, told)) in jobs.into_iter().zip(MISMATCHES) {
        for rank in 0..2 {
            let line = job.wait_for_results(rank, 1).pop().unwrap();
            assert!(line.starts_with("ranks call different collectives: "), "{calls:?}: {line}");
            assert!(told.iter().all(|call| line.contains(call)), "{calls:?}: {line}");
        }
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    if !is_there() {
        return;
    }
    let mut job = start_some("late", 2, 3, SHORT);
    for rank in 0..2 {
        assert_eq!(job.wait_for_results(rank, 1), ["missing [2]"]);
    }
    job.wait();
}

#[test]
fn a_process_that_no_mpi_started_is_told_so() {
    let mut ranks = ranks::start("alone", 2);
    for rank in 0..2 {
        let line = ranks.wait_for(rank).results.pop().expect("a report");
        assert!(line.contains("MPI knows 1 process(es)") && line.contains("mpirun"), "{line}");
    }
}

#[test]
fn a_killed_rank_ends_the_job() {
    if !is_there() {
        return;
    }
    let mut job = start("killed", 3);
    let pids: Vec<i32> = (0..3).map(|rank| job.wait_for_results(rank, 1)[0].parse().unwrap()).collect();
    let pids = pids.into_iter().map(|pid| Pid::from_raw(pid).unwrap()).collect::<Vec<_>>();
    rustix::process::kill_process(pids[1], Signal::KILL).unwrap();
    let start = Instant::now();
    assert_ne!(job.wait(), Some(0));
    assert!(start.elapsed() < LONG / 2, "took {:?}", start.elapsed());
    // Ended, though perhaps nobody has asked for the status yet.
    let runs = |pid: &Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    while pids.iter().any(runs) {
        assert!(start.elapsed() < LONG / 2, "ranks still run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn waiting_does_not_burn_a_core() {
    if !is_there() {
        return;
    }
    let results = run("idle", 2);
    let cpu_ms: u64 = results[0][0].parse().unwrap();
    assert!(cpu_ms < 100, "{cpu_ms} ms of CPU time to wait 1 s");
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let case = ranks::case();
    let (case, argument) = case.split_once(' ').unwrap_or((&case, ""));
    match case {
        "all" => with_group(|group| report(table::every_collective(group))),
        "together" => with_group(together),
        "skew" => with_group(|group| Walk::new(group).unwrap().rounds(group, 40).unwrap()),
        "split" => with_group(split),
        "long" => with_group(long),
        "hang" => {
            let mut fixture = Fixture::new();
            if fixture.group.rank() == 1 {
                std::thread::sleep(LONG);
            }
            fail(fixture.call(argument));
        }
        "mismatch" => {
            let (calls, _) = MISMATCHES[argument.parse::<usize>().unwrap()];
            let mut fixture = Fixture::new();
            report(fixture.call(calls[fixture.group.rank()]).unwrap_err());
            std::thread::sleep(SHORT); // for the other one to report too
            abort_job(7);
        }
        "late" => match connect().unwrap_err() {
            CommError::Control(ControlError::BarrierTimeout { missing, .. }) => report(format!("missing {missing:?}")),
            error => panic!("{error}"),
        },
        "alone" => {
            let env = fsdp_control::env::WorkerEnv::from_env().unwrap();
            let mut store = fsdp_control::store::Store::connect((&env.master_addr, env.master_port), LONG).unwrap();
            let error = ProcessGroup::connect_mpi(&mut store, env.rank, env.world_size, LONG, None).unwrap_err();
            ranks::report(error);
        }
        "killed" => {
            let mut group = connect().unwrap();
            report(std::process::id());
            if group.rank() == 1 {
                std::thread::sleep(LONG);
            }
            group.barrier().unwrap();
        }
        "idle" => with_group(|group| {
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_secs(1));
            }
            let before = thread_cpu_ms();
            group.barrier().unwrap();
            report(thread_cpu_ms() - before);
        }),
        other => panic!("no case {other:?}"),
    }
}

/// Joins, does something and leaves in good order.
fn with_group(run: impl FnOnce(&mut ProcessGroup)) {
    let mut group = connect().unwrap();
    run(&mut group);
    group.close().unwrap();
}

/// Reports an error and ends the job, as a rank does that fails. Rank 2 leaves that to rank 0.
fn fail(result: Result<(), CommError>) {
    report(result.unwrap_err());
    if mpirun::rank() == 0 {
        std::thread::sleep(SHORT); // for the other one to report too
        abort_job(7);
    }
    std::thread::sleep(LONG);
}

/// All-reduces of many chunks and of few elements, begun before a gather and a reduction and waited for after them.
fn together(group: &mut ProcessGroup) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let numel = 1000 * world_size;
    let segment = Segment { kind: Kind::Float, offset_bytes: 0, numel };
    let mut slot = group.new_gather_buffer("slot", numel * 4).unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Int64] {
        // Up to 24 MiB: chunks of 4 MiB, the last one small.
        let tensors: Vec<Tensor> = [3 << 20, 5, (2 << 20) + 1, 70_001]
            .iter()
            .map(|&n: &i64| (Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(100) + rank as i64).to_kind(kind))
            .collect();
        let works: Vec<_> = tensors.iter().map(|t| group.start_all_reduce(t, ReduceOp::Sum).unwrap()).collect();
        group.begin_write(&mut slot, "unit").unwrap();
        let _ = slot.view(Kind::Float, rank * 4000, 1000).fill_(rank as f64);
        group.start_all_gather(&mut slot, &[segment], "unit").unwrap();
        // A new buffer while the queue is not empty.
        let mut grads = group.new_reduce_buffer("grads", numel * 4).unwrap();
        group.begin_reduce(&mut grads, "unit").unwrap();
        let _ = grads.view(Kind::Float, 0, numel).fill_(rank as f64);
        group.start_reduce_scatter(&mut grads, &[segment], "unit").unwrap();
        group.wait_all_gather(&mut slot).unwrap();
        for other in 0..world_size {
            assert_eq!(slot.view(Kind::Float, other * 4000, 1000).mean(Kind::Float).double_value(&[]), other as f64);
        }
        group.release(&mut slot).unwrap();
        for work in works {
            group.wait(work).unwrap();
        }
        for tensor in &tensors {
            let n = tensor.numel() as i64;
            let sum_of_ranks = (world_size * (world_size - 1) / 2) as i64;
            let first = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(100);
            // Whole numbers up to 300: a bf16 has 8 bits, and each is rounded once.
            assert_eq!(*tensor, (first * world_size as i64 + sum_of_ranks).to_kind(kind), "{kind:?}, {n} elements");
        }
        let shard = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        group.wait_reduce_scatter(&mut grads, &[&shard], false).unwrap();
        assert_eq!(shard.mean(Kind::Float).double_value(&[]), (world_size * (world_size - 1) / 2) as f64);
    }
}

/// Ranks 0, 1 | 2, 3 share shards, 0, 2 | 1, 3 are replicas.
fn split(group: &mut ProcessGroup) {
    let rank = group.rank();
    let mut store = store();
    let mut shard = group.split(&mut store, rank / 2, "shard").unwrap();
    let mut replicate = group.split(&mut store, rank % 2, "replicate").unwrap();
    assert_eq!((shard.rank(), shard.world_size()), (rank % 2, 2));
    assert_eq!((replicate.rank(), replicate.world_size()), (rank / 2, 2));
    let sum = |group: &mut ProcessGroup, value: usize| {
        let tensor = Tensor::from_slice(&[value as i64]);
        group.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        tensor.int64_value(&[0])
    };
    let big = Tensor::from_slice(&vec![rank as f32; 3 << 20]);
    let work = replicate.start_all_reduce(&big, ReduceOp::Sum).unwrap();
    assert_eq!(sum(&mut shard, 1 << rank), [3, 12][rank / 2]);
    assert_eq!(sum(&mut replicate, 1 << rank), [5, 10][rank % 2]);
    assert_eq!(sum(group, 1 << rank), 15);
    replicate.wait(work).unwrap();
    assert_eq!(big.mean(Kind::Double).double_value(&[]), [2.0, 4.0][rank % 2]);
    table::every_collective(&mut shard);
    shard.close().unwrap();
    replicate.close().unwrap();
}

/// Ranges of 2 GiB and some more.
fn long(group: &mut ProcessGroup) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let numel = (1 << 29) + 1000; // f32 of a rank
    let mut slot = group.new_gather_buffer("slot", world_size * numel * 4).unwrap();
    group.begin_write(&mut slot, "unit").unwrap();
    let _ = slot.view(Kind::Float, rank * numel * 4, numel).fill_(rank as f64 + 1.0);
    let segment = Segment { kind: Kind::Float, offset_bytes: 0, numel: world_size * numel };
    group.start_all_gather(&mut slot, &[segment], "unit").unwrap();
    group.wait_all_gather(&mut slot).unwrap();
    let all = slot.view(Kind::Float, 0, world_size * numel);
    let root = all.narrow(0, 0, numel as i64 + 5);
    for other in 0..world_size {
        let range = all.narrow(0, (other * numel) as i64, numel as i64);
        let (min, max) = (range.min().double_value(&[]), range.max().double_value(&[]));
        assert_eq!((min, max), (other as f64 + 1.0, other as f64 + 1.0));
    }
    if rank == 0 {
        let _ = root.shallow_clone().fill_(7.0);
    }
    group.broadcast(&root, 0).unwrap();
    assert_eq!((root.min().double_value(&[]), root.max().double_value(&[])), (7.0, 7.0));
    assert_eq!(all.get(numel as i64 + 5).double_value(&[]), 2.0);
}

/// A group with buffers.
struct Fixture {
    group: ProcessGroup,
    slot: GatherBuffer,
    grads: ReduceBuffer,
}

impl Fixture {
    fn new() -> Self {
        let mut group = connect().unwrap();
        let slot = group.new_gather_buffer("slot", 12).unwrap();
        let grads = group.new_reduce_buffer("grads", 12).unwrap();
        Fixture { group, slot, grads }
    }

    /// One of the calls in the tables above.
    fn call(&mut self, name: &str) -> Result<(), CommError> {
        let numel = 12 / 4 / self.group.world_size() * self.group.world_size();
        let segments = [Segment { kind: Kind::Float, offset_bytes: 0, numel }];
        let all_reduce = |group: &mut ProcessGroup, n: i64, kind: Kind| {
            group.all_reduce(&Tensor::ones([n], (kind, Device::Cpu)), ReduceOp::Sum)
        };
        match name {
            "small all_reduce" => all_reduce(&mut self.group, 1, Kind::Double),
            "large all_reduce" => all_reduce(&mut self.group, 5_000_000, Kind::BFloat16),
            "barrier" => self.group.barrier(),
            "new_buffer" => self.group.new_gather_buffer("slot", 12).map(|_| ()),
            "all_gather" => {
                self.group.begin_write(&mut self.slot, "layers.3")?;
                self.group.start_all_gather(&mut self.slot, &segments, "layers.3")?;
                self.group.wait_all_gather(&mut self.slot)
            }
            "reduce_scatter" => {
                self.group.begin_reduce(&mut self.grads, "layers.3")?;
                self.group.start_reduce_scatter(&mut self.grads, &segments, "layers.3")?;
                let out = Tensor::zeros([(numel / self.group.world_size()) as i64], (Kind::Float, Device::Cpu));
                self.group.wait_reduce_scatter(&mut self.grads, &[&out], false)
            }
            _ => panic!("no call {name:?}"),
        }
    }
}

/// CPU time of this thread.
fn thread_cpu_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<u64>().unwrap() / 1_000_000
}
