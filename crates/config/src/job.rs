//! The validated config: what the rest of the program reads.
//!
//! One struct per table. An enum has exactly the values that are built; a value that design and docs name but that
//! is not built yet is refused while reading, so no reader of these types has to.

use std::path::{Path, PathBuf};

use crate::error::ConfigError;
use crate::glob::glob_match;
use crate::lr_scheduler::LrScheduler;
use crate::{raw, read};

/// A job, complete and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct JobConfig {
    pub model: Model,
    pub fsdp: Fsdp,
    pub precision: Precision,
    pub activation_checkpointing: ActivationCheckpointing,
    pub optimizer: Optimizer,
    pub lr_scheduler: LrScheduler,
    pub training: Training,
    pub data: Data,
    pub validation: Option<Validation>,
    pub checkpoint: Checkpoint,
    pub metrics: Metrics,
    pub output: Output,
}

impl JobConfig {
    /// Reads `path`, applies `sets` (each `table.key=value`, later ones win over earlier ones and over the file) and
    /// validates the whole.
    ///
    /// # Errors
    /// The first thing that is wrong, in file order for unknown names, then table by table.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let bytes = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        read::job(raw::RawConfig::parse(&path.display().to_string(), &bytes, sets)?)
    }

    /// Parses a config from its text, such as the one in a checkpoint; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`JobConfig::load`].
    pub fn parse(origin: &str, text: &str) -> Result<Self, ConfigError> {
        read::job(raw::RawConfig::parse(origin, text.as_bytes(), &[])?)
    }

    /// Reads a config that [`JobConfig::to_toml`] wrote, as the workers do.
    ///
    /// # Errors
    /// As [`JobConfig::load`].
    pub fn from_resolved(path: &Path) -> Result<Self, ConfigError> {
        Self::load(path, &[])
    }

    /// Microbatches per step on each rank.
    ///
    /// # Errors
    /// [`ConfigError::GlobalBatch`] if `global_batch_size` does not divide evenly among `world_size` ranks.
    pub fn num_microbatches(&self, world_size: u64) -> Result<u64, ConfigError> {
        let micro_batch_size = self.training.micro_batch_size;
        match self.training.batch {
            Batch::Accumulation(num) => Ok(num),
            Batch::GlobalBatch(global_batch_size) => {
                let per_microbatch = micro_batch_size * world_size;
                if global_batch_size.is_multiple_of(per_microbatch) {
                    Ok(global_batch_size / per_microbatch)
                } else {
                    Err(ConfigError::GlobalBatch { global_batch_size, micro_batch_size, world_size })
                }
            }
        }
    }

    /// Makes a step take `global_batch_size` sequences on any number of ranks, as it did where a checkpoint was saved.
    ///
    /// # Errors
    /// [`ConfigError::KeepGlobalBatch`] if they do not divide evenly among `world_size` ranks. Where the config itself
    /// names the global batch, that is left to [`JobConfig::num_microbatches`].
    pub fn keep_global_batch(&mut self, global_batch_size: u64, world_size: u64) -> Result<(), ConfigError> {
        let micro_batch_size = self.training.micro_batch_size;
        if let Batch::Accumulation(_) = self.training.batch {
            let num = global_batch_size / (micro_batch_size * world_size);
            if num * micro_batch_size * world_size != global_batch_size {
                return Err(ConfigError::KeepGlobalBatch { global_batch_size, micro_batch_size, world_size });
            }
            self.training.batch = Batch::Accumulation(num);
        }
        Ok(())
    }

    /// Ranks that a unit is sharded over in a run of `world_size` ranks, `local_world_size` on each node.
    ///
    /// # Errors
    /// [`ConfigError::ShardSize`] if they do not make whole groups.
    pub fn num_shards(&self, world_size: u64, local_world_size: u64) -> Result<u64, ConfigError> {
        let shard_size = match self.fsdp.strategy {
            Strategy::FullShard | Strategy::ShardGradOp => world_size,
            Strategy::NoShard => 1,
            Strategy::HybridShard => self.fsdp.shard_size.unwrap_or(local_world_size),
        };
        if world_size.is_multiple_of(shard_size) {
            Ok(shard_size)
        } else {
            Err(ConfigError::ShardSize { shard_size, world_size, is_default: self.fsdp.shard_size.is_none() })
        }
    }

    /// The rate of step `step`, counted from 1, in a run of `total_steps`; see [`LrScheduler::lr_at`].
    pub fn lr_at(&self, step: u64, total_steps: u64) -> f64 {
        self.lr_scheduler.lr_at(self.optimizer.lr, step, total_steps)
    }
}

/// Defines closed enums whose values have a name in TOML.
macro_rules! choices {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            /// Every value under its name in TOML.
            pub(crate) const CHOICES: &'static [(&'static str, Self)] = &[$(($text, Self::$variant)),+];

            /// The value's name in TOML.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    )+};
}
pub(crate) use choices;

choices! {
    /// Where the first weights come from.
    Init {
        /// The safetensors files of the model folder.
        Pretrained = "pretrained",
        /// The initialiser, keyed by (seed, parameter name); the folder needs no weights.
        Random = "random",
    }
    /// What is sharded over which ranks.
    Strategy {
        /// Parameters, gradients and optimizer state over all ranks.
        FullShard = "full_shard",
        /// The same, but each block stays unsharded from forward to backward.
        ShardGradOp = "shard_grad_op",
        /// As `full_shard` over `shard_size` ranks; such groups are replicas, and their gradients are all-reduced.
        HybridShard = "hybrid_shard",
        /// Nothing: every rank is a replica (DDP).
        NoShard = "no_shard",
    }
    /// What becomes of a step whose loss or gradient is not finite. It never changes the weights.
    OnNonfinite {
        /// The run ends.
        Stop = "stop",
        /// The next step follows; the run ends after ten such steps in a row.
        Skip = "skip",
    }
    /// What makes a unit.
    Wrap {
        /// Each transformer block, and the two ends of the model.
        TransformerBlock = "transformer_block",
    }
    /// What carries the collectives.
    Backend {
        /// The best one for the machine: `nccl` on GPUs, `mpi` on several nodes without, else `shm`.
        Auto = "auto",
        /// Shared memory between the ranks of one host. With GPUs, data passes through the host's memory.
        Shm = "shm",
        /// NCCL, one GPU a rank.
        Nccl = "nccl",
        /// MPI, in binaries that are built with the feature `mpi`. With GPUs as for `shm`.
        Mpi = "mpi",
    }
    /// What computes.
    Device {
        /// GPUs where there are some, else the CPU.
        Auto = "auto",
        Cpu = "cpu",
        Cuda = "cuda",
    }
    /// What of a rank's training state is kept in the host's memory rather than the device's.
    Offload {
        None = "none",
        /// The moments of AdamW.
        Optimizer = "optimizer",
        /// The fp32 master weights too.
        Master = "master",
    }
    /// A floating-point type.
    Dtype {
        Fp32 = "fp32",
        Bf16 = "bf16",
        Fp16 = "fp16",
    }
    /// What backward computes again instead of keeping it.
    Recompute {
        /// All of a block.
        Full = "full",
        /// Nothing.
        None = "none",
    }
    /// What a line of the training data holds.
    Format {
        /// Found out from the first line.
        Auto = "auto",
        /// `input_ids` and optional `labels`.
        Tokens = "tokens",
        /// `text`, all of it learnt.
        Text = "text",
        /// `prompt` and `completion`, the completion learnt.
        Completion = "completion",
        /// `instruction`, optional `input`, and `output`, the output learnt.
        Alpaca = "alpaca",
    }
    /// The type of the exported weights.
    OutputDtype {
        /// The type that the source's weights have.
        Auto = "auto",
        Fp32 = "fp32",
        Bf16 = "bf16",
    }
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// A folder with `config.json`, weights and tokenizer files.
    pub path: String,
    pub init: Init,
}

/// `[fsdp]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Fsdp {
    pub strategy: Strategy,
    pub wrap: Wrap,
    /// For the strategies that shard parameters in forward: so many blocks (all if there are fewer) stay unsharded from
    /// forward to backward.
    pub resident_units: u64,
    /// Units gathered ahead of the one that computes; 0 = none.
    pub prefetch: u64,
    pub backend: Backend,
    pub device: Device,
    /// For [`Strategy::HybridShard`]: ranks that a unit is sharded over; `None` = the ranks of a node.
    pub shard_size: Option<u64>,
    pub offload: Offload,
    /// How long a rank waits in a collective for the others.
    pub timeout_secs: u64,
}

/// `[precision]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Precision {
    /// The type of unsharded parameters and of compute.
    pub param: Dtype,
    /// The type in which gradients are reduced.
    pub reduce: Dtype,
    /// The type of buffers that are no parameters (rotary tables).
    pub buffer: Dtype,
    /// Rules by parameter name, in file order; later ones win.
    pub overrides: Vec<PrecisionOverride>,
}

impl Precision {
    /// The (param, reduce) types of the parameter `name`.
    pub fn dtypes_of(&self, name: &str) -> (Dtype, Dtype) {
        let mut dtypes = (self.param, self.reduce);
        for rule in self.overrides.iter().filter(|rule| glob_match(&rule.match_glob, name)) {
            dtypes = (rule.param.unwrap_or(dtypes.0), rule.reduce.unwrap_or(dtypes.1));
        }
        dtypes
    }
}

/// One `[[precision.override]]`; `None` leaves the type as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct PrecisionOverride {
    /// `match`, a pattern for [`crate::glob_match`] over full parameter names.
    pub match_glob: String,
    pub param: Option<Dtype>,
    pub reduce: Option<Dtype>,
}

/// `[activation_checkpointing]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ActivationCheckpointing {
    pub mode: Recompute,
}

/// `[optimizer]`: AdamW.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    pub lr: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    /// Acts on tensors of two or more dimensions only.
    pub weight_decay: f64,
}

/// `[training]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    pub duration: Duration,
    /// Tokens of a sequence.
    pub seq_len: u64,
    /// Sequences of a microbatch on one rank.
    pub micro_batch_size: u64,
    pub batch: Batch,
    /// Gradients are scaled down to this global norm; `None` (`max_grad_norm = 0`) leaves them as they are.
    pub max_grad_norm: Option<f64>,
    pub seed: u64,
    /// Use only kernels that give the same bits each time (CPU runs always do).
    pub deterministic: bool,
    pub on_nonfinite: OnNonfinite,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duration {
    Steps(u64),
    Epochs(u64),
}

/// What fixes the batch of a step; the other follows, see [`JobConfig::num_microbatches`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    /// `grad_accumulation`: microbatches a step on each rank.
    Accumulation(u64),
    /// `global_batch_size`: sequences a step over all ranks.
    GlobalBatch(u64),
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// JSONL files, read in this order.
    pub train: Vec<PathBuf>,
    pub format: Format,
    pub shuffle: bool,
    /// Several short documents in one sequence.
    pub packing: bool,
}

/// `[validation]`; at least one of `data` and `prompts` is not empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Validation {
    /// JSONL files in the format of `[data]`.
    pub data: Vec<PathBuf>,
    /// Steps between two validations; 0 = only after the last step.
    pub every_steps: u64,
    /// Answered greedily at each validation.
    pub prompts: Vec<String>,
    /// The longest answer to a prompt.
    pub max_new_tokens: u64,
}

/// `[checkpoint]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Steps between two checkpoints; 0 = never.
    pub every_steps: u64,
    /// How many of the newest checkpoints stay; at least 2.
    pub keep: u64,
    /// Checkpoints of multiples of so many steps stay besides; 0 = none.
    pub keep_every: u64,
    pub resume: Resume,
    /// `async`: training goes on as soon as the state is copied, and the copy is written behind it.
    pub async_save: bool,
}

/// Where a run begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Resume {
    /// At the newest checkpoint of the output folder, or at step 1 if there is none.
    Auto,
    /// At step 1; checkpoints in the output folder are an error.
    Never,
    /// At this checkpoint.
    Path(PathBuf),
}

/// `[metrics]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// Steps between two lines on the console; `metrics.jsonl` has every step.
    pub log_every: u64,
    pub tensorboard: bool,
    /// Steps of which a timeline is written.
    pub trace_steps: Option<TraceSteps>,
    /// The device's peak, for the model's share of it (MFU); `None` = from a table of cards.
    pub peak_tflops: Option<f64>,
}

/// The steps from `first` to `last`, both included, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceSteps {
    pub first: u64,
    pub last: u64,
}

impl TraceSteps {
    pub fn contains(self, step: u64) -> bool {
        (self.first..=self.last).contains(&step)
    }
}

/// `[output]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub dir: PathBuf,
    pub dtype: OutputDtype,
}
