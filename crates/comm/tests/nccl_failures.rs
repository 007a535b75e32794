//! The back end `nccl` over its test double, when something goes wrong: an error that names rank, collective and unit,
//! within the timeout and 5 s, and communicators that are aborted.

mod ranks;

use std::time::{Duration, Instant};

use fsdp_comm::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp, Segment};
use fsdp_control::store::{Store, StoreServer};
use ranks::double::{DoubleRanks, connect, connect_through, start_some};
use ranks::{LONG, report};
use rustix::process::Signal;
use tch::{Device, Kind, Tensor};

/// Long enough for many ranks to start on a busy machine.
const TIMEOUT: Duration = Duration::from_millis(2500);
/// From the timeout to the end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What ranks 0 and 2 call while rank 1 stays away, and how their error names it. Collectives 1 to 3 have made the group
/// and its buffers.
const WAITS: [(&str, &str); 4] = [
    ("all_gather", "all_gather number 4 (24 bytes of Float, layers.3)"),
    ("reduce_scatter", "reduce_scatter number 4 (24 bytes of Float, layers.3)"),
    ("all_reduce", "all_reduce number 4 (sum, 8 bytes of Double)"),
    ("barrier", "barrier number 4"),
];

/// Rank 1's thread sleeps: its watchdog answers that it has not called, and ends the process 5 s after it has aborted.
#[test]
fn a_rank_that_stays_away_is_named_and_ended() {
    let jobs: Vec<_> = WAITS.iter().map(|(case, _)| start(&format!("away {case}"), 3, "")).collect();
    for (mut job, (case, call)) in jobs.into_iter().zip(WAITS) {
        for rank in [0, 2] {
            assert_named(&mut job, rank, &format!("rank {rank}: rank 1 did not enter {call} within "), case);
        }
        let ended = job.ranks.wait_for(1);
        assert!(!ended.success && ended.signal.is_none(), "{case}: {ended:?}");
        for rank in 0..3 {
            assert_eq!(job.count(rank, "ncclCommAbort"), 1, "{case}");
        }
    }
}

/// Rank 1 as a whole is stopped, so nobody answers for it.
#[test]
fn a_stopped_rank_is_named() {
    let mut job = start("stopped", 3, "");
    for rank in [0, 2] {
        job.ranks.wait_until_inside(rank, 4);
    }
    job.ranks.signal(1, Signal::STOP);
    for rank in [0, 2] {
        assert_named(&mut job, rank, &format!("rank {rank}: rank 1 did not enter barrier number 4 within "), "stopped");
    }
    // The counters still show where it was.
    let snapshot = job.ranks.progress.snapshot(0);
    assert!(snapshot.inside && snapshot.seq == 4, "{snapshot:?}");
}

/// All have called it and the device hangs: nobody is behind.
#[test]
fn a_collective_that_hangs_by_itself_is_named() {
    let mut job = start("hang", 2, "never_join 1 2");
    for rank in 0..2 {
        let expected =
            format!("rank {rank}: some rank did not enter all_gather number 5 (24 bytes of Float, layers.4)");
        assert_named(&mut job, rank, &expected, "hang");
    }
}

#[test]
fn ranks_that_call_different_things_are_told_both() {
    let mut job = start("mismatch", 2, "");
    let calls = ["all_gather number 4 (24 bytes of Float, layers.3)", "barrier number 4"];
    for rank in 0..2 {
        let other = 1 - rank;
        let expected = format!(
            "ranks call different collectives: rank {rank} is in {}, rank {other} in {}",
            calls[rank], calls[other]
        );
        assert_named(&mut job, rank, &expected, "mismatch");
    }
}

/// Long before the timeout: an error of NCCL on one rank ends the others too.
#[test]
fn an_error_of_nccl_is_told_with_its_text() {
    let kinds =
        [(6, "remote process exited or there was a network error", "PeerLost"), (3, "unhandled error", "Other")];
    for (status, text, kind) in kinds {
        let start = Instant::now();
        let mut job = start_some("hang", 2, 2, LONG, &format!("async_error 1 2 {status}"));
        let call = "all_gather number 5 (24 bytes of Float, layers.4)";
        let [kind_line, line] = job.ranks.wait_for(1).results.try_into().unwrap();
        assert!(line.starts_with(&format!("rank 1: NCCL: ncclAllGather: {text}")), "{line}");
        assert!(line.ends_with(&format!("(the double was told to fail) in {call}")), "{line}");
        assert_eq!(kind_line, kind);
        let results = job.ranks.wait_for(0).results;
        assert_eq!(
            results,
            ["PeerLost".to_owned(), format!("rank 0: rank 1 has given up; the last call here was {call}")]
        );
        assert!(start.elapsed() < END_LIMIT, "took {:?}", start.elapsed());
    }
}

/// The watchdog sees an error while the rank's thread does not look.
#[test]
fn an_error_while_the_thread_is_elsewhere_is_told_by_the_next_call() {
    let mut job = start_some("elsewhere", 2, 2, LONG, "async_error 1 1 3");
    let line = job.ranks.wait_for(1).results.pop().unwrap();
    assert!(line.starts_with("rank 1: NCCL: ") && line.contains("unhandled error of the double"), "{line}");
}

#[test]
fn a_slow_start_is_waited_for_and_one_that_hangs_is_not() {
    for ended in start_some("connect", 2, 2, LONG, "slow_init 700").ranks.wait() {
        assert_eq!(ended.results, ["connected"]);
    }
    for (rank, ended) in start("connect", 2, "slow_init 6000").ranks.wait().into_iter().enumerate() {
        let line = &ended.results[0];
        let expected = format!("rank {rank}: NCCL: ncclCommInitRankConfig: not done within 2.5 s in barrier number 1");
        assert!(line.starts_with(&expected), "{line}");
    }
    let mut late = start_some("connect", 1, 2, TIMEOUT, "");
    let line = late.ranks.wait_for(0).results.pop().unwrap();
    assert!(line.contains("[1] did not arrive"), "{line}");
}

/// What the run has computed is there by then.
#[test]
fn an_end_that_takes_too_long_is_no_failure() {
    let mut job = start_some("close", 2, 2, LONG, "slow_finalize 6000");
    for rank in 0..2 {
        assert_eq!(job.ranks.wait_for(rank).results, ["closed"]);
        assert_eq!((job.count(rank, "ncclCommAbort"), job.count(rank, "ncclCommDestroy")), (1, 0));
    }
}

/// Rank 1 calls nothing when rank 0 gives up on it, but would use what its device has computed.
#[test]
fn a_failure_shows_without_a_call() {
    let mut job = start("check", 2, "");
    assert_named(&mut job, 0, "rank 0: rank 1 did not enter barrier number 4 within ", "check");
    let [secs, line] = job.ranks.wait_for(1).results.try_into().unwrap();
    assert_eq!(line, "rank 1: rank 0 has given up; the last call here was new_buffer number 3 (24 bytes, grads)");
    assert!(secs.parse::<f64>().unwrap() < (TIMEOUT + END_LIMIT).as_secs_f64(), "{secs} s");
}

/// Rank 0 serves the store and is stopped as a whole, as it can be under `srun`. Nobody can ask who is missing, but rank 1
/// is told, and rank 2, which is inside of a call of NCCL that does not come back, ends.
#[test]
fn a_store_that_does_not_answer_delays_nothing() {
    let mut job = start("suspended_store", 3, "stuck 2 1");
    job.ranks.wait_until_inside(1, 4);
    let start = Instant::now();
    while job.ranks.progress.snapshot(2).seq < 4 {
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    job.ranks.signal(0, Signal::STOP);
    assert_named(&mut job, 1, "rank 1: some rank did not enter all_gather number 4 ", "suspended_store");
    let ended = job.ranks.wait_for(2);
    assert!(!ended.success && ended.signal.is_none() && ended.results.is_empty(), "{ended:?}");
    assert!(start.elapsed() < TIMEOUT + END_LIMIT, "took {:?}", start.elapsed());
}

/// As when a scheduler suspends a job.
#[test]
fn time_in_which_all_ranks_are_stopped_does_not_count() {
    let job = start("suspended", 2, "");
    job.ranks.wait_until_inside(0, 2);
    [0, 1].iter().for_each(|&rank| job.ranks.signal(rank, Signal::STOP));
    std::thread::sleep(2 * TIMEOUT);
    [0, 1].iter().for_each(|&rank| job.ranks.signal(rank, Signal::CONT));
    assert!(job.ranks.wait().iter().all(|ended| ended.success));
}

fn start(case: &str, world_size: usize, fault: &str) -> DoubleRanks {
    start_some(case, world_size, world_size, TIMEOUT, fault)
}

#[track_caller]
fn assert_named(job: &mut DoubleRanks, rank: usize, expected: &str, case: &str) {
    let [secs, line] = job.ranks.wait_for(rank).results.try_into().unwrap();
    assert!(line.starts_with(expected), "{case}: {line}");
    let secs: f64 = secs.parse().unwrap();
    let (least, most) = (TIMEOUT.as_secs_f64(), (TIMEOUT + END_LIMIT).as_secs_f64());
    assert!((least..most).contains(&secs), "{case}: the error came after {secs} s");
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let case = ranks::case();
    match case.split_once(' ').unwrap_or((&case, "")) {
        ("away", call) => {
            let mut fixture = Fixture::new();
            if fixture.group.rank() == 1 {
                std::thread::sleep(LONG);
            }
            fixture.fail(call);
        }
        ("stopped", _) => {
            let mut fixture = Fixture::new();
            if fixture.group.rank() == 1 {
                std::thread::sleep(LONG);
            }
            fixture.fail("barrier");
        }
        ("mismatch", _) => {
            let mut fixture = Fixture::new();
            let call = ["all_gather", "barrier"][fixture.group.rank()];
            fixture.fail(call);
        }
        ("hang", _) => {
            let mut fixture = Fixture::new();
            fixture.call("all_gather").unwrap();
            fixture.group.release(&mut fixture.slot).unwrap();
            if std::env::var("NCCL_DOUBLE_FAULT").unwrap().starts_with("never_join") {
                return fixture.fail("all_gather of layers.4");
            }
            let error = fixture.call("all_gather of layers.4").unwrap_err();
            report(format!("{:?}", error.error_kind()));
            report(error);
        }
        ("elsewhere", _) => {
            // The error comes with the first collective, of which only the start is waited for.
            let mut fixture = Fixture::new();
            let error = fixture.call("barrier").unwrap_err();
            let again = fixture.group.shards_changed().unwrap_err();
            assert_eq!(error.to_string(), again.to_string());
            report(error);
        }
        ("connect", _) => match connect() {
            Ok(_group) => report("connected"),
            Err(error) => report(error),
        },
        ("close", _) => {
            Fixture::new().group.close().unwrap();
            report("closed");
        }
        ("check", _) => {
            let mut fixture = Fixture::new();
            if fixture.group.rank() == 0 {
                return fixture.fail("barrier");
            }
            let start = Instant::now();
            let error = loop {
                match fixture.group.check() {
                    Ok(()) => std::thread::sleep(Duration::from_millis(1)),
                    Err(error) => break error,
                }
            };
            report(start.elapsed().as_secs_f64());
            report(error);
        }
        ("suspended_store", _) => {
            // The test's own store tells the ranks where rank 0's is.
            let mut first = ranks::store();
            let server = (std::env::var("RANK").unwrap() == "0").then(|| StoreServer::bind(("127.0.0.1", 0)).unwrap());
            if let Some(server) = &server {
                first.set("port", &server.local_addr().port().to_le_bytes()).unwrap();
            }
            let port = u16::from_le_bytes(first.get("port", LONG).unwrap().try_into().unwrap());
            let mut store = Store::connect(("127.0.0.1", port), LONG).unwrap();
            let mut fixture = Fixture::of(connect_through(&mut store).unwrap());
            if server.is_some() {
                std::thread::sleep(LONG);
            }
            fixture.fail("all_gather");
        }
        ("suspended", _) => {
            let mut fixture = Fixture::new();
            if fixture.group.rank() == 1 {
                std::thread::sleep(TIMEOUT / 2);
            }
            fixture.group.barrier().unwrap();
        }
        other => panic!("no case {other:?}"),
    }
}

/// A group with buffers; collectives 1 to 3 have made it.
struct Fixture {
    group: ProcessGroup,
    slot: GatherBuffer,
    grads: ReduceBuffer,
}

impl Fixture {
    fn new() -> Self {
        Self::of(connect().unwrap())
    }

    fn of(mut group: ProcessGroup) -> Self {
        let slot = group.new_gather_buffer("slot", 24).unwrap();
        let grads = group.new_reduce_buffer("grads", 24).unwrap();
        Fixture { group, slot, grads }
    }

    /// Reports how long it takes until a call fails, and how.
    fn fail(&mut self, call: &str) {
        let start = Instant::now();
        let error = self.call(call).unwrap_err();
        report(start.elapsed().as_secs_f64());
        assert_eq!(self.group.check().unwrap_err().to_string(), error.to_string());
        report(error);
    }

    fn call(&mut self, name: &str) -> Result<(), CommError> {
        // For 2 ranks and for 3.
        let segment = Segment { kind: Kind::Float, offset_bytes: 0, numel: 6 };
        match name {
            "all_reduce" => self.group.all_reduce(&Tensor::ones([1], (Kind::Double, Device::Cpu)), ReduceOp::Sum),
            "barrier" => self.group.barrier(),
            "all_gather" | "all_gather of layers.4" => {
                let unit = if name == "all_gather" { "layers.3" } else { "layers.4" };
                self.group.begin_write(&mut self.slot, unit)?;
                self.group.start_all_gather(&mut self.slot, &[segment], unit)?;
                self.group.wait_all_gather(&mut self.slot)
            }
            "reduce_scatter" => {
                self.group.begin_reduce(&mut self.grads, "layers.3")?;
                self.group.start_reduce_scatter(&mut self.grads, &[segment], "layers.3")?;
                let numel = segment.numel / self.group.world_size();
                let out = Tensor::zeros([numel as i64], (Kind::Float, Device::Cpu));
                self.group.wait_reduce_scatter(&mut self.grads, &[&out], false)
            }
            _ => panic!("no call {name:?}"),
        }
    }
}
