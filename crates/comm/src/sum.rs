//! The loops that add up what ranks contribute. The order is fixed: source 0, then 1, and so on, so that the same inputs
//! give the same bits. They work in blocks that stay in the first-level cache, and on plain slices, for the compiler to
//! vectorise.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use tch::Kind;

use crate::ReduceOp;

/// Elements of a block.
const BLOCK: usize = 1024;
/// Elements from which on another thread is worth its start.
const THREAD_NUMEL: usize = 1 << 18;

/// The kinds that collectives know, by number; 0 for the others.
pub(crate) fn kind_code(kind: Kind) -> u8 {
    match kind {
        Kind::Float => 1,
        Kind::Double => 2,
        Kind::BFloat16 => 3,
        Kind::Half => 4,
        Kind::Int64 => 5,
        _ => 0,
    }
}

pub(crate) fn kind_from_code(code: u8) -> Option<Kind> {
    [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64]
        .into_iter()
        .find(|&kind| kind_code(kind) == code)
}

pub(crate) fn element_bytes(kind: Kind) -> usize {
    kind.elt_size_in_bytes()
}

/// `out` = or += the sum over `sources` of f32, bf16 or f16, in f32. With several threads the range is cut between them,
/// which changes no bit.
///
/// # Safety
/// Each source is an aligned address of `out.len()` elements of `kind` that nobody writes meanwhile.
pub(crate) unsafe fn sum_into(kind: Kind, sources: &[*const u8], out: &mut [f32], accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Float => sum_threads(&slices::<f32>(sources, out.len()), out, accumulate),
            Kind::BFloat16 => sum_threads(&slices::<bf16>(sources, out.len()), out, accumulate),
            Kind::Half => sum_threads(&slices::<f16>(sources, out.len()), out, accumulate),
            other => panic!("gradients of {other:?}"),
        }
    }
}

/// `out` = all `sources` combined, element by element. `out` may be none of the sources.
///
/// # Safety
/// Each source and `out` are aligned addresses of `numel` elements of `kind`; nobody else writes them meanwhile.
pub(crate) unsafe fn combine_into(kind: Kind, op: ReduceOp, sources: &[*const u8], out: *mut u8, numel: usize) {
    /// # Safety
    /// As for `combine_into`.
    unsafe fn run<T: Element>(op: ReduceOp, sources: &[*const u8], out: *mut u8, numel: usize) {
        // SAFETY: the caller's promise.
        let (sources, out) =
            unsafe { (slices::<T>(sources, numel), std::slice::from_raw_parts_mut(out.cast::<T>(), numel)) };
        combine::<T>(op, &sources, |at, block| {
            for (out, &value) in out[at..at + block.len()].iter_mut().zip(block) {
                *out = T::narrow(value);
            }
        });
    }
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Float => run::<f32>(op, sources, out, numel),
            Kind::Double => run::<f64>(op, sources, out, numel),
            Kind::BFloat16 => run::<bf16>(op, sources, out, numel),
            Kind::Half => run::<f16>(op, sources, out, numel),
            Kind::Int64 => run::<i64>(op, sources, out, numel),
            other => panic!("a collective on {other:?}"),
        }
    }
}

/// # Safety
/// Each source is an aligned address of `numel` elements that nobody writes during `'a`.
unsafe fn slices<'a, T>(sources: &[*const u8], numel: usize) -> Vec<&'a [T]> {
    // SAFETY: the caller's promise.
    sources.iter().map(|&source| unsafe { std::slice::from_raw_parts(source.cast::<T>(), numel) }).collect()
}

fn sum_threads<T: Element<Wide = f32> + Sync>(sources: &[&[T]], out: &mut [f32], accumulate: bool) {
    let num_threads = (tch::get_num_threads() as usize).min(out.len() / THREAD_NUMEL).max(1);
    let part = out.len().div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        let mut parts = out.chunks_mut(part).enumerate();
        let first = parts.next();
        for (i, out) in parts {
            let sources: Vec<&[T]> = sources.iter().map(|s| &s[i * part..i * part + out.len()]).collect();
            scope.spawn(move || sum(&sources, out, accumulate));
        }
        if let Some((_, out)) = first {
            let sources: Vec<&[T]> = sources.iter().map(|s| &s[..out.len()]).collect();
            sum(&sources, out, accumulate);
        }
    });
}

fn sum<T: Element<Wide = f32>>(sources: &[&[T]], out: &mut [f32], accumulate: bool) {
    combine::<T>(ReduceOp::Sum, sources, |at, block| {
        let out = &mut out[at..at + block.len()];
        if accumulate {
            out.iter_mut().zip(block).for_each(|(out, value)| *out += value);
        } else {
            out.copy_from_slice(block);
        }
    });
}

/// Combines block by block, and hands each result on with its place.
fn combine<T: Element>(op: ReduceOp, sources: &[&[T]], mut finish: impl FnMut(usize, &[T::Wide])) {
    let numel = sources[0].len();
    let mut sums = [T::Wide::default(); BLOCK];
    let mut wide = [T::Wide::default(); BLOCK];
    for at in (0..numel).step_by(BLOCK) {
        let len = BLOCK.min(numel - at);
        let (sums, wide) = (&mut sums[..len], &mut wide[..len]);
        T::widen(&sources[0][at..at + len], sums);
        for source in &sources[1..] {
            T::widen(&source[at..at + len], wide);
            match op {
                ReduceOp::Sum => sums.iter_mut().zip(&*wide).for_each(|(sum, &value)| *sum = Wide::add(*sum, value)),
                ReduceOp::Max => sums.iter_mut().zip(&*wide).for_each(|(max, &value)| *max = Wide::max(*max, value)),
            }
        }
        finish(at, sums);
    }
}

/// A number in a tensor.
trait Element: Copy {
    /// The number in which it is added.
    type Wide: Wide;

    fn widen(from: &[Self], to: &mut [Self::Wide]);
    fn narrow(value: Self::Wide) -> Self;
}

trait Wide: Copy + Default {
    fn add(self, other: Self) -> Self;
    /// NaN wins.
    fn max(self, other: Self) -> Self;
}

/// The elements that are added as they are.
macro_rules! as_it_is {
    ($($number:ty),*) => {$(
        impl Element for $number {
            type Wide = $number;

            fn widen(from: &[$number], to: &mut [$number]) {
                to.copy_from_slice(from);
            }

            fn narrow(value: $number) -> $number {
                value
            }
        }
    )*};
}

as_it_is!(f32, f64, i64);

impl Element for bf16 {
    type Wide = f32;

    fn widen(from: &[bf16], to: &mut [f32]) {
        // A bf16 is the upper half of an f32.
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }

    fn narrow(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

impl Element for f16 {
    type Wide = f32;

    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(value: f32) -> f16 {
        f16::from_f32(value)
    }
}

impl Wide for f32 {
    fn add(self, other: f32) -> f32 {
        self + other
    }

    fn max(self, other: f32) -> f32 {
        if self > other || self.is_nan() { self } else { other }
    }
}

impl Wide for f64 {
    fn add(self, other: f64) -> f64 {
        self + other
    }

    fn max(self, other: f64) -> f64 {
        if self > other || self.is_nan() { self } else { other }
    }
}

impl Wide for i64 {
    fn add(self, other: i64) -> i64 {
        self.wrapping_add(other)
    }

    fn max(self, other: i64) -> i64 {
        Ord::max(self, other)
    }
}
