//! Decoder families as units of segments: embedding, transformer block, head; forward and backward of each.
//!
//! Layout:
//! - [`block`]: the transformer block of Llama, Mistral, Qwen2 and Qwen3.
//! - [`attention`]: causal attention, with or without a sliding window.
//! - [`linear`]: products with weights and their gradients; [`norm`]: RMSNorm.
//! - [`ends`]: the embedding, and the head with its chunked cross-entropy.
//! - [`rope`]: rotary tables.
//! - [`segment`]: the names of a pass's parts, for a timeline.
//!
//! Backward passes are written out, there is no autograd graph: what a block keeps is a struct, its gradients are
//! written once, straight into the flat gradient buffer, and the product that only yields a block's output is not
//! computed again when activations are recomputed.
//!
//! Shapes: B sequences, T positions, N = B * T tokens, D model width, H query heads, K key/value heads, C head width,
//! F MLP width, V vocabulary. Activations are 2-D with tokens as rows.
//!
//! **Architecture invariant:** nothing here knows of ranks, shards or files.
#![forbid(unsafe_code)]

pub mod attention;
pub mod block;
pub mod ends;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod segment;

pub use block::{Activations, Block};
pub use ends::{Embedding, Head, HeadLoss};
pub use rope::RopeTables;
pub use segment::{Mark, Segment, unmarked};

use fsdp_plan::Dtype;
use tch::{Kind, TchError};

/// The libtorch dtype of `dtype`.
pub fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Fp32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp16 => Kind::Half,
    }
}

/// An operation of libtorch failed: a bug here, or memory that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("libtorch: {}", first_line(.0))]
    Tch(#[from] TchError),
    #[error(transparent)]
    Torch(#[from] fsdp_torch_ext::TorchError),
}

/// Sizes of one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    pub batch: i64,
    pub seq_len: i64,
}

impl BatchShape {
    pub fn num_tokens(self) -> i64 {
        self.batch * self.seq_len
    }
}

/// The message of an exception of libtorch without the C++ stack that follows it.
pub fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
