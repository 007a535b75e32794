//! f32 values to and from little-endian bytes of a file, through a small bounded buffer.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use half::{bf16, f16};

/// Bytes moved at a time: large enough for the disk, small enough for the cache.
pub(crate) const BUFFER_BYTES: usize = 1 << 20;

/// Element types that can be read, exported and trained from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    F32,
    F16,
    BF16,
}

impl Dtype {
    pub const fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// As `config.json` spells it.
    pub const fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }

    /// The smallest magnitude that rounds to infinity: the largest finite value and half a step.
    const fn first_too_large(self) -> f32 {
        match self {
            Dtype::F32 => f32::INFINITY,
            Dtype::F16 => 65520.0,
            Dtype::BF16 => f32::from_bits(0x7f7f_8000),
        }
    }
}

/// As safetensors spells it.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Reads `out.len()` elements that start at byte `offset_bytes`. Reads exactly those bytes.
pub(crate) fn read_f32(file: &File, dtype: Dtype, mut offset_bytes: u64, out: &mut [f32]) -> io::Result<()> {
    let size = dtype.size_bytes();
    let mut buffer = vec![0u8; (out.len() * size).min(BUFFER_BYTES)];
    for part in out.chunks_mut(BUFFER_BYTES / size) {
        let bytes = &mut buffer[..part.len() * size];
        file.read_exact_at(bytes, offset_bytes)?;
        decode(dtype, bytes, part);
        offset_bytes += bytes.len() as u64;
    }
    Ok(())
}

/// `bytes.len() == out.len() * dtype.size_bytes()`.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * dtype.size_bytes());
    match dtype {
        Dtype::F32 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*raw);
            }
        }
        Dtype::F16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(*raw).to_f32();
            }
        }
        Dtype::BF16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(*raw).to_f32();
            }
        }
    }
}

/// Makes `bytes` the encoding of `values`, rounded to nearest even.
///
/// # Errors
/// The index of a finite value that `dtype` would round to infinity. NaN and infinity pass.
pub(crate) fn encode(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) -> Result<(), usize> {
    let limit = dtype.first_too_large();
    if let Some(i) = values.iter().position(|value| value.abs() >= limit && value.is_finite()) {
        return Err(i);
    }
    bytes.resize(values.len() * dtype.size_bytes(), 0);
    match dtype {
        Dtype::F32 => {
            for (raw, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *raw = value.to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (raw, &value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *raw = f16::from_f32(value).to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (raw, &value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
                *raw = bf16::from_f32(value).to_le_bytes();
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_values_that_would_round_to_infinity_are_refused() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let limit = dtype.first_too_large();
            let below = f32::from_bits(limit.to_bits() - 1);
            let (mut bytes, mut back) = (Vec::new(), [0.0; 4]);
            assert_eq!(encode(dtype, &[0.0, -limit], &mut bytes), Err(1));
            encode(dtype, &[below, -below, f32::NEG_INFINITY, f32::NAN], &mut bytes).unwrap();
            decode(dtype, &bytes, &mut back);
            assert!(back[0].is_finite() && back[1] == -back[0], "{dtype}: {back:?}");
            assert!(back[2] == f32::NEG_INFINITY && back[3].is_nan(), "{dtype}: {back:?}");
            let rounded = match dtype {
                Dtype::F16 => f16::from_f32(limit).to_f32(),
                _ => bf16::from_f32(limit).to_f32(),
            };
            assert!(rounded.is_infinite());
        }
    }
}
