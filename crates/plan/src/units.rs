//! [`Architecture`] -> units: the pieces whose parameters are gathered, used and freed together.
//!
//! Names and shapes are those of the Hugging Face checkpoint, so that reading and writing need no renaming.

use crate::arch::Architecture;

/// How a parameter starts when no weights are read (`init = "random"`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Normal { std: f64 },
    Zeros,
    Ones,
}

/// One parameter of the model, as its checkpoint names and shapes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
}

impl Param {
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Weight decay acts on tensors of two or more dimensions only.
    pub fn has_weight_decay(&self) -> bool {
        self.shape.len() >= 2
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitKind {
    /// Token embedding.
    Embedding,
    /// Transformer block with this index.
    Block(usize),
    /// Final norm and language-model head.
    Head,
}

/// A unit of sharding. Its parameters stand in the order in which [`units`] makes them.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    pub kind: UnitKind,
    /// `embed_tokens`, `layers.3`, `head`.
    pub name: String,
    pub params: Vec<Param>,
}

impl Unit {
    pub fn num_params(&self) -> usize {
        self.params.iter().map(Param::numel).sum()
    }
}

/// The units of a model in forward order: embedding, blocks, head. With tied embeddings the head holds only the norm
/// and uses the embedding's weight.
pub fn units(arch: &Architecture) -> Vec<Unit> {
    let normal = Init::Normal { std: arch.initializer_range };
    let (v, d) = (arch.vocab_size, arch.hidden_size);
    let param = |name: &str, shape: &[usize], init| Param { name: name.to_string(), shape: shape.to_vec(), init };

    let mut units = vec![Unit {
        kind: UnitKind::Embedding,
        name: "embed_tokens".to_string(),
        params: vec![param("model.embed_tokens.weight", &[v, d], normal)],
    }];
    for layer in 0..arch.num_layers {
        units.push(Unit {
            kind: UnitKind::Block(layer),
            name: format!("layers.{layer}"),
            params: block_params(arch, layer),
        });
    }
    let mut head = vec![param("model.norm.weight", &[d], Init::Ones)];
    if !arch.tie_word_embeddings {
        head.push(param("lm_head.weight", &[v, d], normal));
    }
    units.push(Unit { kind: UnitKind::Head, name: "head".to_string(), params: head });
    units
}

/// Parameters of block `layer`, in the order in which its forward pass uses them.
fn block_params(arch: &Architecture, layer: usize) -> Vec<Param> {
    let (d, f) = (arch.hidden_size, arch.intermediate_size);
    let (q, kv) = (arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim);
    let normal = Init::Normal { std: arch.initializer_range };
    // Name, shape, initial values, whether the family has it.
    let all: [(&str, &[usize], Init, bool); 18] = [
        ("input_layernorm.weight", &[d], Init::Ones, true),
        ("self_attn.q_proj.weight", &[q, d], normal, true),
        ("self_attn.q_proj.bias", &[q], Init::Zeros, arch.qkv_bias),
        ("self_attn.k_proj.weight", &[kv, d], normal, true),
        ("self_attn.k_proj.bias", &[kv], Init::Zeros, arch.qkv_bias),
        ("self_attn.v_proj.weight", &[kv, d], normal, true),
        ("self_attn.v_proj.bias", &[kv], Init::Zeros, arch.qkv_bias),
        ("self_attn.q_norm.weight", &[arch.head_dim], Init::Ones, arch.qk_norm),
        ("self_attn.k_norm.weight", &[arch.head_dim], Init::Ones, arch.qk_norm),
        ("self_attn.o_proj.weight", &[d, q], normal, true),
        ("self_attn.o_proj.bias", &[d], Init::Zeros, arch.o_bias),
        ("post_attention_layernorm.weight", &[d], Init::Ones, true),
        ("mlp.gate_proj.weight", &[f, d], normal, true),
        ("mlp.gate_proj.bias", &[f], Init::Zeros, arch.mlp_bias),
        ("mlp.up_proj.weight", &[f, d], normal, true),
        ("mlp.up_proj.bias", &[f], Init::Zeros, arch.mlp_bias),
        ("mlp.down_proj.weight", &[d, f], normal, true),
        ("mlp.down_proj.bias", &[d], Init::Zeros, arch.mlp_bias),
    ];
    all.into_iter()
        .filter(|(.., present)| *present)
        .map(|(name, shape, init, _)| Param {
            name: format!("model.layers.{layer}.{name}"),
            shape: shape.to_vec(),
            init,
        })
        .collect()
}
