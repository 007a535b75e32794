//! Key-value store over TCP, by which ranks find each other. One server (in the first launcher), one [`Store`] a rank.
//!
//! - [`StoreServer`]: serves from background threads until it is dropped.
//! - [`Store`]: a client's connection.
//!
//! It is for rendezvous: small values, few of them, each kept until the server goes. There is no authentication, so bind
//! it to an address that only the machines of the run can reach.

mod client;
mod server;
mod wire;

pub use client::Store;
pub use server::StoreServer;
pub use wire::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
