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

/// A unit of sharding. Its parameters stand in the fixed order of [`block_params`] (or of the other kinds below).
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
    let d = arch.hidden_size;
    let (q, kv) = (arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim);
    let f = arch.intermediate_size;
    let normal = Init::Normal { std: arch.initializer_range };
    let mut params = Vec::new();
    let mut push = |name: &str, shape: &[usize], init| {
        params.push(Param { name: format!("model.layers.{layer}.{name}"), shape: shape.to_vec(), init });
    };
    let linear = |push: &mut dyn FnMut(&str, &[usize], Init), name: &str, out: usize, input: usize, bias: bool| {
        push(&format!("{name}.weight"), &[out, input], normal);
        if bias {
            push(&format!("{name}.bias"), &[out], Init::Zeros);
        }
    };
    push("input_layernorm.weight", &[d], Init::Ones);
    linear(&mut push, "self_attn.q_proj", q, d, arch.qkv_bias);
    linear(&mut push, "self_attn.k_proj", kv, d, arch.qkv_bias);
    linear(&mut push, "self_attn.v_proj", kv, d, arch.qkv_bias);
    if arch.qk_norm {
        push("self_attn.q_norm.weight", &[arch.head_dim], Init::Ones);
        push("self_attn.k_norm.weight", &[arch.head_dim], Init::Ones);
    }
    linear(&mut push, "self_attn.o_proj", d, q, arch.o_bias);
    push("post_attention_layernorm.weight", &[d], Init::Ones);
    linear(&mut push, "mlp.gate_proj", f, d, arch.mlp_bias);
    linear(&mut push, "mlp.up_proj", f, d, arch.mlp_bias);
    linear(&mut push, "mlp.down_proj", d, f, arch.mlp_bias);
    params
}
