//! The dynamic loss scale that keeps fp16 gradients representable (Micikevicius et al., "Mixed Precision Training",
//! arXiv:1710.03740), with the constants of `torch.amp.GradScaler`.

const GROWTH_INTERVAL_STEPS: u64 = 2000;
const INITIAL_SCALE: f64 = 65536.0;
/// Below this the gradients themselves are not finite, and halving goes on for nothing.
const MIN_SCALE: f64 = 1.0;

/// Scale of the loss; halved when a gradient overflows, doubled after a while without.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScaler {
    pub scale: f64,
    /// Steps since the scale changed.
    pub good_steps: u64,
}

impl Default for LossScaler {
    fn default() -> Self {
        LossScaler { scale: INITIAL_SCALE, good_steps: 0 }
    }
}

impl LossScaler {
    /// A step whose gradients were finite.
    pub fn grow(&mut self) {
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL_STEPS {
            *self = LossScaler { scale: self.scale * 2.0, good_steps: 0 };
        }
    }

    /// A step whose gradients overflowed. `false` when the scale cannot fall further.
    pub fn back_off(&mut self) -> bool {
        *self = LossScaler { scale: self.scale / 2.0, good_steps: 0 };
        self.scale >= MIN_SCALE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_after_the_interval_and_backs_off_to_the_minimum() {
        let mut scaler = LossScaler::default();
        (0..GROWTH_INTERVAL_STEPS).for_each(|_| scaler.grow());
        assert_eq!(scaler, LossScaler { scale: 2.0 * INITIAL_SCALE, good_steps: 0 });
        let halvings = (0..).take_while(|_| scaler.back_off()).count();
        assert_eq!(halvings, 17); // 2^17 -> 1
    }
}
