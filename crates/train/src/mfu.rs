//! Model FLOPs utilisation: the share of the device's dense peak that the model's own operations take (Chowdhery et al.,
//! "PaLM", arXiv:2204.02311, appendix B), with torchtitan's count of operations.

use fsdp_plan::{Plan, Unit};

/// Operations that one token costs forward and backward, recomputing not counted: 6 for each parameter outside of the
/// embedding, and 12 * layers * width of all heads * sequence length for attention over the whole square.
pub fn flops_per_token(plan: &Plan, seq_len: usize) -> f64 {
    let arch = &plan.arch;
    let embedding = plan.units[0].num_params();
    // A tied embedding is the head's matrix too, whose product counts.
    let others = plan.units[1..].iter().map(Unit::num_params).sum::<usize>();
    let matrices = others + if arch.tie_word_embeddings { embedding } else { 0 };
    6.0 * matrices as f64 + 12.0 * (arch.num_layers * arch.num_heads * arch.head_dim * seq_len) as f64
}

/// Dense peak of a card in bf16, in TFLOP/s, by a part of the name that its driver gives; more special names first.
/// From NVIDIA's data sheets, without sparsity.
const CARDS: &[(&str, f64)] = &[
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200 NVL", 836.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
];

/// The peak of the card `name`; `None` for one that the table does not have.
pub fn peak_tflops(name: &str) -> Option<f64> {
    CARDS.iter().find(|(part, _)| name.contains(part)).map(|(_, peak)| *peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_the_names_that_drivers_give() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989.0)),
            ("NVIDIA H100 PCIe", Some(756.0)),
            ("NVIDIA H200", Some(989.0)),
            ("NVIDIA H20", Some(148.0)),
            ("NVIDIA GH200 480GB", Some(989.0)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA A10", Some(125.0)),
            ("NVIDIA A10G", Some(70.0)),
            ("NVIDIA L40S", Some(362.0)),
            ("NVIDIA L4", Some(121.0)),
            ("NVIDIA GB300", Some(2500.0)),
            ("NVIDIA B200", Some(2250.0)),
            ("NVIDIA GeForce RTX 4090", Some(165.2)),
            ("Tesla K80", None),
        ] {
            assert_eq!(peak_tflops(name), peak, "{name}");
        }
    }
}
