//! A small model for the plan's tests.

use fsdp_plan::{Architecture, Family, RopeScaling};

/// A Llama with D = 64, F = 128, V = 100 and 2 query heads over 1 key/value head of width 32.
pub fn small_llama(num_layers: usize, tied: bool) -> Architecture {
    Architecture {
        family: Family::Llama,
        vocab_size: 100,
        hidden_size: 64,
        intermediate_size: 128,
        num_layers,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 32,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: tied,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_windows: vec![None; num_layers],
        initializer_range: 0.02,
    }
}
