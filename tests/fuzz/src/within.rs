//! Memory is bounded by the size of the input.

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// What a parser may hold beside its input.
const EXTRA_BYTES: usize = 64 << 20;

/// Runs `parse` on an input of `num_bytes`, and panics if memory grew by more than the input and [`EXTRA_BYTES`] meanwhile.
/// Other threads count too, so that no more than one should run.
pub(crate) fn memory_bound<T>(num_bytes: usize, parse: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let parsed = parse();
    let grown = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(grown <= num_bytes + EXTRA_BYTES, "{grown} bytes of memory for an input of {num_bytes}");
    parsed
}
