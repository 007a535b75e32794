//! The shim against plain computations, and its errors.

mod attention;
mod autograd;
mod close;
mod kernels;
mod memory;
mod optimizer;
mod pinned;
mod plain;
mod rounding;
mod shapes;
mod streams;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Seeds libtorch's generator, which all tests share, and keeps it for the test that holds the guard.
fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    guard
}
