//! The learning rate of a step, as a pure function.

use crate::job::choices;

/// `[lr_scheduler]`: how the rate moves over a run.
///
/// With `W` warm-up steps and `N` steps in all, the rate at step `s` (counted from 1) is `lr * min(1, s / W)` during
/// warm-up and lies between `lr` and `min_lr` afterwards. Behind the warm-up the progress of step `s` is
/// `(s - 1 - W) / (N - W)`, as in `transformers`' `get_linear_schedule_with_warmup` and
/// `get_cosine_with_min_lr_schedule_with_warmup`: the first step behind the warm-up has the full rate, and the last
/// step is one short of `min_lr`, so that no step is spent on a rate of 0. `wsd` (warm-up, stable, decay) holds `lr`
/// until `D` steps before the end, then falls along a cosine, `transformers`' default for `get_wsd_schedule`.
#[derive(Debug, Clone, PartialEq)]
pub struct LrScheduler {
    pub kind: LrKind,
    /// How long the rate rises from `lr / W` to `lr`; a ratio is of all steps, rounded up.
    pub warmup: Portion,
    /// The rate that the decay goes to (absolute); 0 for `constant`, which has no decay.
    pub min_lr: f64,
    /// The length of `wsd`'s decay at the end; the other kinds decay over all steps behind the warm-up.
    pub decay: Portion,
}

choices! {
    /// The shape of the rate behind the warm-up.
    LrKind {
        Constant = "constant",
        Linear = "linear",
        Cosine = "cosine",
        Wsd = "wsd",
    }
}

/// A part of a run's steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Portion {
    Steps(u64),
    /// Of all steps, from 0 to 1.
    Ratio(f64),
}

impl Portion {
    /// The number of steps, a ratio rounded up as `transformers` does.
    pub fn num_steps(self, total_steps: u64) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Ratio(ratio) => (ratio * total_steps as f64).ceil() as u64,
        }
    }
}

impl LrScheduler {
    /// The rate of step `step`, counted from 1, in a run of `total_steps`.
    ///
    /// `lr` is `[optimizer] lr`. Steps beyond the last keep the last progress, 1.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn lr_at(&self, lr: f64, step: u64, total_steps: u64) -> f64 {
        assert!(step > 0, "steps are counted from 1");
        let warmup = self.warmup.num_steps(total_steps);
        if step <= warmup {
            return lr * (step as f64 / warmup as f64);
        }
        let decay_steps = match self.kind {
            LrKind::Constant => return lr,
            LrKind::Linear | LrKind::Cosine => total_steps.saturating_sub(warmup),
            LrKind::Wsd => self.decay.num_steps(total_steps),
        };
        let decay_start = total_steps.saturating_sub(decay_steps).max(warmup);
        let into_decay = (step - 1).saturating_sub(decay_start);
        let progress = (into_decay as f64 / decay_steps.max(1) as f64).min(1.0);
        let remaining = match self.kind {
            LrKind::Linear => 1.0 - progress,
            _ => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.min_lr + (lr - self.min_lr) * remaining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_shorter_than_its_warm_up_only_rises() {
        for kind in [LrKind::Constant, LrKind::Linear, LrKind::Cosine, LrKind::Wsd] {
            let scheduler = scheduler(kind, 100, 0.0, 50);
            assert_eq!((1..=4).map(|s| scheduler.lr_at(1.0, s, 4)).collect::<Vec<_>>(), [0.01, 0.02, 0.03, 0.04]);
        }
    }

    fn scheduler(kind: LrKind, warmup: u64, min_lr: f64, decay: u64) -> LrScheduler {
        LrScheduler { kind, warmup: Portion::Steps(warmup), min_lr, decay: Portion::Steps(decay) }
    }

    /// The four closed forms as `transformers` writes them, with its 0-based step `i = step - 1` behind the warm-up.
    fn closed_form(s: &LrScheduler, lr: f64, warmup: u64, decay: u64, step: u64, total: u64) -> f64 {
        let (w, n, d, i) = (warmup as f64, total as f64, decay as f64, (step - 1) as f64);
        if step <= warmup {
            return lr * step as f64 / w;
        }
        let factor = match s.kind {
            LrKind::Constant => return lr,
            LrKind::Linear => (n - i) / (n - w),
            LrKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * (i - w) / (n - w)).cos()),
            LrKind::Wsd if i < n - d => 1.0,
            LrKind::Wsd => 0.5 * (1.0 + (std::f64::consts::PI * (i - (n - d)) / d).cos()),
        };
        s.min_lr + (lr - s.min_lr) * factor
    }

    #[test]
    fn every_kind_follows_its_closed_form() {
        for kind in [LrKind::Constant, LrKind::Linear, LrKind::Cosine, LrKind::Wsd] {
            for (warmup, decay, total) in [(0, 10, 40), (5, 10, 40), (30, 10, 40), (1, 1, 2), (0, 1, 1)] {
                for min_lr in [0.0, 1e-5] {
                    let s = scheduler(kind, warmup, min_lr, decay);
                    for step in 1..=total {
                        let got = s.lr_at(3e-4, step, total);
                        let expected = closed_form(&s, 3e-4, warmup, decay, step, total);
                        assert!((got - expected).abs() < 1e-18, "{s:?} step {step}: {got} != {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn warmup_reaches_the_full_rate_at_its_last_step_and_holds_it_for_one_more() {
        let s = scheduler(LrKind::Linear, 4, 0.0, 0);
        let rates: Vec<f64> = (1..=8).map(|step| s.lr_at(1.0, step, 8)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn ratios_round_up_as_transformers_does() {
        assert_eq!(Portion::Ratio(0.03).num_steps(101), 4);
        assert_eq!(Portion::Ratio(0.0).num_steps(101), 0);
        assert_eq!(Portion::Steps(7).num_steps(101), 7);
    }

    #[test]
    fn steps_beyond_the_end_and_warmups_longer_than_the_run_stay_in_range() {
        for kind in [LrKind::Constant, LrKind::Linear, LrKind::Cosine, LrKind::Wsd] {
            let s = scheduler(kind, 50, 1e-5, 50);
            for step in 1..200 {
                let rate = s.lr_at(1e-3, step, 20);
                assert!((1e-5..=1e-3).contains(&rate), "{kind:?} step {step}: {rate}");
            }
        }
    }
}
