//! The job on one rank: from config to exported model.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fsdp::{AdamWConfig, Engine, EngineConfig, MicroBatch, StepReport};
use fsdp_comm::{ProcessGroup, ReduceOp};
use fsdp_config::{self as config, JobConfig};
use fsdp_control::env::WorkerEnv;
use fsdp_control::progress::ProgressHandle;
use fsdp_control::stop::StopFlag;
use fsdp_control::store::Store;
use fsdp_data::{DataSpec, Dataset, Loader};
use fsdp_plan::{Architecture, Plan};
use tch::Tensor;

use crate::checkpoints::{Checkpoints, TrainerState};
use crate::console::{Console, Figures};
use crate::error::{STEP, TrainError};
use crate::metrics::{StepLine, StepLines, ValidationLine, peak_resident_bytes};
use crate::validation::Validator;
use crate::weights::{self, Exported};

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
    store: Store,
    loader: Loader,
    validator: Validator,
    checkpoints: Checkpoints,
    /// Rank 0's, while it trains.
    metrics: Option<StepLines>,
    answers: Option<StepLines>,
    console: Console,
    stop: StopFlag,
    progress: Option<ProgressHandle>,
    total_steps: u64,
    /// Steps done.
    step: u64,
    /// The step of the newest committed checkpoint of this run.
    saved_step: Option<u64>,
    last_step_end: Instant,
    recent_times: RecentTimes,
}

impl Trainer {
    /// Opens everything and brings the state to where training begins. Collective.
    pub fn new(
        config: JobConfig,
        env: &WorkerEnv,
        stop: StopFlag,
        progress: Option<ProgressHandle>,
    ) -> Result<Self, TrainError> {
        let start = Instant::now();
        let (rank, world_size) = (env.rank, env.world_size);
        let timeout = Duration::from_secs(config.fsdp.timeout_secs);
        let console = Console::new(env, config.metrics.log_every);
        tch::set_num_threads(num_threads(env));

        console.phase("opening model and data");
        let arch = Architecture::from_config_json(Path::new(&config.model.path))?;
        let vocab_size = arch.vocab_size;
        let plan = Plan::for_job(&config, arch, world_size)?;
        let dataset = Dataset::open(&DataSpec::for_training(&config, vocab_size))?;
        let checkpoints = Checkpoints::new(&config, dataset.digest(), rank, world_size);
        let validator = Validator::open(&config, dataset.format(), vocab_size, (rank, world_size))?;
        let accumulation = config.num_microbatches(world_size as u64)? as usize;
        let micro_batch_size = config.training.micro_batch_size as usize;
        let mut loader = Loader::new(dataset, rank, world_size, micro_batch_size, accumulation);
        let total_steps = match config.training.duration {
            config::Duration::Steps(steps) => steps,
            config::Duration::Epochs(epochs) => epochs.saturating_mul(loader.steps_per_epoch()),
        };

        let mut store = Store::connect((&env.master_addr, env.master_port), timeout)?;
        let pg = ProcessGroup::connect_shm(&mut store, rank, world_size, timeout, progress.clone())?;
        let mut engine = Engine::new(plan, engine_config(&config), pg)?;

        console.phase("loading weights");
        let resumed = checkpoints.resume(&config, &mut engine, &mut store)?;
        let step = match &resumed {
            Some(state) => {
                loader.seek(state.position)?;
                state.step
            }
            None => {
                weights::load(&mut engine, &config)?;
                0
            }
        };
        tracing::info!(
            "{} parameters on {world_size} ranks, {} threads each, ready in {:.2} s",
            engine.plan().num_params(),
            tch::get_num_threads(),
            start.elapsed().as_secs_f64()
        );
        Ok(Trainer {
            config,
            rank,
            engine,
            store,
            loader,
            validator,
            checkpoints,
            metrics: None,
            answers: None,
            console,
            stop,
            progress,
            total_steps,
            step,
            saved_step: resumed.map(|s| s.step),
            last_step_end: start,
            recent_times: RecentTimes::default(),
        })
    }

    /// Trains to the end, or until a rank is asked to stop.
    pub fn run(mut self) -> Result<Outcome, TrainError> {
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
        self.engine.process_group().barrier()?;
        if self.rank == 0 {
            Exported::forget(&self.config)?;
            let dir = &self.config.output.dir;
            self.metrics = Some(StepLines::open(&dir.join("metrics.jsonl"), self.step)?);
            if self.validator.has_prompts() {
                self.answers = Some(StepLines::open(&dir.join("answers.jsonl"), self.step)?);
            }
        }
        self.last_step_end = Instant::now();
        while self.step < self.total_steps {
            let stop = self.train_step()?;
            let is_last = self.step == self.total_steps;
            let validates = is_due(self.step, self.config.validation.as_ref().map_or(0, |v| v.every_steps)) || is_last;
            // Who asks to stop does not wait for a validation.
            let stop = stop || (validates && !self.validate()?);
            if stop && !is_last {
                self.save()?;
                let signal = self.stop.signal_name().map_or_else(String::new, |name| format!(" by {name}"));
                tracing::info!("stopped{signal} after step {}; the same command goes on from here", self.step);
                return Ok(Outcome::Stopped);
            }
            let every_steps = self.config.checkpoint.every_steps;
            if is_due(self.step, every_steps) || (is_last && every_steps > 0) {
                self.save()?;
            }
        }
        self.console.phase("exporting the model");
        weights::export(&mut self.engine, &self.config, self.step)?;
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

    /// One optimizer step: microbatches, program, metrics. Returns whether any rank was asked to stop.
    fn train_step(&mut self) -> Result<bool, TrainError> {
        let step = self.step + 1;
        STEP.store(step, Ordering::Relaxed);
        if let Some(progress) = &self.progress {
            progress.set_step(step);
        }
        let epoch = self.loader.position().epoch;
        let data_start = Instant::now();
        let batches: Vec<MicroBatch> = self
            .loader
            .next_step()?
            .iter()
            .map(|b| MicroBatch::new(&b.input_ids, &b.targets, b.num_valid_tokens))
            .collect();
        let data_time = data_start.elapsed();
        let lr = self.config.lr_at(step, self.total_steps);
        let report = self.engine.train_step(&batches, lr, self.stop.is_set())?;
        self.step = step;
        self.log_step(&report, lr, epoch, data_time)?;
        Ok(report.stop)
    }

    fn log_step(&mut self, report: &StepReport, lr: f64, epoch: u64, data_time: Duration) -> Result<(), TrainError> {
        let peak = Tensor::from_slice(&[peak_resident_bytes() as i64]);
        self.engine.process_group().all_reduce(&peak, ReduceOp::Max)?;
        let peak_memory_bytes = peak.int64_value(&[0]) as u64;
        let now = Instant::now();
        let step_time = now - self.last_step_end;
        self.last_step_end = now;
        let tokens_per_second = report.num_tokens as f64 / step_time.as_secs_f64();
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&StepLine {
                step: self.step,
                loss: report.loss,
                grad_norm: report.grad_norm,
                lr,
                tokens: report.num_tokens,
                step_time_s: step_time.as_secs_f64(),
                tokens_per_second,
                peak_memory_bytes,
                data_time_s: data_time.as_secs_f64(),
                comm_time_s: report.comm_time.as_secs_f64(),
                epoch,
                skipped: report.skipped,
            })?;
        }
        if report.skipped {
            tracing::warn!("step {}: fp16 gradients overflowed; loss scale halved, nothing updated", self.step);
        }
        let steps_left = u32::try_from(self.total_steps - self.step).unwrap_or(u32::MAX);
        let remaining = self.recent_times.add(step_time).saturating_mul(steps_left);
        self.console.step(&Figures {
            step: self.step,
            total_steps: self.total_steps,
            loss: report.loss,
            grad_norm: report.grad_norm,
            tokens_per_second,
            peak_memory_bytes,
            remaining,
        });
        Ok(())
    }

    /// Validation loss and answers; `false` if a rank was asked to stop meanwhile, and the rest was left out.
    fn validate(&mut self) -> Result<bool, TrainError> {
        let Some(loss) = self.validator.loss(&mut self.engine, &self.stop)? else { return Ok(false) };
        if let Some((val_loss, val_tokens)) = loss {
            tracing::info!("validate step: {}  loss: {val_loss:7.4}  tokens: {val_tokens}", self.step);
            if let Some(metrics) = &mut self.metrics {
                metrics.write(&ValidationLine { step: self.step, val_loss, val_tokens })?;
            }
        }
        let Some(answers) = self.validator.answers(&mut self.engine, self.step, &self.stop)? else { return Ok(false) };
        if let Some(file) = &mut self.answers {
            for answer in &answers {
                tracing::info!("{:?} -> {:?}", answer.prompt, answer.answer);
                file.write(answer)?;
            }
        }
        Ok(true)
    }

    fn save(&mut self) -> Result<(), TrainError> {
        if self.saved_step == Some(self.step) {
            return Ok(());
        }
        let (optimizer_steps, scaler) = self.engine.progress();
        let state = TrainerState {
            step: self.step,
            position: self.loader.position(),
            optimizer_steps,
            scaler: scaler.map(|s| (s.scale, s.good_steps)),
        };
        self.checkpoints.save(&mut self.engine, &mut self.store, &state)?;
        self.saved_step = Some(self.step);
        Ok(())
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

/// The last step times, for an estimate that one slow step does not disturb.
#[derive(Debug, Default)]
struct RecentTimes(Vec<Duration>);

impl RecentTimes {
    const NUM: usize = 31;

    /// Adds a step's time and returns the median of the recent ones.
    fn add(&mut self, time: Duration) -> Duration {
        if self.0.len() == Self::NUM {
            self.0.remove(0);
        }
        self.0.push(time);
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted[sorted.len() / 2]
    }
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
