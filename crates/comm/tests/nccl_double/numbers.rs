//! Sums and maxima, in order of the ranks; narrow types in f32, rounded once. As NCCL's, the maximum forgets NaN.

use half::{bf16, f16};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DataType {
    Int64,
    Float16,
    Float32,
    Float64,
    Bfloat16,
}

impl DataType {
    pub fn from_code(code: i32) -> Option<Self> {
        Some(match code {
            4 => DataType::Int64,
            6 => DataType::Float16,
            7 => DataType::Float32,
            8 => DataType::Float64,
            9 => DataType::Bfloat16,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        match self {
            DataType::Int64 | DataType::Float64 => 8,
            DataType::Float32 => 4,
            DataType::Float16 | DataType::Bfloat16 => 2,
        }
    }
}

/// `out` = the sum or maximum of all sources.
///
/// # Safety
/// All are aligned addresses of `numel` elements that nobody else writes; `out` is none of the sources.
pub unsafe fn combine(data_type: DataType, is_max: bool, sources: &[*const u8], out: *mut u8, numel: usize) {
    /// # Safety
    /// As for `combine`.
    unsafe fn run<T: Copy>(
        sources: &[*const u8],
        out: *mut u8,
        numel: usize,
        all: impl Fn(&mut dyn Iterator<Item = T>) -> T,
    ) {
        for i in 0..numel {
            // SAFETY: the caller's promise.
            let mut values = sources.iter().map(|source| unsafe { source.cast::<T>().add(i).read() });
            let value = all(&mut values);
            // SAFETY: the caller's promise.
            unsafe { out.cast::<T>().add(i).write(value) };
        }
    }
    let max = |a: f64, b: f64| a.max(b);
    // SAFETY: the caller's promise.
    unsafe {
        match (data_type, is_max) {
            (DataType::Int64, false) => run::<i64>(sources, out, numel, |all| all.reduce(i64::wrapping_add).unwrap()),
            (DataType::Int64, true) => run::<i64>(sources, out, numel, |all| all.max().unwrap()),
            (DataType::Float64, false) => run::<f64>(sources, out, numel, |all| all.reduce(|a, b| a + b).unwrap()),
            (DataType::Float64, true) => run::<f64>(sources, out, numel, |all| all.reduce(max).unwrap()),
            (DataType::Float32, false) => run::<f32>(sources, out, numel, |all| all.reduce(|a, b| a + b).unwrap()),
            (DataType::Float32, true) => run::<f32>(sources, out, numel, |all| all.reduce(f32::max).unwrap()),
            (DataType::Bfloat16, _) => {
                run::<bf16>(sources, out, numel, |all| bf16::from_f32(narrow(&mut all.map(f32::from), is_max)))
            }
            (DataType::Float16, _) => {
                run::<f16>(sources, out, numel, |all| f16::from_f32(narrow(&mut all.map(f32::from), is_max)))
            }
        }
    }
}

fn narrow(all: &mut dyn Iterator<Item = f32>, is_max: bool) -> f32 {
    all.reduce(|a, b| if is_max { a.max(b) } else { a + b }).unwrap()
}
