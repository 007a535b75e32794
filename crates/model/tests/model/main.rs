//! Forward and backward of every piece of a model against the same mathematics in plain operations under autograd.
//!
//! Shapes: B sequences, T positions, N = B * T tokens, D model width, H query heads, K key/value heads, C head width,
//! V vocabulary.

mod block;
mod ends;
mod reference;
mod rope;
