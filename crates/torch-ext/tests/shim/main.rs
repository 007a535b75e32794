//! The shim against plain computations, and its errors.

mod attention;
mod autograd;
mod close;
mod kernels;
mod memory;
mod optimizer;
mod rounding;
mod streams;
