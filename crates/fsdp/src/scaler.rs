//! The dynamic loss scale that keeps fp16 gradients representable (Micikevicius et al., "Mixed Precision Training",
//! arXiv:1710.03740), with the constants of `torch.amp.GradScaler`. It lives on the device: no step waits for it.

use tch::{Device, Kind, Tensor};

use crate::EngineError;

const GROWTH_FACTOR: f64 = 2.0;
const BACKOFF_FACTOR: f64 = 0.5;
const GROWTH_INTERVAL_STEPS: i64 = 2000;
const INITIAL_SCALE: f64 = 65536.0;
/// Below this the gradients themselves are not finite, and halving goes on for nothing.
const MIN_SCALE: f64 = 1.0;

/// A loss scale as a checkpoint holds it.
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

/// Scale of the loss; halved when a gradient overflows, doubled after a while without.
#[derive(Debug)]
pub struct DeviceScaler {
    pub scale: Tensor,  // f32 []
    good_steps: Tensor, // i32 []
}

impl DeviceScaler {
    pub fn new(from: LossScaler, device: Device) -> Result<Self, EngineError> {
        let scale = Tensor::from(from.scale as f32).f_to_device(device)?;
        let good_steps = Tensor::from(from.good_steps as i64).f_to_kind(Kind::Int)?.f_to_device(device)?;
        Ok(DeviceScaler { scale, good_steps })
    }

    /// After a step; `found_inf` (f32 `[]`) is 1 where its gradients overflowed.
    pub fn update(&mut self, found_inf: &Tensor) -> Result<(), EngineError> {
        let _ = self.scale.f_internal_amp_update_scale_(
            &self.good_steps,
            found_inf,
            GROWTH_FACTOR,
            BACKOFF_FACTOR,
            GROWTH_INTERVAL_STEPS,
        )?;
        Ok(())
    }

    /// Whether the next overflow leaves no scale: f32 `[]`, 0 or 1.
    pub fn is_at_end(&self) -> Result<Tensor, EngineError> {
        Ok(self.scale.f_lt(MIN_SCALE / BACKOFF_FACTOR)?.f_to_kind(Kind::Float)?)
    }

    /// Waits for the device.
    pub fn read(&self) -> Result<LossScaler, EngineError> {
        let good_steps = self.good_steps.f_int64_value(&[])? as u64;
        Ok(LossScaler { scale: self.scale.f_double_value(&[])?, good_steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_after_the_interval_and_backs_off() {
        let mut scaler = DeviceScaler::new(LossScaler::default(), Device::Cpu).unwrap();
        let [good, bad] = [0.0f32, 1.0].map(Tensor::from);
        (1..GROWTH_INTERVAL_STEPS).for_each(|_| scaler.update(&good).unwrap());
        assert_eq!(scaler.read().unwrap(), LossScaler { scale: INITIAL_SCALE, good_steps: 1999 });
        scaler.update(&good).unwrap();
        assert_eq!(scaler.read().unwrap(), LossScaler { scale: 2.0 * INITIAL_SCALE, good_steps: 0 });
        scaler.update(&good).unwrap();
        (0..16).for_each(|_| scaler.update(&bad).unwrap());
        assert_eq!(scaler.is_at_end().unwrap().double_value(&[]), 0.0);
        scaler.update(&bad).unwrap();
        assert_eq!(scaler.is_at_end().unwrap().double_value(&[]), 1.0);
        assert_eq!(scaler.read().unwrap(), LossScaler { scale: MIN_SCALE, good_steps: 0 }); // 2^17 -> 1
    }
}
