//! What is told of each step: a line of metrics, and the line that a person sees.

use std::time::{Duration, Instant};

use fsdp::StepReport;
use fsdp_data::Position;
use fsdp_torch_ext::accelerator;
use tch::Device;

use crate::console::{Console, Figures};
use crate::error::TrainError;
use crate::metrics::{AllocatorFigures, StepLine, StepLines};

/// Keeps what steps are measured by.
#[derive(Debug)]
pub struct StepLog {
    pub console: Console,
    /// Rank 0's, while it trains.
    pub metrics: Option<StepLines>,
    rates: Rates,
    total_steps: u64,
    last_step_end: Instant,
    recent_times: RecentTimes,
}

/// What tokens a second are worth in operations; see [`crate::mfu`].
#[derive(Debug)]
pub struct Rates {
    /// Positions that one rank computes in a step, padding included.
    pub tokens_per_step: f64,
    pub flops_per_token: f64,
    pub peak_tflops: Option<f64>,
}

/// What is known of a step when it starts.
#[derive(Debug, Clone, Copy)]
pub struct StepFacts {
    pub step: u64,
    pub lr: f64,
    /// Where its samples begin.
    pub position: Position,
    pub data_time: Duration,
}

impl StepLog {
    pub fn new(console: Console, rates: Rates, total_steps: u64) -> Self {
        let recent_times = RecentTimes::default();
        StepLog { console, metrics: None, rates, total_steps, last_step_end: Instant::now(), recent_times }
    }

    /// The next step's time begins now.
    pub fn restart_clock(&mut self) {
        self.last_step_end = Instant::now();
    }

    /// A step has ended.
    pub fn step(&mut self, facts: &StepFacts, report: &StepReport, device: Device) -> Result<(), TrainError> {
        let &StepFacts { step, lr, position, data_time } = facts;
        let now = Instant::now();
        let step_time = now - self.last_step_end;
        self.last_step_end = now;
        let tokens_per_second = report.num_tokens as f64 / step_time.as_secs_f64();
        let tflops = self.rates.flops_per_token * self.rates.tokens_per_step / step_time.as_secs_f64() / 1e12;
        let mfu = self.rates.peak_tflops.map(|peak| tflops / peak);
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&StepLine {
                step,
                loss: report.loss,
                grad_norm: report.grad_norm,
                lr,
                tokens: report.num_tokens,
                step_time_s: step_time.as_secs_f64(),
                tokens_per_second,
                peak_memory_bytes: report.peak_memory_bytes,
                data_time_s: data_time.as_secs_f64(),
                comm_time_s: report.comm_time.as_secs_f64(),
                epoch: position.epoch,
                first_sample: position.sample,
                tflops,
                mfu,
                allocator: allocator_figures(device)?,
                skipped: report.overflowed || report.non_finite.is_some(),
            });
        }
        if report.overflowed {
            tracing::warn!("step {step}: fp16 gradients overflowed; loss scale halved, nothing updated");
        }
        let steps_left = u32::try_from(self.total_steps - step).unwrap_or(u32::MAX);
        let remaining = self.recent_times.add(step_time).saturating_mul(steps_left);
        self.console.step(&Figures {
            step,
            total_steps: self.total_steps,
            loss: report.loss,
            grad_norm: report.grad_norm,
            tokens_per_second,
            mfu,
            peak_memory_bytes: report.peak_memory_bytes,
            remaining,
        });
        Ok(())
    }
}

fn allocator_figures(device: Device) -> Result<Option<AllocatorFigures>, TrainError> {
    if device == Device::Cpu {
        return Ok(None);
    }
    let stats = accelerator::memory_stats(device)?;
    Ok(Some(AllocatorFigures {
        max_active_bytes: stats.peak_allocated_bytes,
        max_reserved_bytes: stats.peak_reserved_bytes,
        num_alloc_retries: stats.num_alloc_retries,
        num_ooms: stats.num_ooms,
    }))
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
