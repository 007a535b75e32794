//! Ranks that drift apart on purpose: see `skew.rs`.

use std::time::Duration;

use fsdp_comm::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, Segment};
use tch::{Kind, Tensor};

const NUM_UNITS: usize = 6;
const NUM_SLOTS: usize = 2;
/// Elements of a rank's range: some pages, so that a torn write has room to show.
const N: usize = 5000;

/// Whole numbers below 2^24, so that sums are exact; different for each place.
fn parameter(rank: usize, unit: usize, round: usize) -> f64 {
    (rank + 10 * unit + 100 * round) as f64
}

pub struct Walk {
    slots: Vec<GatherBuffer>,
    grads: Vec<ReduceBuffer>,
    segment: Segment,
    shard: Tensor,
    /// State of a small random generator, another one on each rank.
    random: u64,
}

impl Walk {
    pub fn new(group: &mut ProcessGroup) -> Result<Self, CommError> {
        let numel = N * group.world_size();
        let slots = (0..NUM_SLOTS).map(|_| group.new_gather_buffer("slot", numel * 4)).collect::<Result<_, _>>()?;
        let grads = (0..2).map(|_| group.new_reduce_buffer("grads", numel * 4)).collect::<Result<_, _>>()?;
        Ok(Walk {
            slots,
            grads,
            segment: Segment { kind: Kind::Float, offset_bytes: 0, numel },
            shard: Tensor::zeros([N as i64], (Kind::Float, group.device())),
            random: 0x9e37_79b9 + group.rank() as u64,
        })
    }

    pub fn rounds(&mut self, group: &mut ProcessGroup, num_rounds: usize) -> Result<(), CommError> {
        let there = 0..NUM_UNITS;
        let back = (0..NUM_UNITS).rev();
        let order: Vec<usize> = there.chain(back).collect();
        for round in 0..num_rounds {
            let mut started = vec![false; order.len()];
            for place in 0..order.len() {
                let slot = |place: usize| order[place] % NUM_SLOTS;
                if !started[place] {
                    started[place] = self.start(group, order[place], round, true)?;
                }
                // The next one early, if its slot is free: never waits. At the turn it is the same slot, in use here.
                let next = place + 1;
                if next < order.len() && slot(next) != slot(place) {
                    started[next] = self.start(group, order[next], round, false)?;
                }
                self.compute(group, order[place], round)?;
                if place >= NUM_UNITS {
                    self.reduce(group, order[place], round)?;
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, group: &mut ProcessGroup, unit: usize, round: usize, must: bool) -> Result<bool, CommError> {
        self.sleep();
        let name = format!("layers.{unit}");
        let slot = &mut self.slots[unit % NUM_SLOTS];
        if must {
            group.begin_write(slot, &name)?;
        } else if !group.try_begin_write(slot)? {
            return Ok(false);
        }
        let rank = group.rank();
        let _ = slot.view(Kind::Float, rank * N * 4, N).fill_(parameter(rank, unit, round));
        group.start_all_gather(slot, &[self.segment], &name)?;
        Ok(true)
    }

    fn compute(&mut self, group: &mut ProcessGroup, unit: usize, round: usize) -> Result<(), CommError> {
        group.wait_all_gather(&mut self.slots[unit % NUM_SLOTS])?;
        for look in 0..2 {
            for rank in 0..group.world_size() {
                let range = self.slots[unit % NUM_SLOTS].view(Kind::Float, rank * N * 4, N);
                assert_all(&range, parameter(rank, unit, round), &format!("look {look} at rank {rank}'s range"));
            }
            self.sleep();
        }
        group.release(&mut self.slots[unit % NUM_SLOTS])
    }

    /// Starts the reduction of a unit and finishes the one before.
    fn reduce(&mut self, group: &mut ProcessGroup, unit: usize, round: usize) -> Result<(), CommError> {
        let grads = &mut self.grads[unit % 2];
        group.begin_reduce(grads, "grads")?;
        let _ = grads.view(Kind::Float, 0, self.segment.numel).fill_(parameter(group.rank(), unit, round));
        group.start_reduce_scatter(grads, &[self.segment], "grads")?;
        self.sleep();
        if unit + 1 < NUM_UNITS {
            self.finish(group, unit + 1, round)?;
        }
        if unit == 0 {
            self.finish(group, 0, round)?;
        }
        Ok(())
    }

    fn finish(&mut self, group: &mut ProcessGroup, unit: usize, round: usize) -> Result<(), CommError> {
        group.wait_reduce_scatter(&mut self.grads[unit % 2], &[&self.shard], false)?;
        let sum = (0..group.world_size()).map(|rank| parameter(rank, unit, round)).sum();
        assert_all(&self.shard, sum, "reduced gradients");
        Ok(())
    }

    /// Half of the times not at all, else up to 0.3 ms; now and then much longer.
    fn sleep(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let micros = match self.random % 64 {
            0 => 2000,
            r if r % 2 == 0 => self.random % 300,
            _ => return,
        };
        std::thread::sleep(Duration::from_micros(micros));
    }
}

#[track_caller]
fn assert_all(tensor: &Tensor, expected: f64, what: &str) {
    let (min, max) = (tensor.min().double_value(&[]), tensor.max().double_value(&[]));
    assert!(min == expected && max == expected, "{what}: expected {expected}, got {min} to {max}");
}
