//! The job on one rank: from config to exported model.

use std::path::Path;
use std::time::{Duration, Instant};

use fsdp::{
    AdamWConfig, Engine, EngineConfig, EngineError, Groups, MicroBatch, NonFinite, Pace, StartedStep, StepReport,
};
use fsdp_comm::ProcessGroup;
use fsdp_config::{self as config, Backend, JobConfig, OnNonfinite};
use fsdp_control::env::WorkerEnv;
use fsdp_control::progress::{Phase, ProgressHandle};
use fsdp_control::stop::StopFlag;
use fsdp_control::store::Store;
use fsdp_data::{DataSpec, Dataset, Loader, Position};
use fsdp_plan::{Architecture, Plan};
use fsdp_torch_ext::accelerator;
use tch::Device;

use crate::bootstrap::resolve_backend;
use crate::checkpoints::{self, Inputs, TrainerState};
use crate::console::Console;
use crate::device;
use crate::error::TrainError;
use crate::metrics::{StepLines, ValidationLine};
use crate::mfu;
use crate::nodes;
use crate::saver::Saver;
use crate::step_log::{Rates, StepFacts, StepLog};
use crate::stragglers::Stragglers;
use crate::traces::Tracer;
use crate::validation::Validator;
use crate::weights::{self, Exported};
use crate::whereabouts::Whereabouts;

/// How a run ended without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Asked to stop, with a committed checkpoint.
    Stopped,
}

/// One rank's trainer.
#[derive(Debug)]
pub struct Trainer {
    config: JobConfig,
    rank: usize,
    engine: Engine,
    loader: Loader,
    validator: Validator,
    saver: Saver,
    log: StepLog,
    stragglers: Stragglers,
    /// Rank 0's, while it trains.
    answers: Option<StepLines>,
    tracer: Tracer,
    stop: StopFlag,
    whereabouts: Whereabouts,
    total_steps: u64,
    /// Steps started.
    step: u64,
    /// The step that the device works on, while its verdict is not read.
    started: Option<Started>,
    /// A rank was asked to stop, as the last verdict says.
    stops: bool,
    /// Of this rank in the last step.
    pace: Pace,
    /// Steps in a row that were left out because something was not finite.
    num_left_out: u64,
}

/// So many steps that are not finite, one after the other, are no accident.
const MAX_LEFT_OUT: u64 = 10;

/// A step of which the verdict is to come, and what its line of metrics will say besides.
#[derive(Debug)]
struct Started {
    work: StartedStep,
    facts: StepFacts,
    /// Time for its data and for giving it to the device, which on a CPU is computing it.
    host_time: Duration,
}

impl Trainer {
    /// Opens everything and brings the state to where training begins. Collective.
    pub fn new(
        mut config: JobConfig,
        env: &WorkerEnv,
        stop: StopFlag,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, TrainError> {
        let start = Instant::now();
        let (rank, world_size) = (env.rank, env.world_size);
        let timeout = Duration::from_secs(config.fsdp.timeout_secs);
        let console = Console::new(env, config.metrics.log_every);
        // Before the process is bound to a part of them.
        let num_threads = num_threads(env);
        let compute = device::choose(config.fsdp.device, env)?;
        let has_gpu = compute.device != Device::Cpu;
        config.fsdp.device = if has_gpu { config::Device::Cuda } else { config::Device::Cpu };
        config.fsdp.backend = resolve_backend(config.fsdp.backend, env, has_gpu, cfg!(feature = "mpi"))?;
        // A rank that sees one GPU may have it to itself; else NCCL says that it has not.
        if config.fsdp.backend == Backend::Nccl && compute.num_gpus > 1 && env.local_world_size > compute.num_gpus {
            return Err(TrainError::BadInput(format!(
                "[fsdp] backend = \"nccl\": expected one GPU a rank, got {} ranks and {} GPUs on this node; start fewer \
                 ranks, or use \"shm\"",
                env.local_world_size, compute.num_gpus
            )));
        }
        let mut store = Store::connect((&env.master_addr, env.master_port), timeout)?;
        nodes::agree(&mut store, &config, env, &compute)?;
        if config.training.deterministic {
            accelerator::set_deterministic(true)?;
        }
        tch::set_num_threads(num_threads);

        console.phase("opening model and data");
        if !Path::new(&config.model.path).is_dir() {
            return Err(TrainError::BadInput(format!(
                "[model] path: expected a folder, got {:?}; a model of the Hugging Face Hub is downloaded by fsdp-launch: \
                 start with it, or give the folder that fsdp-launch check prints",
                config.model.path
            )));
        }
        let arch = Architecture::from_config_json(Path::new(&config.model.path))?;
        let vocab_size = arch.vocab_size;
        let dataset = Dataset::open(&DataSpec::for_training(&config, vocab_size))?;
        let inputs = Inputs::of(&config, dataset.digest())?;
        nodes::agree_on_inputs(&mut store, env, &inputs, timeout)?;
        let resumed = checkpoints::choose(&config, &inputs, (rank, world_size), &mut store)?;
        // Another number of ranks takes as many sequences a step; the config that is saved stays as it is.
        let mut of_these_ranks = config.clone();
        if let Some(resumed) = &resumed {
            of_these_ranks.keep_global_batch(resumed.state.global_batch_size, world_size as u64)?;
        }
        let plan = Plan::for_job(&of_these_ranks, arch, world_size, env.local_world_size)?;
        let validator = Validator::open(&config, dataset.format(), vocab_size, (rank, world_size))?;
        let accumulation = of_these_ranks.num_microbatches(world_size as u64)? as usize;
        let micro_batch_size = config.training.micro_batch_size as usize;
        let mut loader = Loader::new(dataset, rank, world_size, micro_batch_size, accumulation);
        let total_steps = match config.training.duration {
            config::Duration::Steps(steps) => steps,
            config::Duration::Epochs(epochs) => epochs.saturating_mul(loader.steps_per_epoch()),
        };

        let watched = progress.clone();
        let whereabouts = Whereabouts { launcher: progress };
        let world = match config.fsdp.backend {
            Backend::Nccl => {
                ProcessGroup::connect_nccl(&mut store, rank, world_size, compute.device, timeout, watched)?
            }
            Backend::Mpi => ProcessGroup::connect_mpi(&mut store, rank, world_size, timeout, watched)?,
            Backend::Auto | Backend::Shm => ProcessGroup::connect_shm(&mut store, rank, world_size, timeout, watched)?,
        };
        let world = if has_gpu && world.device() == Device::Cpu { world.staged(compute.device) } else { world };
        let groups = Groups::new(world, &mut store, plan.num_shards)?;
        let rates = Rates {
            tokens_per_step: (accumulation * micro_batch_size) as f64 * config.training.seq_len as f64,
            flops_per_token: mfu::flops_per_token(&plan, config.training.seq_len as usize),
            peak_tflops: config.metrics.peak_tflops.or(compute.info.as_ref().and_then(|i| mfu::peak_tflops(&i.name))),
        };
        let mut engine = Engine::new(plan, engine_config(&config), groups)?;

        console.phase("loading weights");
        whereabouts.enter(Phase::Load);
        let step = match &resumed {
            Some(resumed) => {
                resumed.load(&mut engine)?;
                loader.seek(resumed.state.position)?;
                resumed.state.step
            }
            None => {
                weights::load(&mut engine, &config)?;
                0
            }
        };
        tracing::info!(
            "{} parameters on {world_size} ranks ({}, {}), {} threads each, ready in {:.2} s",
            engine.plan().num_params(),
            compute.info.as_ref().map_or("cpu", |info| &info.name),
            config.fsdp.backend.name(),
            tch::get_num_threads(),
            start.elapsed().as_secs_f64()
        );
        let saver = Saver::new(&config, inputs, env, &engine, resumed.map(|r| r.state.step))?;
        Ok(Trainer {
            tracer: Tracer::new(&config, rank),
            config,
            rank,
            engine,
            loader,
            validator,
            saver,
            log: StepLog::new(console, rates, total_steps),
            stragglers: Stragglers::default(),
            answers: None,
            stop,
            whereabouts,
            total_steps,
            step,
            started: None,
            stops: false,
            pace: Pace::default(),
            num_left_out: 0,
        })
    }

    /// Trains to the end, or until a rank is asked to stop. Where that fails, it leaves what the process groups did last.
    pub fn run(mut self) -> Result<Outcome, TrainError> {
        match self.train() {
            Ok(outcome) => {
                self.tracer.finish()?;
                self.engine.close()?;
                Ok(outcome)
            }
            Err(error) => {
                // All ranks stop at this step, and the save before it is as good as any.
                if let TrainError::NonFinite { .. } | TrainError::LeftOut { .. } = error
                    && let Err(error) = self.saver.wait()
                {
                    tracing::warn!("{error}");
                }
                let (dir, stem) = (self.config.output.dir.join("logs"), format!("flight-rank-{}", self.rank));
                if let Err(error) = self.engine.write_flight_records(&dir, &stem) {
                    tracing::warn!("{error}");
                }
                Err(error)
            }
        }
    }

    fn train(&mut self) -> Result<Outcome, TrainError> {
        if self.is_finished()? {
            tracing::info!("nothing to do: all {} steps are done and exported", self.total_steps);
            return Ok(Outcome::Done);
        }
        if self.step > self.total_steps {
            return Err(TrainError::BadInput(format!(
                "[training] steps: expected at least the {} that are done, got {}; the checkpoint is of a longer run",
                self.step, self.total_steps
            )));
        }
        // All ranks have looked before rank 0 removes it.
        self.engine.barrier()?;
        if self.rank == 0 {
            Exported::forget(&self.config)?;
            let dir = &self.config.output.dir;
            self.log.metrics = Some(StepLines::open(&dir.join("metrics.jsonl"), self.step)?);
            if self.validator.has_prompts() {
                self.answers = Some(StepLines::open(&dir.join("answers.jsonl"), self.step)?);
            }
        }
        self.log.restart_clock();
        while self.step < self.total_steps {
            self.start_step()?;
            let is_last = self.step == self.total_steps;
            let validates = is_due(self.step, self.config.validation.as_ref().map_or(0, |v| v.every_steps)) || is_last;
            let every_steps = self.config.checkpoint.every_steps;
            let saves = is_due(self.step, every_steps) || (is_last && every_steps > 0);
            // A GPU goes on with the next step while this one's verdict comes, unless a step may have to be left out: what was
            // wrong is found by computing it again over the same weights.
            let leaves_out = self.config.training.on_nonfinite == OnNonfinite::Skip;
            if validates || saves || leaves_out || self.engine.device() == Device::Cpu {
                self.finish_step()?;
            }
            // Who asks to stop does not wait for a validation.
            let stop = self.stops || (validates && !self.validate()?);
            if stop && !is_last {
                self.finish_step()?;
                let state = self.state()?;
                self.saver.save_now(&mut self.engine, state)?;
                let signal = self.stop.signal_name().map_or_else(String::new, |name| format!(" by {name}"));
                tracing::info!("stopped{signal} after step {}; the same command goes on from here", self.step);
                return Ok(Outcome::Stopped);
            }
            if saves {
                let state = self.state()?;
                self.saver.save(&mut self.engine, state)?;
            }
            self.saver.poll()?;
        }
        self.log.console.phase("exporting the model");
        self.whereabouts.enter(Phase::Export);
        weights::export(&mut self.engine, &self.config, self.step)?;
        self.saver.finish(&mut self.engine)?;
        tracing::info!("exported {}", self.config.output.dir.join("hf").display());
        Ok(Outcome::Done)
    }

    /// Whether the output folder holds this job's end: an export of it, and a checkpoint where one is made of the end.
    fn is_finished(&self) -> Result<bool, TrainError> {
        match Exported::read(&self.config) {
            Some(exported) if self.step == self.total_steps || export_alone_counts(&self.config, self.step) => {
                exported.is_end_of(&self.config, self.total_steps)
            }
            _ => Ok(false),
        }
    }

    /// One optimizer step: microbatches, program. The verdict of the step before is read once this one is on its way.
    fn start_step(&mut self) -> Result<(), TrainError> {
        let step = self.step + 1;
        self.whereabouts.enter_step(step, Phase::Data);
        let position = self.loader.position();
        let data_start = Instant::now();
        let device = self.engine.device();
        let batches = self.loader.next_step()?;
        let batches = batches
            .iter()
            .map(|b| MicroBatch::new(&b.input_ids, &b.targets, b.num_valid_tokens, device))
            .collect::<Result<Vec<_>, _>>()?;
        let data_time = data_start.elapsed();
        self.whereabouts.enter(Phase::ForwardBackward);
        let lr = self.config.lr_at(step, self.total_steps);
        if self.tracer.traces(step) {
            self.finish_step()?;
            self.engine.start_timeline()?;
        }
        let start = Instant::now();
        #[cfg(feature = "faults")]
        crate::faults::strike(self.rank, step, &mut self.engine)?;
        let work = self.engine.start_step(batches, lr, self.stop.is_set(), self.pace)?;
        let host_time = data_time + start.elapsed();
        self.step = step;
        self.finish_step()?;
        self.whereabouts.judge_step(step);
        let facts = StepFacts { step, lr, position, data_time };
        self.started = Some(Started { work, facts, host_time });
        if self.tracer.traces(step) {
            let spans = self.engine.take_timeline()?;
            self.tracer.take(step, start, spans)?;
        }
        Ok(())
    }

    /// Reads the verdict of the step under way, if there is one, and logs it.
    fn finish_step(&mut self) -> Result<(), TrainError> {
        let Some(Started { work, facts, host_time }) = self.started.take() else { return Ok(()) };
        self.whereabouts.judge_step(facts.step);
        let report = self.engine.finish_step(work).map_err(|error| match error {
            EngineError::NonFinite(place) => self.not_finite(place, facts.position),
            error => error.into(),
        })?;
        self.stops |= report.stop;
        let busy = match self.engine.device() {
            Device::Cpu => host_time.saturating_sub(report.comm_time),
            _ => facts.data_time,
        };
        self.pace = Pace { busy, data: facts.data_time };
        if self.rank == 0
            && let Some(warning) = self.stragglers.add(&report.paces)
        {
            tracing::warn!("step {}: {warning}", facts.step);
        }
        self.log.step(&facts, &report, self.engine.device())?;
        self.count_left_out(&facts, report)
    }

    /// Says what became of a step that was not finite; too many of them in a row end the run.
    fn count_left_out(&mut self, facts: &StepFacts, report: StepReport) -> Result<(), TrainError> {
        let Some(place) = report.non_finite else {
            self.num_left_out = 0;
            return Ok(());
        };
        self.num_left_out += 1;
        let error = self.not_finite(place, facts.position);
        if self.num_left_out == MAX_LEFT_OUT {
            return Err(TrainError::LeftOut { num: MAX_LEFT_OUT, last: Box::new(error) });
        }
        if self.rank == 0 {
            tracing::warn!("step {} is left out: {error}", facts.step);
        }
        Ok(())
    }

    /// With the samples that it came from, where they are known.
    fn not_finite(&self, place: NonFinite, position: Position) -> TrainError {
        let samples = place.sequences().map(|at| self.loader.places(position, at.rank, at.microbatch, &at.sequences));
        // Data that cannot be read just now does not hide what is wrong.
        TrainError::NonFinite { place, samples: samples.and_then(Result::ok).unwrap_or_default() }
    }

    /// Validation loss and answers; `false` if a rank was asked to stop meanwhile, and the rest was left out.
    fn validate(&mut self) -> Result<bool, TrainError> {
        self.whereabouts.enter(Phase::Validation);
        let Some(loss) = self.validator.loss(&mut self.engine, &self.stop)? else { return Ok(false) };
        if let Some((val_loss, val_tokens)) = loss {
            tracing::info!("validate step: {}  loss: {val_loss:7.4}  tokens: {val_tokens}", self.step);
            if let Some(metrics) = &mut self.log.metrics {
                metrics.write(&ValidationLine { step: self.step, val_loss, val_tokens });
            }
        }
        let Some(answers) = self.validator.answers(&mut self.engine, self.step, &self.stop)? else { return Ok(false) };
        if let Some(file) = &mut self.answers {
            for answer in &answers {
                tracing::info!("{:?} -> {:?}", answer.prompt, answer.answer);
                file.write(answer);
            }
        }
        Ok(true)
    }

    /// What a checkpoint holds besides the engine's state.
    fn state(&self) -> Result<TrainerState, TrainError> {
        self.whereabouts.enter(Phase::Checkpoint);
        let (optimizer_steps, scaler) = self.engine.progress()?;
        Ok(TrainerState {
            step: self.step,
            position: self.loader.position(),
            optimizer_steps,
            scaler: scaler.map(|s| (s.scale, s.good_steps)),
            global_batch_size: self.loader.global_batch(),
            model_config: self.saver.model_config().to_owned(),
        })
    }
}

fn engine_config(config: &JobConfig) -> EngineConfig {
    EngineConfig {
        seq_len: config.training.seq_len as usize,
        micro_batch_size: config.training.micro_batch_size as usize,
        buffer_dtype: config.precision.buffer.into(),
        adamw: AdamWConfig {
            beta1: config.optimizer.betas[0],
            beta2: config.optimizer.betas[1],
            eps: config.optimizer.eps,
            weight_decay: config.optimizer.weight_decay,
        },
        max_grad_norm: config.training.max_grad_norm,
        skip_non_finite: config.training.on_nonfinite == OnNonfinite::Skip,
    }
}

/// `OMP_NUM_THREADS`, else this rank's share of the cores.
fn num_threads(env: &WorkerEnv) -> i32 {
    let wanted = std::env::var("OMP_NUM_THREADS").ok().and_then(|v| v.parse::<i32>().ok()).filter(|n| *n > 0);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    wanted.unwrap_or((cores / env.local_world_size).max(1) as i32)
}

/// Whether an export of the job's end counts although the state resumed from is of an earlier `step`: there is no
/// checkpoint, or none is made of the end (the one there is was made at a stop).
fn export_alone_counts(config: &JobConfig, step: u64) -> bool {
    config.checkpoint.resume == config::Resume::Auto && (step == 0 || config.checkpoint.every_steps == 0)
}

/// Whether something that happens every `every` steps (0 = never) happens after `step`.
fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_export_alone_counts_where_no_checkpoint_is_made_of_the_end() {
        for (resume, every_steps, step, expected) in [
            ("auto", 5, 0, true),
            ("auto", 0, 0, true),
            ("auto", 0, 7, true),
            // The end's checkpoint was damaged, or its steps are to be trained again.
            ("auto", 5, 7, false),
            ("never", 0, 0, false),
            ("out/checkpoints/step-00000007", 0, 7, false),
        ] {
            let text = format!(
                "[model]\npath = \"model\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 10\nseq_len = 8\n\
                 [data]\ntrain = [\"a.jsonl\"]\n[checkpoint]\nevery_steps = {every_steps}\nresume = \"{resume}\"\n"
            );
            let config = JobConfig::parse("test", &text).unwrap();
            assert_eq!(export_alone_counts(&config, step), expected, "{resume}, every {every_steps}, step {step}");
        }
    }
}
