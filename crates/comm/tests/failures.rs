//! Ranks that die, hang, stay away or call something else: an error that names them, soon, and no trace left.

mod ranks;

use std::time::{Duration, Instant};

use fsdp_comm::{CommError, GatherBuffer, Phase, ProcessGroup, ReduceBuffer, ReduceOp};
use fsdp_control::ControlError;
use fsdp_control::progress::Op;
use ranks::{LONG, connect, report, run, start, start_some};
use rustix::process::Signal;
use tch::{Device, Kind, Tensor};

/// Calls that a rank can wait in: name, op, unit, sequence number, phase.
const WAITS: [(&str, Op, &str, u64, Phase); 5] = [
    ("all_gather", Op::AllGather, "layers.3", 6, Phase::Written),
    ("begin_write", Op::AllGather, "layers.5", 8, Phase::Released),
    ("reduce_scatter", Op::ReduceScatter, "layers.3", 6, Phase::Written),
    ("all_reduce", Op::AllReduce, "", 6, Phase::Written),
    ("barrier", Op::Barrier, "", 6, Phase::Written),
];

/// Name, what each of 2 ranks calls, and how the error names the two calls.
const MISMATCHES: [(&str, [&str; 2], [&str; 2]); 5] = [
    ("bytes", ["all_reduce", "all_reduce of two"], ["(sum, 8 bytes of Double)", "(sum, 16 bytes of Double)"]),
    ("ops", ["all_reduce", "barrier"], ["all_reduce number 6", "barrier number 6"]),
    ("skipped unit", ["all_gather", "all_gather of the next"], ["(layers.3)", "(layers.4)"]),
    ("other buffer", ["all_gather", "reduce_scatter"], ["all_gather number 6", "reduce_scatter number 6"]),
    ("other area", ["reduce_scatter", "all_reduce"], ["reduce_scatter number 6", "all_reduce number 6"]),
];

#[test]
fn a_killed_peer_is_named_at_once() {
    for (case, op, unit, seq, _) in WAITS {
        let mut ranks = start(&format!("victim {case}"), 3);
        for line in killed(&mut ranks, seq) {
            for part in ["PeerLost", "lost: [1]", &format!("op: {op:?}, seq: {seq}"), &format!("unit: {unit:?}")] {
                assert!(line.contains(part), "{case}: no {part:?} in {line}");
            }
        }
    }
}

/// Kills rank 1 once the others wait for it in collective `seq`; what they report.
fn killed(ranks: &mut ranks::Ranks, seq: u64) -> [String; 2] {
    [0, 2].iter().for_each(|&rank| ranks.wait_until_inside(rank, seq));
    ranks.signal(1, Signal::KILL);
    let start = Instant::now();
    let reports = [0, 2].map(|rank| ranks.wait_for(rank).results.pop().expect("a report"));
    assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
    reports
}

#[test]
fn a_stopped_peer_is_a_timeout_that_names_it() {
    for (case, op, unit, seq, phase) in WAITS {
        let mut ranks = start_some(&format!("victim {case}"), 3, 3, Duration::from_millis(1000));
        [0, 2].iter().for_each(|&rank| ranks.wait_until_inside(rank, seq));
        ranks.signal(1, Signal::STOP);
        for rank in [0, 2] {
            let line = ranks.wait_for(rank).results.pop().expect("a report");
            let (call, unit_part) = (format!("op: {op:?}, seq: {seq}"), format!("unit: {unit:?}"));
            for part in ["Timeout", "missing: [1]", &format!("phase: {phase:?}"), &call, &unit_part] {
                assert!(line.contains(part), "{case}: no {part:?} in {line}");
            }
            // The counters still show where it was.
            let snapshot = ranks.progress.snapshot(rank);
            let where_it_was = (snapshot.inside, snapshot.op, snapshot.seq, snapshot.unit.as_str());
            assert_eq!(where_it_was, (true, op, seq, unit), "{case}");
        }
    }
}

#[test]
fn ranks_that_call_different_things_are_told_both() {
    for (name, _, told) in MISMATCHES {
        let start = Instant::now();
        let mut ranks = ranks::start(&format!("mismatch {name}"), 2);
        let reports = [0, 1].map(|rank| ranks.wait_for(rank).results.pop().expect("a report"));
        // The second rank to look may find the first one gone.
        let lines: Vec<&String> = reports.iter().filter(|line| line.contains("different collectives")).collect();
        assert!(!lines.is_empty(), "{name}: {reports:?}");
        for line in lines {
            assert!(told.iter().all(|call| line.contains(call)), "{name}: {line}");
            assert!(line.contains("rank 0 is in") || line.contains("rank 1 is in"), "{name}: {line}");
        }
        assert!(start.elapsed() < LONG / 2, "{name}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let mut ranks = start_some("late", 2, 3, Duration::from_millis(1500));
    for rank in 0..2 {
        assert_eq!(ranks.wait_for(rank).results, ["missing [2]"]);
        let snapshot = ranks.progress.snapshot(rank);
        assert!(
            snapshot.inside && snapshot.seq == 1,
            "the counters tell it from a rank that did not come: {snapshot:?}"
        );
    }
}

/// As when a scheduler suspends a job: no rank may take the others' pause for their death.
#[test]
fn time_in_which_all_ranks_are_stopped_does_not_count() {
    let ranks = start_some("suspended", 2, 2, Duration::from_millis(1500));
    ranks.wait_until_inside(0, 2);
    [0, 1].iter().for_each(|&rank| ranks.signal(rank, Signal::STOP));
    std::thread::sleep(Duration::from_millis(2000));
    [0, 1].iter().for_each(|&rank| ranks.signal(rank, Signal::CONT));
    assert!(ranks.wait().iter().all(|ended| ended.success));
}

#[test]
fn waiting_does_not_burn_a_core() {
    let results = run("idle", 2);
    let cpu_ms: u64 = results[0][0].parse().unwrap();
    assert!(cpu_ms < 50, "{cpu_ms} ms of CPU time to wait 1 s");
}

/// All memory is anonymous, so it goes with the last process, however that ends; and no descriptor stays with a mapping.
#[test]
fn nothing_is_left_behind() {
    for results in run("traces", 3) {
        // The processes of the 3 ranks; no more for 10 buffers. Mappings: the group's, the progress
        // counters, 6 slots, and 6 gradient buffers of each rank.
        assert_eq!(results, ["descriptors 3", "more for buffers 0", "mappings 26, named 0"]);
    }
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let case = ranks::case();
    match case.split_once(' ').unwrap_or((&case, "")) {
        ("victim", wait) => victim(wait),
        ("mismatch", name) => {
            let mut fixture = Fixture::new();
            let (_, calls, _) = MISMATCHES.iter().find(|(n, ..)| *n == name).unwrap();
            report(fixture.call(calls[fixture.group.rank()]).unwrap_err());
        }
        ("late", _) => match connect().unwrap_err() {
            CommError::Control(ControlError::BarrierTimeout { missing, .. }) => report(format!("missing {missing:?}")),
            error => panic!("{error}"),
        },
        ("suspended", _) => {
            let mut group = connect().unwrap();
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_millis(500));
            }
            group.barrier().unwrap();
        }
        ("idle", _) => {
            let mut group = connect().unwrap();
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_secs(1));
            }
            let before = thread_cpu_ms();
            group.barrier().unwrap();
            report(thread_cpu_ms() - before);
        }
        ("traces", _) => {
            let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
            let before = count() - 1; // the inherited progress counters, which are mapped and closed
            let mut fixture = Fixture::new();
            let connected = count();
            report(format!("descriptors {}", connected - before));
            for i in 0..5 {
                fixture.group.new_gather_buffer(&format!("slot.{i}"), 1 << 16).unwrap();
                fixture.group.new_reduce_buffer(&format!("grads.{i}"), 1 << 16).unwrap();
            }
            report(format!("more for buffers {}", count() - connected));
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let ours: Vec<&str> =
                maps.lines().filter(|line| line.contains(" rw-s ") && line.contains("fsdp-")).collect();
            let named = ours.iter().filter(|line| !(line.contains("/memfd:fsdp-") && line.ends_with("(deleted)")));
            report(format!("mappings {}, named {}", ours.len(), named.count()));
        }
        other => panic!("no case {other:?}"),
    }
}

/// Rank 1 stays away from a call until it is killed; the others report their error.
fn victim(wait: &str) {
    let mut fixture = Fixture::new();
    if wait == "begin_write" {
        // Rank 1 does not release the slot.
        fixture.gather("layers.3").unwrap();
        fixture.group.barrier().unwrap();
    }
    if fixture.group.rank() == 1 {
        std::thread::sleep(LONG);
    } else {
        report(format!("{:?}", fixture.call(wait).unwrap_err()));
    }
}

/// A group with buffers; collectives 1 to 5 have made it.
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
        let doubles = |n: i64| Tensor::ones([n], (Kind::Double, Device::Cpu));
        match name {
            "all_reduce" => self.group.all_reduce(&doubles(1), ReduceOp::Sum),
            "all_reduce of two" => self.group.all_reduce(&doubles(2), ReduceOp::Sum),
            "barrier" => self.group.barrier(),
            "all_gather" => self.gather("layers.3"),
            "all_gather of the next" => self.gather("layers.4"),
            "begin_write" => {
                self.group.release(&mut self.slot)?;
                self.group.begin_write(&mut self.slot, "layers.5")
            }
            "reduce_scatter" => {
                self.group.begin_reduce(&mut self.grads, "layers.3")?;
                self.group.start_reduce_scatter(&mut self.grads, &[], "layers.3")?;
                self.group.wait_reduce_scatter(&mut self.grads, &[], false)
            }
            _ => panic!("no call {name:?}"),
        }
    }

    fn gather(&mut self, unit: &str) -> Result<(), CommError> {
        self.group.begin_write(&mut self.slot, unit)?;
        self.group.start_all_gather(&mut self.slot, &[], unit)?;
        self.group.wait_all_gather(&mut self.slot)
    }
}

/// CPU time of this thread.
fn thread_cpu_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<u64>().unwrap() / 1_000_000
}
