//! Buffers of the back end `nccl` change hands only through events: proved on the CPU, where everything runs in one queue
//! and a missing event would change no number.
//!
//! The back end tells, as `tracing` events, what it records in which lane, what waits for what, and which lane uses which
//! buffer when. From these this test computes what *must* have happened before what on a device that is as slow and as
//! parallel as it likes, with vector clocks: an access of a buffer is in order if it comes after every earlier access that
//! it conflicts with (either of them writes). Taking the waits out again shows that the check sees what is missing.

mod ranks;

use std::collections::HashMap;
use std::sync::Mutex;

use fsdp_comm::{ProcessGroup, ReduceOp, Segment};
use ranks::double::{connect, run};
use ranks::report;
use tch::{Device, Kind, Tensor};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

const TARGET: &str = "fsdp_comm::order";
/// Lane of the caller.
const COMPUTE: u64 = 0;
const NUM_UNITS: usize = 5;
const NUM_SLOTS: usize = 2;
/// Name of this rank's shards among the buffers.
const SHARDS: u64 = 1;

#[test]
fn buffers_change_hands_only_through_events() {
    for world_size in 1..=2 {
        for (results, _) in run("steps", world_size, "22809") {
            assert_eq!(results, ["in order", "most waits are needed"]);
        }
    }
}

/// What a lane does, in the order of the host's calls.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Record { mark: u64, lane: u64 },
    Wait { mark: u64, lane: u64 },
    Read { buffer: u64, lane: u64 },
    Write { buffer: u64, lane: u64 },
}

/// The first access that is not in order.
fn find_race(steps: &[Step]) -> Option<String> {
    type Clock = HashMap<u64, usize>;
    let mut lanes: HashMap<u64, Clock> = HashMap::new();
    let mut marks: HashMap<u64, Clock> = HashMap::new();
    // By buffer: lane, time in that lane, whether it writes, number of the step.
    let mut accesses: HashMap<u64, Vec<(u64, usize, bool, usize)>> = HashMap::new();
    for (number, &step) in steps.iter().enumerate() {
        match step {
            Step::Record { mark, lane } => {
                marks.insert(mark, lanes.entry(lane).or_default().clone());
            }
            Step::Wait { mark, lane } => {
                let clock = lanes.entry(lane).or_default();
                for (&other, &time) in marks.get(&mark).expect("it was recorded") {
                    let known = clock.entry(other).or_default();
                    *known = (*known).max(time);
                }
            }
            Step::Read { buffer, lane } | Step::Write { buffer, lane } => {
                let writes = matches!(step, Step::Write { .. });
                let clock = lanes.entry(lane).or_default();
                let before = accesses.entry(buffer).or_default();
                for &(other, time, other_writes, other_number) in before.iter() {
                    let knows = other == lane || clock.get(&other).is_some_and(|&known| known >= time);
                    if (writes || other_writes) && !knows {
                        let other = steps[other_number];
                        return Some(format!(
                            "{step:?} (step {number}) does not come after {other:?} (step {other_number})"
                        ));
                    }
                }
                let time = clock.entry(lane).or_default();
                *time += 1;
                before.push((lane, *time, writes, number));
            }
        }
    }
    None
}

#[test]
fn the_check_sees_races() {
    let (write, read) = (Step::Write { buffer: 9, lane: 1 }, Step::Read { buffer: 9, lane: 2 });
    let (record, wait) = (Step::Record { mark: 5, lane: 1 }, Step::Wait { mark: 5, lane: 2 });
    assert_eq!(find_race(&[write, record, wait, read]), None);
    assert!(find_race(&[write, record, read]).is_some(), "no wait");
    assert!(find_race(&[record, write, wait, read]).is_some(), "recorded too early");
    assert!(find_race(&[write, record, read, wait]).is_some(), "waited too late");
    assert_eq!(find_race(&[read, Step::Read { buffer: 9, lane: 3 }]), None, "two reads");
    let third =
        [Step::Record { mark: 6, lane: 2 }, Step::Wait { mark: 6, lane: 3 }, Step::Write { buffer: 9, lane: 3 }];
    assert_eq!(find_race(&[&[write, record, wait][..], &third[..]].concat()), None, "by way of another lane");
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    assert_eq!(ranks::case(), "steps");
    tracing::subscriber::set_global_default(Recorder).unwrap();
    let mut group = connect().unwrap();
    Engine::new(&mut group).steps(&mut group);
    group.close().unwrap();
    let steps = STEPS.lock().unwrap().clone();
    assert!(steps.len() > 300, "{} steps", steps.len());
    match find_race(&steps) {
        None => report("in order"),
        Some(race) => report(race),
    }
    // Taken out, waits are missed: those of the lane, those of compute, and most of them one by one.
    let without = |is_out: &dyn Fn(Step) -> bool| {
        find_race(&steps.iter().copied().filter(|&step| !is_out(step)).collect::<Vec<_>>())
    };
    assert!(without(&|step| matches!(step, Step::Wait { lane: COMPUTE, .. })).is_some());
    assert!(without(&|step| matches!(step, Step::Wait { lane, .. } if lane != COMPUTE)).is_some());
    let waits: Vec<Step> = steps.iter().copied().filter(|step| matches!(step, Step::Wait { .. })).collect();
    let num_needed = waits.iter().filter(|&&wait| without(&|step| step == wait).is_some()).count();
    // The others are for plain tensors, or for what another edge orders by chance.
    assert!(num_needed * 2 > waits.len(), "{num_needed} of {} waits are needed", waits.len());
    report("most waits are needed");
}

/// A training step as the engine makes it: gathers ahead in their own stream, reduces behind.
struct Engine {
    slots: Vec<fsdp_comm::GatherBuffer>,
    grads: Vec<fsdp_comm::ReduceBuffer>,
    segment: Segment,
    shard: Tensor,
    grad_shard: Tensor,
}

impl Engine {
    fn new(group: &mut ProcessGroup) -> Self {
        let numel = 8 * group.world_size();
        let floats = || Tensor::zeros([8], (Kind::Float, Device::Cpu));
        Engine {
            slots: (0..NUM_SLOTS).map(|_| group.new_gather_buffer("slot", numel * 4).unwrap()).collect(),
            grads: (0..2).map(|_| group.new_reduce_buffer("grads", numel * 4).unwrap()).collect(),
            segment: Segment { kind: Kind::Float, offset_bytes: 0, numel },
            shard: floats(),
            grad_shard: floats(),
        }
    }

    fn steps(&mut self, group: &mut ProcessGroup) {
        let order: Vec<usize> = (0..NUM_UNITS).chain((0..NUM_UNITS).rev()).collect();
        for _ in 0..3 {
            let mut started = vec![false; order.len()];
            for (place, &unit) in order.iter().enumerate() {
                if !started[place] {
                    self.start_unshard(group, unit);
                }
                let next = place + 1;
                if next < order.len() && order[next] % NUM_SLOTS != unit % NUM_SLOTS {
                    self.start_unshard(group, order[next]);
                    started[next] = true;
                }
                group.wait_all_gather(&mut self.slots[unit % NUM_SLOTS]).unwrap();
                group.release(&mut self.slots[unit % NUM_SLOTS]).unwrap();
                if place >= NUM_UNITS {
                    self.start_reduce(group, unit);
                    if unit + 1 < NUM_UNITS {
                        self.wait_reduce(group, unit + 1);
                    }
                }
            }
            self.wait_reduce(group, 0);
            group.all_reduce(&self.grad_shard, ReduceOp::Sum).unwrap(); // as the replicas do
            tracing::trace!(target: TARGET, write = SHARDS, lane = COMPUTE); // the optimizer's step
            group.shards_changed().unwrap();
        }
    }

    fn start_unshard(&mut self, group: &mut ProcessGroup, unit: usize) {
        let slot = &mut self.slots[unit % NUM_SLOTS];
        group.begin_write(slot, "unit").unwrap();
        let on = group.enter_gather_stream().unwrap();
        slot.view(Kind::Float, group.rank() * 32, 8).copy_(&self.shard);
        group.start_all_gather(slot, &[self.segment], "unit").unwrap();
        tracing::trace!(target: TARGET, read = SHARDS, lane = gather_lane()); // by the copy
        drop(on);
    }

    fn start_reduce(&mut self, group: &mut ProcessGroup, unit: usize) {
        let grads = &mut self.grads[unit % 2];
        group.begin_reduce(grads, "unit").unwrap();
        let _ = grads.view(Kind::Float, 0, self.segment.numel).fill_(1.0);
        group.start_reduce_scatter(grads, &[self.segment], "unit").unwrap();
    }

    /// In compute, as the engine does, or in another lane: then compute must be told when the buffer is free.
    fn wait_reduce(&mut self, group: &mut ProcessGroup, unit: usize) {
        let _on = (unit % 2 == 1).then(|| group.enter_gather_stream().unwrap());
        group.wait_reduce_scatter(&mut self.grads[unit % 2], &[&self.grad_shard], true).unwrap();
    }
}

/// The lane of the last gather.
fn gather_lane() -> u64 {
    let steps = STEPS.lock().unwrap();
    let write = steps.iter().rev().find_map(|step| match *step {
        Step::Write { lane, .. } if lane != COMPUTE => Some(lane),
        _ => None,
    });
    write.expect("a gather writes its slot")
}

static STEPS: Mutex<Vec<Step>> = Mutex::new(Vec::new());

/// Keeps the back end's events.
struct Recorder;

#[derive(Default)]
struct Fields(HashMap<&'static str, u64>);

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, _: &dyn std::fmt::Debug) {
        panic!("a field {field} that is no number");
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == TARGET
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let field = |name: &str| fields.0.get(name).copied();
        let lane = field("lane").expect("each event has a lane");
        let step = match (field("record"), field("wait"), field("read"), field("write")) {
            (Some(mark), None, None, None) => Step::Record { mark, lane },
            (None, Some(mark), None, None) => Step::Wait { mark, lane },
            (None, None, Some(buffer), None) => Step::Read { buffer, lane },
            (None, None, None, Some(buffer)) => Step::Write { buffer, lane },
            _ => panic!("{event:?} is none of the four"),
        };
        STEPS.lock().unwrap().push(step);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
