//! In fp32 every family trains as `transformers` + `torch.optim.AdamW` do, however the batch is split over ranks and
//! microbatches, with and without recompute; and the exported model has the same weights.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use fsdp_tests_parity::export::read_tensors;
use fsdp_tests_parity::golden::{Distance, Golden, LossScale};
use fsdp_tests_parity::job::Job;

/// Relative. Correct code is 20 times nearer than this on CPUs.
const FP32: Distance = Distance { loss: 1e-5, grad_norm: 1e-4 };

const WORLD_SIZES: [u64; 4] = [1, 2, 3, 4];

/// A case, and where it begins in the table of splits.
type Case = (&'static str, usize);

const LLAMA_TIED: Case = ("llama_tied", 0);
const LLAMA_UNTIED: Case = ("llama_untied", 1);
const LLAMA_GQA: Case = ("llama_gqa", 2);
const LLAMA_ROPE_LINEAR: Case = ("llama_rope_linear", 3);
const LLAMA_ROPE_LLAMA3: Case = ("llama_rope_llama3", 0);
const LLAMA_ODD: Case = ("llama_odd", 1);
const MISTRAL: Case = ("mistral", 2);
const QWEN2: Case = ("qwen2", 3);
const QWEN3: Case = ("qwen3", 0);

/// How a run is split.
#[derive(Debug, Clone, Copy)]
struct Split {
    nproc: u64,
    grad_accumulation: u64,
    recompute: &'static str,
}

/// A case's four runs: every world size, and every pair of accumulation and recompute.
fn splits((_, start): Case) -> [Split; 4] {
    let pairs = [(1, "full"), (3, "none"), (3, "full"), (1, "none")];
    std::array::from_fn(|i| {
        let (grad_accumulation, recompute) = pairs[(start + i) % pairs.len()];
        Split { nproc: WORLD_SIZES[i], grad_accumulation, recompute }
    })
}

fn trains_as_pytorch(case: Case) -> Result<()> {
    let golden = Golden::load(case.0)?;
    for split in splits(case) {
        run(&golden, split).with_context(|| format!("{} with {split:?}", golden.case))?;
    }
    Ok(())
}

fn run(golden: &Golden, split: Split) -> Result<()> {
    let job = Job::new(golden, split.nproc, split.grad_accumulation)?;
    let metrics = job.run(&[&format!("activation_checkpointing.mode={}", split.recompute)])?;
    let what = format!("fp32 {} on {}", golden.case, job.ranks());
    golden.fp32.check(&what, &metrics, LossScale::Relative, FP32)?;
    golden.end.check(&read_tensors(&job.exported())?)
}

#[test]
fn llama_with_a_tied_head_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_TIED)
}

#[test]
fn llama_with_its_own_head_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_UNTIED)
}

#[test]
fn llama_with_grouped_queries_and_its_own_head_dim_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_GQA)
}

#[test]
fn llama_with_linear_rope_scaling_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_ROPE_LINEAR)
}

#[test]
fn llama_with_llama3_rope_scaling_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_ROPE_LLAMA3)
}

#[test]
fn llama_of_odd_sizes_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(LLAMA_ODD)
}

#[test]
fn mistral_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(MISTRAL)
}

#[test]
fn qwen2_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(QWEN2)
}

#[test]
fn qwen3_trains_as_pytorch() -> Result<()> {
    trains_as_pytorch(QWEN3)
}

#[test]
fn every_family_meets_every_world_size_and_every_two_settings_meet() {
    let cases =
        [LLAMA_TIED, LLAMA_UNTIED, LLAMA_GQA, LLAMA_ROPE_LINEAR, LLAMA_ROPE_LLAMA3, LLAMA_ODD, MISTRAL, QWEN2, QWEN3];
    let mut triples = BTreeSet::new();
    for case in cases {
        let mut pairs = BTreeSet::new();
        for Split { nproc, grad_accumulation, recompute } in splits(case) {
            pairs.insert((grad_accumulation, recompute));
            triples.insert((nproc, grad_accumulation, recompute));
        }
        assert_eq!(pairs.len(), 4, "{case:?}");
    }
    assert_eq!(triples.len(), 16, "{triples:?}");
}
