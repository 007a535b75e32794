//! Key-value store over TCP, by which ranks find each other. One server (in the first launcher), one [`Store`] a rank.
//!
//! - [`StoreServer`]: serves from background threads until it is dropped.
//! - [`Store`]: a client's connection.
//!
//! It is for rendezvous: small values, few of them (256 MiB in all), each kept until the server goes. There is room for the
//! connections of 4096 ranks, where the system grants rank 0's process as many descriptors and threads. There is no authentication, so bind
//! it to an address that only the machines of the run can reach.

mod client;
mod server;
mod wire;

pub use client::Store;
pub use server::StoreServer;
pub use wire::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
