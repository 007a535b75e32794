//! Tiny models and data, and training them.

use std::path::Path;

use fsdp::{AdamWConfig, Engine, EngineConfig, EngineError, MicroBatch, Pace, Piece, StateKind, StepReport, init};
use fsdp_comm::ReduceOp;
use fsdp_plan::{Architecture, DeviceKind, Dtype, Offload, Plan, PlanInput, Strategy};
use tch::{Device, Tensor};

use crate::ranks::World;

/// Sequences of every step, over all ranks and microbatches.
pub const GLOBAL_BATCH: usize = 12;
pub const SEQ_LEN: usize = 6;

/// (param dtype, reduce dtype) of a parameter.
pub type Dtypes = fn(&str) -> (Dtype, Dtype);

/// One run on the world's ranks.
#[derive(Clone, Copy)]
pub struct Job {
    pub model: &'static str,
    pub compute: Dtype,
    pub dtypes: Dtypes,
    pub prefetch: usize,
    pub recompute: bool,
    pub accumulation: usize,
    pub num_replicas: usize,
    /// The strategy that allows for replicas, also where there is one.
    pub is_hybrid: bool,
    pub resident_units: usize,
    pub offload: Offload,
    pub lr: f64,
}

/// Key/value heads shared by query heads, tied head, 3 blocks.
pub const TIED: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": true, "initializer_range": 0.1}"#;
/// Four blocks, so that three slots are fewer than blocks.
pub const UNTIED: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 33, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "initializer_range": 0.1}"#;
pub const QWEN2: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "vocab_size": 35, "hidden_size": 12,
    "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "tie_word_embeddings": true, "initializer_range": 0.1}"#;
/// Norms over heads, whose width is not that of the model over their number.
pub const QWEN3: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 34, "hidden_size": 8,
    "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
    "initializer_range": 0.1}"#;
/// One block, nothing a power of two.
pub const ODD: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 37, "hidden_size": 10,
    "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 1, "attention_bias": true, "mlp_bias": true,
    "initializer_range": 0.1}"#;

pub fn fp32(_: &str) -> (Dtype, Dtype) {
    (Dtype::Fp32, Dtype::Fp32)
}

impl Job {
    /// A job in fp32 with the interface's defaults.
    pub fn new(model: &'static str) -> Self {
        Job {
            model,
            compute: Dtype::Fp32,
            dtypes: fp32,
            prefetch: 1,
            recompute: true,
            accumulation: 1,
            num_replicas: 1,
            is_hybrid: false,
            resident_units: 0,
            offload: Offload::None,
            lr: 1e-2,
        }
    }

    pub fn engine(&self, world: &mut World) -> Engine {
        self.engine_with(world, |config| config)
    }

    pub fn engine_with(&self, world: &mut World, change: impl FnOnce(EngineConfig) -> EngineConfig) -> Engine {
        let arch = Architecture::parse(Path::new("config.json"), self.model).unwrap();
        let input = PlanInput {
            num_shards: world.size / self.num_replicas,
            num_replicas: self.num_replicas,
            strategy: if self.num_replicas > 1 || self.is_hybrid { Strategy::HybridShard } else { Strategy::FullShard },
            resident_units: self.resident_units,
            prefetch: self.prefetch,
            recompute: self.recompute,
            accumulation: self.accumulation,
            micro_batch_size: self.micro_batch_size(world),
            seq_len: SEQ_LEN,
            compute_dtype: self.compute,
            device: DeviceKind::Cpu,
            offload: self.offload,
        };
        let plan = Plan::new(arch, &input, self.dtypes);
        let config = EngineConfig {
            seq_len: SEQ_LEN,
            micro_batch_size: self.micro_batch_size(world),
            buffer_dtype: Dtype::Fp32,
            // A large eps: a weight whose gradient is rounding noise then stays where it is.
            adamw: AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-3, weight_decay: 0.1 },
            max_grad_norm: Some(0.5),
            skip_non_finite: false,
        };
        let groups = world.groups(plan.num_shards);
        let mut engine = Engine::new(plan, change(config), groups).unwrap();
        write_params(&mut engine, |piece, values| init::fill(3, &piece.name, piece.init, piece.start, values, 1));
        engine
    }

    fn micro_batch_size(&self, world: &World) -> usize {
        assert_eq!(GLOBAL_BATCH % (world.size * self.accumulation), 0);
        GLOBAL_BATCH / (world.size * self.accumulation)
    }

    /// This rank's part of the global batch of `step`, which is the same for every split.
    pub fn batches(&self, world: &World, step: usize) -> Vec<MicroBatch> {
        let size = self.micro_batch_size(world);
        (0..self.accumulation)
            .map(|m| {
                let first = (m * world.size + world.rank) * size;
                let (mut ids, mut targets) = (Vec::new(), Vec::new());
                for sequence in first..first + size {
                    for position in 0..SEQ_LEN {
                        let token = |at: usize| ((sequence * 7 + at * at * 3 + step * 5) % 31) as i64;
                        ids.push(token(position));
                        // Sequences have different numbers of valid tokens, one has none.
                        targets.push(if position < sequence % 7 { token(position + 1) } else { -100 });
                    }
                }
                let num_valid_tokens = targets.iter().filter(|t| **t >= 0).count() as u64;
                MicroBatch::new(&ids, &targets, num_valid_tokens, Device::Cpu).unwrap()
            })
            .collect()
    }

    pub fn step(&self, world: &World, engine: &mut Engine, step: usize) -> StepReport {
        train_step(engine, self.batches(world, step), self.lr).unwrap()
    }

    /// Trains so many steps from the beginning.
    pub fn train(&self, world: &mut World, num_steps: usize) -> Run {
        let mut engine = self.engine(world);
        let reports = (0..num_steps).map(|step| self.step(world, &mut engine, step)).collect::<Vec<_>>();
        Run {
            losses: reports.iter().map(|r| r.loss).collect(),
            norms: reports.iter().map(|r| r.grad_norm).collect(),
            params: params(&mut engine),
        }
    }
}

/// One step, to its end.
pub fn train_step(engine: &mut Engine, batches: Vec<MicroBatch>, lr: f64) -> Result<StepReport, EngineError> {
    let started = engine.start_step(batches, lr, false, Pace::default())?;
    engine.finish_step(started)
}

/// What training left, the same on all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub params: Vec<f32>,
}

/// Changes this rank's pieces of the parameters.
pub fn write_params(engine: &mut Engine, mut f: impl FnMut(&Piece, &mut [f32])) {
    let write = |piece: &Piece, values: &mut [f32]| -> Result<(), EngineError> {
        f(piece, values);
        Ok(())
    };
    engine.write_state(StateKind::Param, write).unwrap();
}

/// A flat state of this rank.
pub fn state(engine: &Engine, kind: StateKind) -> Vec<f32> {
    let mut all = Vec::new();
    let mut add = |values: &[f32]| -> Result<(), EngineError> {
        all.extend_from_slice(values);
        Ok(())
    };
    engine.read_state(kind, |_, values| add(values)).unwrap();
    all
}

/// All parameters in the order of the plan, on every rank.
pub fn params(engine: &mut Engine) -> Vec<f32> {
    let mut starts = std::collections::HashMap::new();
    let mut numel = 0;
    for param in engine.plan().units.iter().flat_map(|unit| &unit.params) {
        starts.insert(param.name.clone(), numel);
        numel += param.numel();
    }
    let mut all = vec![0.0f32; numel];
    let copy = |piece: &Piece, values: &[f32]| -> Result<(), EngineError> {
        let at = starts[&piece.name] + piece.start;
        all[at..at + values.len()].copy_from_slice(values);
        Ok(())
    };
    engine.read_state(StateKind::Param, copy).unwrap();
    if engine.place().replica > 0 {
        all.fill(0.0);
    }
    // Each element is one rank's and zero on the others.
    let sum = Tensor::from_slice(&all);
    engine.process_group().all_reduce(&sum, ReduceOp::Sum).unwrap();
    Vec::try_from(sum).unwrap()
}

/// Bits of all of this rank's training state.
pub fn state_bits(engine: &Engine) -> Vec<u32> {
    let kinds = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq];
    kinds.into_iter().flat_map(|kind| state(engine, kind)).map(f32::to_bits).collect()
}

/// The largest difference, relative to the largest of `b`.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (x, y)| if (x - y).is_nan() { f64::NAN } else { m.max((x - y).abs()) }) / scale
}
