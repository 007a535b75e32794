//! The block of each family: output and all gradients, in fp32 and in narrower dtypes.

use std::path::Path;

use fsdp_model::{BatchShape, Block, RopeTables, Segment, kind, unmarked};
use fsdp_plan::costs::UnitCosts;
use fsdp_plan::replay::Batch;
use fsdp_plan::{Architecture, DeviceKind, Dtype, Keep, Offload, Plan, PlanInput, Strategy};
use fsdp_torch_ext as ext;
use tch::{Device, Kind, Tensor};

use crate::reference::{self, Random, assert_near};

const BATCH: i64 = 2;
const SEQ_LEN: i64 = 7;

/// Families and options. The second block is looked at, which has the window where one is set.
const CASES: [(&str, &str); 8] = [
    ("llama", r#""architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4"#),
    ("llama with grouped heads", r#""architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2"#),
    (
        "llama with biases everywhere and its own head width",
        r#""architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, "attention_bias": true, "mlp_bias": true,
           "head_dim": 10"#,
    ),
    ("mistral", r#""architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 3"#),
    (
        "mistral with a window of one",
        r#""architectures": ["MistralForCausalLM"], "num_key_value_heads": 4, "sliding_window": 1"#,
    ),
    (
        "mistral with a long window",
        r#""architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": 7"#,
    ),
    (
        "qwen2 with a window",
        r#""architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "use_sliding_window": true,
           "sliding_window": 2, "max_window_layers": 1"#,
    ),
    ("qwen3", r#""architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 6"#),
];

/// Of sums that cancel, such as the gradient of a key's bias; most are off by a tenth of it.
const BF16: f64 = 6e-2;

/// One block, its parameters with random values, an input and an output's gradient.
struct Fixture {
    arch: Architecture,
    plan: Plan,
    names: Vec<String>,
    params: Vec<Tensor>, // fp32
    x: Tensor,           // fp32 [N, D]
    dy: Tensor,          // fp32 [N, D]
}

/// What a pass through the block gives.
struct Passed {
    y: Tensor,
    dx: Tensor,
    grads: Vec<Tensor>,
}

impl Fixture {
    fn new(options: &str, compute: Dtype, dtypes: impl Fn(&str) -> (Dtype, Dtype)) -> Self {
        tch::set_num_threads(1);
        let mut random = Random::new(1);
        let json = format!(
            r#"{{{options}, "vocab_size": 9, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
                "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 100.0}}"#
        );
        let arch = Architecture::parse(Path::new("config.json"), &json).unwrap();
        let input = PlanInput {
            num_shards: 1,
            num_replicas: 1,
            strategy: Strategy::FullShard,
            resident_units: 0,
            prefetch: 1,
            recompute: true,
            accumulation: 1,
            micro_batch_size: BATCH as usize,
            seq_len: SEQ_LEN as usize,
            compute_dtype: compute,
            device: DeviceKind::Cpu,
            offload: Offload::None,
        };
        let plan = Plan::new(arch.clone(), &input, dtypes);
        let unit = &plan.units[2];
        let names = unit.params.iter().map(|p| p.name.replace("model.layers.1.", "")).collect();
        let mut param = |p: &fsdp_plan::Param| {
            let shape: Vec<i64> = p.shape.iter().map(|&n| n as i64).collect();
            // Norms are around one, matrices keep sizes as they are.
            let around = if p.name.contains("norm") { 1.0 } else { 0.0 };
            random.tensor(&shape, 0.3) + around
        };
        let params = unit.params.iter().map(&mut param).collect();
        let tokens = [BATCH * SEQ_LEN, arch.hidden_size as i64];
        let (x, dy) = (random.tensor(&tokens, 1.0), random.tensor(&tokens, 1.0));
        Fixture { arch, plan, names, params, x, dy }
    }

    /// Rounds everything to the dtypes that the block gets it in, so that only its own rounding is left.
    fn round(&mut self, kinds: &[Kind], compute: Kind) {
        let rounded = |t: &Tensor, kind| t.to_kind(kind).to_kind(Kind::Float);
        self.params = self.params.iter().zip(kinds).map(|(p, &kind)| rounded(p, kind)).collect();
        self.x = rounded(&self.x, compute);
        self.dy = rounded(&self.dy, compute);
    }

    fn reference(&self) -> Passed {
        let track = |t: &Tensor| t.detach().copy().set_requires_grad(true);
        let (x, params) = (track(&self.x), self.params.iter().map(track).collect::<Vec<_>>());
        let param = |name: &str| self.names.iter().position(|n| n == name).map(|i| params[i].shallow_clone());
        let y = reference::block(&self.arch, self.arch.sliding_windows[1], &param, &x, SEQ_LEN);
        let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&params).collect();
        let mut grads = ext::grad(&[&y], &inputs, &[&self.dy], false, false).unwrap().into_iter().map(Option::unwrap);
        Passed { dx: grads.next().unwrap(), grads: grads.collect(), y: y.detach() }
    }

    fn block(&self) -> (Block, RopeTables, BatchShape) {
        let block = Block::new(&self.arch, 1, SEQ_LEN as usize);
        let rope = RopeTables::new(&self.arch, SEQ_LEN as usize, Dtype::Fp32, Device::Cpu).unwrap();
        (block, rope, BatchShape { batch: BATCH, seq_len: SEQ_LEN })
    }

    /// The block's own pass, with parameters in `kinds` and gradients in fp32; activations kept, or made again.
    fn pass(&self, kinds: &[Kind], grad_kind: Kind, compute: Kind, recompute: bool) -> Passed {
        let (block, rope, shape) = self.block();
        let params: Vec<Tensor> = self.params.iter().zip(kinds).map(|(p, &kind)| p.to_kind(kind)).collect();
        // Whatever is not written shows.
        let grads: Vec<Tensor> = params.iter().map(|p| p.full_like(f64::NAN).to_kind(grad_kind)).collect();
        let x = self.x.to_kind(compute);
        let (y, mut kept) = block.forward(&params, x.shallow_clone(), &rope, shape, &mut unmarked).unwrap();
        let num_bytes = kept.num_bytes();
        if recompute {
            kept = block.recompute(&params, x.copy(), &rope, shape, &mut unmarked).unwrap();
        }
        assert_eq!(kept.num_bytes(), num_bytes);
        let dy = self.dy.to_kind(compute);
        let dx = block.backward(&params, &grads, kept, dy, &rope, shape, &mut unmarked).unwrap();
        assert!(y.kind() == compute && dx.kind() == compute);
        Passed { y, dx, grads }
    }

    #[track_caller]
    fn assert_passes_near(&self, name: &str, got: &Passed, expected: &Passed, tolerance: f64) {
        assert_near(&format!("{name}: y"), &got.y, &expected.y, tolerance);
        assert_near(&format!("{name}: dx"), &got.dx, &expected.dx, tolerance);
        for (i, param) in self.names.iter().enumerate() {
            assert_near(&format!("{name}: gradient of {param}"), &got.grads[i], &expected.grads[i], tolerance);
        }
    }
}

fn everywhere(dtype: Dtype) -> impl Fn(&str) -> (Dtype, Dtype) {
    move |_| (dtype, Dtype::Fp32)
}

#[test]
fn in_fp32_blocks_agree_with_autograd() {
    for (name, options) in CASES {
        let fixture = Fixture::new(options, Dtype::Fp32, everywhere(Dtype::Fp32));
        let kinds = vec![Kind::Float; fixture.params.len()];
        let expected = fixture.reference();
        for recompute in [false, true] {
            let got = fixture.pass(&kinds, Kind::Float, Kind::Float, recompute);
            fixture.assert_passes_near(name, &got, &expected, 5e-6);
        }
    }
}

#[test]
fn in_narrow_dtypes_blocks_are_near_autograd_in_fp32() {
    for (name, options) in CASES {
        for (compute, tolerance) in [(Dtype::Bf16, BF16), (Dtype::Fp16, 6e-3)] {
            for (grad_kind, matrices, others) in [
                (Kind::Float, compute, compute),
                (kind(compute), compute, compute),
                // Overrides: norms and biases, or matrices, in fp32, or in the other narrow dtype.
                (Kind::Float, compute, Dtype::Fp32),
                (Kind::Float, Dtype::Fp32, compute),
                (Kind::BFloat16, Dtype::Bf16, Dtype::Fp16),
            ] {
                let mut fixture = Fixture::new(options, compute, everywhere(compute));
                let kinds: Vec<Kind> =
                    fixture.params.iter().map(|p| kind(if p.dim() == 2 { matrices } else { others })).collect();
                fixture.round(&kinds, kind(compute));
                let got = fixture.pass(&kinds, grad_kind, kind(compute), true);
                let has_bf16 = grad_kind == Kind::BFloat16 || kinds.contains(&Kind::BFloat16);
                let tolerance = if has_bf16 { BF16 } else { tolerance };
                let name = format!("{name} in {compute}, gradients {grad_kind:?}, {matrices} and {others}");
                fixture.assert_passes_near(&name, &got, &fixture.reference(), tolerance);
            }
        }
    }
}

#[test]
fn recomputed_activations_have_the_same_bits() {
    for (name, options) in CASES {
        for compute in [Dtype::Fp32, Dtype::Bf16] {
            let fixture = Fixture::new(options, compute, everywhere(compute));
            let kinds = vec![kind(compute); fixture.params.len()];
            let [kept, made_again] = [false, true].map(|again| fixture.pass(&kinds, Kind::Float, kind(compute), again));
            assert!(kept.dx.equal(&made_again.dx), "{name}: dx");
            for (i, param) in fixture.names.iter().enumerate() {
                assert!(kept.grads[i].equal(&made_again.grads[i]), "{name}: gradient of {param}");
            }
        }
    }
}

#[test]
fn a_block_keeps_the_bytes_that_the_plan_says() {
    for (name, options) in CASES {
        for compute in [Dtype::Fp32, Dtype::Bf16] {
            let fixture = Fixture::new(options, compute, everywhere(compute));
            let (block, rope, shape) = fixture.block();
            let params: Vec<Tensor> = fixture.params.iter().map(|p| p.to_kind(kind(compute))).collect();
            let x = fixture.x.to_kind(kind(compute));
            let (_, kept) = block.forward(&params, x, &rope, shape, &mut unmarked).unwrap();
            let batch = Batch { micro_batch_size: BATCH as usize, seq_len: SEQ_LEN as usize };
            let per_token = UnitCosts::new(&fixture.plan, 2, batch).kept_per_token(Keep::Activations);
            assert_eq!(kept.num_bytes() as u64, per_token * batch.num_tokens(), "{name} in {compute}");
        }
    }
}

#[test]
fn segments_are_marked_in_their_order() {
    use Segment::*;
    let fixture = Fixture::new(CASES[0].1, Dtype::Fp32, everywhere(Dtype::Fp32));
    let (block, rope, shape) = fixture.block();
    let (params, x) = (&fixture.params, || fixture.x.copy());
    let mut seen = vec![];
    let mut mark = |segment| seen.push(segment);
    let _ = block.forward(params, x(), &rope, shape, &mut mark).unwrap();
    let kept = block.recompute(params, x(), &rope, shape, &mut mark).unwrap();
    let grads: Vec<Tensor> = params.iter().map(Tensor::zeros_like).collect();
    let _ = block.backward(params, &grads, kept, fixture.dy.copy(), &rope, shape, &mut mark).unwrap();
    let forward = [AttentionInput, AttentionCore, Rest, Down];
    let backward = [DownBackward, RestBackward, AttentionCoreBackward, AttentionInputBackward];
    assert_eq!(seen, [&forward[..], &forward[..3], &backward].concat());
}
