//! A golden of `scripts/goldens.py`, and how near a run is to it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::json;

use crate::export::Tensor;
use crate::job::StepMetrics;
use crate::place;

/// What PyTorch made of one case.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// The case's name, which is its folder's.
    #[serde(skip)]
    pub case: String,
    pub settings: Settings,
    /// One process, fp32.
    pub fp32: Curve,
    /// FSDP2 on two ranks with bf16 parameters and fp32 reduction; some cases only.
    pub bf16: Option<Bf16>,
    #[serde(rename = "final")]
    pub end: End,
}

/// What every run of a golden has in common, named as in the job's TOML.
#[derive(Debug, Deserialize)]
pub struct Settings {
    pub steps: u64,
    pub seq_len: u64,
    /// Sequences a step, over all ranks and microbatches.
    pub global_batch_size: u64,
    pub lr: f64,
    pub min_lr: f64,
    pub warmup_steps: u64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
}

/// A value for each step.
#[derive(Debug, Deserialize)]
pub struct Curve {
    pub loss: Vec<f64>,
    pub grad_norm: Vec<f64>,
    pub lr: Vec<f64>,
}

/// A bf16 run and how it was split.
#[derive(Debug, Deserialize)]
pub struct Bf16 {
    pub world_size: u64,
    pub grad_accumulation: u64,
    #[serde(flatten)]
    pub curve: Curve,
}

/// After the last step of the fp32 run.
#[derive(Debug, Deserialize)]
pub struct End {
    /// By name; a tied head is not in it.
    pub tensors: BTreeMap<String, Digest>,
}

/// What is kept of a tensor.
#[derive(Debug, Deserialize)]
pub struct Digest {
    shape: Vec<usize>,
    sum: f64,
    abs_sum: f64,
    /// Sum of `x[i] * (i % 61 - 30)`, so that values in the wrong places are seen.
    ramp_sum: f64,
    first: Vec<f64>,
}

impl Golden {
    /// Reads the golden of `case`.
    pub fn load(case: &str) -> Result<Self> {
        let path = Self::folder_of(case).join("golden.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let golden: Self = serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        Ok(Self { case: case.to_owned(), ..golden })
    }

    /// The model folder, which also holds `train.jsonl`.
    pub fn folder(&self) -> PathBuf {
        Self::folder_of(&self.case)
    }

    fn folder_of(case: &str) -> PathBuf {
        place::goldens().join(case)
    }
}

/// How far a run is from a curve, or may be: the largest differences of all steps.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    pub loss: f64,
    /// Relative.
    pub grad_norm: f64,
}

/// How losses are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossScale {
    Relative,
    Absolute,
}

impl Curve {
    /// Holds each step of `run` against this curve.
    ///
    /// Prints the largest differences as a line of JSON with `what`, whether they are allowed or not.
    ///
    /// # Errors
    /// A step that is further off than `limit`, with both values.
    pub fn check(&self, what: &str, run: &[StepMetrics], scale: LossScale, limit: Distance) -> Result<()> {
        ensure!(run.len() == self.loss.len(), "{} steps instead of {}", run.len(), self.loss.len());
        let mut largest = Distance { loss: 0.0, grad_norm: 0.0 };
        let mut too_far = None;
        for (i, got) in run.iter().enumerate() {
            let step = i as u64 + 1;
            ensure!(got.step == step, "line {step} of metrics.jsonl is step {}", got.step);
            ensure!(relative(got.lr, self.lr[i]) <= 1e-12, "step {step}: lr is {}, expected {}", got.lr, self.lr[i]);
            let loss = match scale {
                LossScale::Relative => relative(got.loss, self.loss[i]),
                LossScale::Absolute => (got.loss - self.loss[i]).abs(),
            };
            let grad_norm = relative(got.grad_norm, self.grad_norm[i]);
            largest.loss = larger(largest.loss, loss);
            largest.grad_norm = larger(largest.grad_norm, grad_norm);
            // Written so that NaN is too far.
            if !(loss <= limit.loss && grad_norm <= limit.grad_norm) {
                too_far.get_or_insert(i);
            }
        }
        // NaN becomes null.
        let line = json!({"run": what, "loss": largest.loss, "loss_limit": limit.loss,
            "grad_norm": largest.grad_norm, "grad_norm_limit": limit.grad_norm});
        println!("{line}");
        if let Some(i) = too_far {
            bail!(
                "step {}: loss is {}, expected {}; grad_norm is {}, expected {}; allowed are {limit:?}, {scale:?} losses",
                i + 1,
                run[i].loss,
                self.loss[i],
                run[i].grad_norm,
                self.grad_norm[i],
            );
        }
        Ok(())
    }
}

fn relative(got: f64, expected: f64) -> f64 {
    (got - expected).abs() / expected.abs()
}

/// NaN counts as the largest.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

impl End {
    /// Holds exported weights against the golden's: the same names, shapes and, up to noise, values.
    ///
    /// AdamW moves a weight whose gradient is rounding noise by up to a learning rate, so the bounds are wider than for
    /// losses: on a sum 2e-5 of the absolute sum, on a value 1e-4.
    ///
    /// # Errors
    /// The first difference found.
    pub fn check(&self, exported: &BTreeMap<String, Tensor>) -> Result<()> {
        let names = |keys: Vec<&String>| keys.into_iter().cloned().collect::<Vec<_>>();
        let (got, expected) = (names(exported.keys().collect()), names(self.tensors.keys().collect()));
        ensure!(got == expected, "exported tensors are {got:?}, expected {expected:?}");
        for (name, digest) in &self.tensors {
            digest.check(&exported[name]).with_context(|| format!("exported tensor {name}"))?;
        }
        Ok(())
    }
}

impl Digest {
    fn check(&self, tensor: &Tensor) -> Result<()> {
        ensure!(tensor.shape == self.shape, "shape {:?}, expected {:?}", tensor.shape, self.shape);
        let values = || tensor.values.iter().map(|&v| f64::from(v));
        let ramp = |i: usize| (i % 61) as f64 - 30.0;
        let ramp_sum = values().enumerate().map(|(i, v)| v * ramp(i)).sum::<f64>();
        for (what, got, expected, bound) in [
            ("sum", values().sum(), self.sum, 2e-5 * self.abs_sum),
            ("absolute sum", values().map(f64::abs).sum(), self.abs_sum, 2e-5 * self.abs_sum),
            ("ramp sum", ramp_sum, self.ramp_sum, 2e-5 * 15.0 * self.abs_sum),
        ] {
            let off: f64 = got - expected;
            ensure!(off.abs() <= bound, "{what} {got}, expected {expected} within {bound:.1e}");
        }
        for (i, (got, expected)) in values().zip(&self.first).enumerate() {
            ensure!((got - expected).abs() <= 1e-4, "value {i} is {got}, expected {expected}");
        }
        Ok(())
    }
}
