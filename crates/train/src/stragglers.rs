//! Which rank is slower than the others. All wait for the slowest in every step, so that one rank's fault, a throttled
//! device or a slow disk, is the whole job's time.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use fsdp::Pace;

/// Steps that are looked at together.
const WINDOW: usize = 10;

/// The slowest steps of a window that do not count: pauses that any rank may have now and then.
const NUM_LEFT_OUT: usize = 3;

/// A rank is slow when it is busy for so many times as long as the others.
const SLOW: f64 = 1.5;

/// No rank is slow by less: on steps of a few milliseconds the scheduler of the system decides.
const MIN_EXCESS: Duration = Duration::from_millis(2);

/// A rank that stays slow is named again after so many steps.
const REPEAT_STEPS: u64 = 200;

/// The last steps of all ranks.
#[derive(Debug, Default)]
pub struct Stragglers {
    /// By rank.
    windows: Vec<VecDeque<Pace>>,
    step: u64,
    /// By rank, the step at which it was named last.
    named: Vec<Option<u64>>,
}

/// A rank is slow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Straggler {
    pub rank: usize,
    pub ratio: f64,
    /// The time goes into loading data, not into computing.
    pub loads_data: bool,
}

impl fmt::Display for Straggler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = if self.loads_data { "data loading" } else { "compute" };
        write!(
            f,
            "rank {} is slow: {:.1} x the median busy time of the other ranks over the last {WINDOW} steps ({phase})",
            self.rank, self.ratio
        )
    }
}

impl Stragglers {
    /// Takes a step's paces, one a rank, and names a rank that has become, or remains, slow.
    pub fn add(&mut self, paces: &[Pace]) -> Option<Straggler> {
        self.windows.resize(paces.len(), VecDeque::new());
        self.named.resize(paces.len(), None);
        self.step += 1;
        for (window, pace) in self.windows.iter_mut().zip(paces) {
            if window.len() == WINDOW {
                window.pop_front();
            }
            window.push_back(*pace);
        }
        // In the first step nobody knows a pace.
        if paces.len() < 2 || self.step <= WINDOW as u64 {
            return None;
        }
        let busy: Vec<Duration> = self.windows.iter().map(|window| usual(window, |pace| pace.busy)).collect();
        let rank = (0..busy.len()).max_by_key(|&rank| busy[rank])?;
        let others = |times: &[Duration]| median(times.iter().enumerate().filter(|(i, _)| *i != rank).map(|(_, t)| *t));
        let typical = others(&busy);
        if busy[rank] < typical.mul_f64(SLOW).max(typical + MIN_EXCESS) {
            self.named[rank] = None;
            return None;
        }
        if self.named[rank].is_some_and(|step| self.step - step < REPEAT_STEPS) {
            return None;
        }
        self.named[rank] = Some(self.step);
        let data: Vec<Duration> = self.windows.iter().map(|window| usual(window, |pace| pace.data)).collect();
        let (excess, of_data) = (busy[rank] - typical, data[rank].saturating_sub(others(&data)));
        let ratio = busy[rank].as_secs_f64() / typical.as_secs_f64().max(1e-6);
        Some(Straggler { rank, ratio, loads_data: of_data * 2 > excess })
    }
}

/// The mean time of a step without the slowest ones.
fn usual(window: &VecDeque<Pace>, time: impl Fn(&Pace) -> Duration) -> Duration {
    let mut times: Vec<Duration> = window.iter().map(time).collect();
    times.sort();
    let num = times.len() - NUM_LEFT_OUT;
    times[..num].iter().sum::<Duration>() / num as u32
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(busy_ms: u64, data_ms: u64) -> Pace {
        Pace { busy: Duration::from_millis(busy_ms), data: Duration::from_millis(data_ms) }
    }

    /// The first step at which a rank is named, over 40 steps.
    fn first_named(paces: impl Fn(u64) -> Vec<Pace>) -> Option<(u64, Straggler)> {
        let mut stragglers = Stragglers::default();
        (1..=40).find_map(|step| Some((step, stragglers.add(&paces(step))?)))
    }

    #[test]
    fn the_slow_rank_is_named_with_ratio_and_phase() {
        let (step, found) = first_named(|_| vec![pace(10, 1), pace(10, 1), pace(21, 1), pace(9, 1)]).unwrap();
        assert_eq!((step, found.rank, found.loads_data), (11, 2, false));
        assert_eq!(
            found.to_string(),
            "rank 2 is slow: 2.1 x the median busy time of the other ranks over the last 10 steps (compute)"
        );
        let (_, found) = first_named(|_| vec![pace(30, 21), pace(10, 1)]).unwrap();
        assert_eq!((found.rank, found.loads_data), (0, true));
        // It becomes slow at step 15, and is named as soon as most of a window shows it.
        let late = |step| vec![pace(10, 0), pace(if step < 15 { 10 } else { 30 }, 0)];
        let (step, found) = first_named(late).unwrap();
        assert!((16..=24).contains(&step) && found.rank == 1, "{step}: {found}");
    }

    #[test]
    fn pauses_and_small_differences_are_no_straggler() {
        assert_eq!(first_named(|_| vec![pace(10, 1), pace(14, 1)]), None);
        assert_eq!(first_named(|_| vec![pace(1, 0), pace(2, 0)]), None);
        // One pause in five steps.
        assert_eq!(first_named(|step| vec![pace(10, 0), pace(if step % 5 == 0 { 200 } else { 10 }, 0)]), None);
        assert_eq!(first_named(|_| vec![pace(10, 0)]), None);
    }

    #[test]
    fn a_rank_that_stays_slow_is_named_again_after_a_while() {
        let mut stragglers = Stragglers::default();
        let named = (1..=450).filter(|_| stragglers.add(&[pace(10, 0), pace(30, 0)]).is_some()).count();
        assert_eq!(named, 3);
    }
}
