//! Rotary position tables, computed as transformers computes them (`modeling_rope_utils.py`), in fp32.

use std::f64::consts::PI;

use fsdp_plan::{Architecture, Dtype, RopeScaling};
use tch::{Device, Kind, Tensor};

use crate::{ModelError, kind};

/// Cosines and sines `[T, C/2]` in fp32, rounded to the buffer dtype.
#[derive(Debug)]
pub struct RopeTables {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl RopeTables {
    /// Tables for positions `0..seq_len` on `device`. They are computed on the CPU, so every device has the same bits.
    pub fn new(arch: &Architecture, seq_len: usize, buffer: Dtype, device: Device) -> Result<Self, ModelError> {
        let float = (Kind::Float, Device::Cpu);
        let exponents =
            Tensor::f_arange_start_step(0, arch.head_dim as i64, 2, float)?.f_div_scalar(arch.head_dim as f64)?;
        let frequencies = Tensor::f_pow_scalar(arch.rope_theta, &exponents)?.f_reciprocal()?; // [C/2]
        let frequencies = scale(&frequencies, arch.rope_scaling)?;
        let positions = Tensor::f_arange(seq_len as i64, float)?;
        let angles = positions.f_outer(&frequencies)?; // [T, C/2]
        let rounded = |t: Tensor| t.f_to_kind(kind(buffer))?.f_to_kind(Kind::Float)?.f_to_device(device);
        Ok(RopeTables { cos: rounded(angles.f_cos()?)?, sin: rounded(angles.f_sin()?)? })
    }
}

fn scale(frequencies: &Tensor, scaling: RopeScaling) -> Result<Tensor, ModelError> {
    match scaling {
        RopeScaling::Default => Ok(frequencies.shallow_clone()),
        RopeScaling::Linear { factor } => Ok(frequencies.f_div_scalar(factor)?),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelengths = frequencies.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
            let low_wavelength = original_max_position_embeddings / low_freq_factor;
            let high_wavelength = original_max_position_embeddings / high_freq_factor;
            // 0 at the low end, 1 at the high end of the band that is interpolated.
            let smooth = wavelengths
                .f_reciprocal()?
                .f_mul_scalar(original_max_position_embeddings)?
                .f_sub_scalar(low_freq_factor)?
                .f_div_scalar(high_freq_factor - low_freq_factor)?;
            let slowed = frequencies.f_div_scalar(factor)?;
            let between = slowed.f_mul(&(1.0 - &smooth))?.f_add(&frequencies.f_mul(&smooth)?)?;
            let not_high = between.f_where_self(&wavelengths.f_ge(high_wavelength)?, frequencies)?;
            Ok(slowed.f_where_self(&wavelengths.f_gt(low_wavelength)?, &not_high)?)
        }
    }
}
