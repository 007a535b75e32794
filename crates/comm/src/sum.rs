//! The loops that add up what ranks contribute. The order is fixed: source 0, then 1, and so on, so that the same inputs
//! give the same bits.
//!
//! They are written for the compiler to vectorise. Sums of gradients read all sources side by side, which keeps several
//! streams from memory going: that is twice as fast as one source after the other, and wider instructions than the
//! baseline's then gain next to nothing. Anything else goes block by block through the first-level cache.

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
            Kind::Float => cut(&slices::<f32>(sources, out.len()), out, accumulate, sum_side_by_side),
            Kind::BFloat16 => cut(&slices::<bf16>(sources, out.len()), out, accumulate, sum_side_by_side),
            Kind::Half => cut(&slices::<f16>(sources, out.len()), out, accumulate, sum_in_blocks),
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

/// Runs `sum` on parts of the range, one for each thread.
fn cut<T: Sync>(sources: &[&[T]], out: &mut [f32], accumulate: bool, sum: fn(&[&[T]], &mut [f32], bool)) {
    let num_threads = (tch::get_num_threads() as usize).min(out.len() / THREAD_NUMEL).max(1);
    let part = out.len().div_ceil(num_threads).max(1);
    let sum_part = |i: usize, out: &mut [f32]| {
        let sources: Vec<&[T]> = sources.iter().map(|source| &source[i * part..i * part + out.len()]).collect();
        sum(&sources, out, accumulate);
    };
    std::thread::scope(|scope| {
        let mut parts = out.chunks_mut(part).enumerate();
        let first = parts.next();
        for (i, out) in parts {
            scope.spawn(move || sum_part(i, out));
        }
        if let Some((i, out)) = first {
            sum_part(i, out);
        }
    });
}

fn sum_side_by_side<T: Element<Wide = f32>>(sources: &[&[T]], out: &mut [f32], accumulate: bool) {
    let n = out.len();
    let put = |out: &mut f32, sum: f32| *out = if accumulate { *out + sum } else { sum };
    // The compiler drops the bounds checks because each slice is cut to the length of the loop.
    match *sources {
        [a, b] => {
            let (a, b) = (&a[..n], &b[..n]);
            (0..n).for_each(|i| put(&mut out[i], a[i].wide() + b[i].wide()));
        }
        [a, b, c] => {
            let (a, b, c) = (&a[..n], &b[..n], &c[..n]);
            (0..n).for_each(|i| put(&mut out[i], a[i].wide() + b[i].wide() + c[i].wide()));
        }
        [a, b, c, d] => {
            let (a, b, c, d) = (&a[..n], &b[..n], &c[..n], &d[..n]);
            (0..n).for_each(|i| put(&mut out[i], a[i].wide() + b[i].wide() + c[i].wide() + d[i].wide()));
        }
        _ => sum_in_blocks(sources, out, accumulate),
    }
}

fn sum_in_blocks<T: Element<Wide = f32>>(sources: &[&[T]], out: &mut [f32], accumulate: bool) {
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

    fn wide(self) -> Self::Wide;
    fn narrow(value: Self::Wide) -> Self;

    fn widen(from: &[Self], to: &mut [Self::Wide]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.wide());
    }
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

            fn wide(self) -> $number {
                self
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

    fn wide(self) -> f32 {
        // A bf16 is the upper half of an f32. (The crate's conversion also quiets NaNs, which is not vectorised.)
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn narrow(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

impl Element for f16 {
    type Wide = f32;

    fn wide(self) -> f32 {
        self.to_f32()
    }

    /// With the processor's own instruction, where it has one.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn value(rank: usize, i: usize) -> f32 {
        ((rank * 7919 + i * 104_729) % 20_011) as f32 / 64.0 - 150.0
    }

    fn check<T: Element<Wide = f32>>(kind: Kind, num_sources: usize, n: usize, accumulate: bool) {
        let sources: Vec<Vec<T>> = (0..num_sources).map(|r| (0..n).map(|i| T::narrow(value(r, i))).collect()).collect();
        let addresses: Vec<*const u8> = sources.iter().map(|source| source.as_ptr().cast()).collect();
        let before = |i: usize| value(100, i);
        let mut out: Vec<f32> = (0..n).map(before).collect();
        // SAFETY: the sources are vectors of `n` elements of that kind.
        unsafe { sum_into(kind, &addresses, &mut out, accumulate) };
        for (i, &out) in out.iter().enumerate() {
            let mut sum = sources[0][i].wide();
            sources[1..].iter().for_each(|source| sum += source[i].wide());
            let expected = if accumulate { before(i) + sum } else { sum };
            assert_eq!(out.to_bits(), expected.to_bits(), "{kind:?}, {num_sources} sources, element {i} of {n}");
        }
    }

    #[test]
    fn sums_add_the_sources_in_their_order() {
        for num_sources in 1..=6 {
            for n in [0, 1, 3, 1023, 1025, 4100] {
                for accumulate in [false, true] {
                    check::<f32>(Kind::Float, num_sources, n, accumulate);
                    check::<bf16>(Kind::BFloat16, num_sources, n, accumulate);
                    check::<f16>(Kind::Half, num_sources, n, accumulate);
                }
            }
        }
    }

    #[test]
    fn several_threads_change_no_bit() {
        tch::set_num_threads(3);
        for num_sources in [2, 5] {
            check::<f32>(Kind::Float, num_sources, 3 * THREAD_NUMEL + 17, true);
            check::<f16>(Kind::Half, num_sources, 2 * THREAD_NUMEL + 1, false);
        }
    }
}
