//! `<output.dir>/metrics.jsonl`, a line a step, and `answers.jsonl`, a line for each answer to a prompt: flushed, written
//! by rank 0.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::TrainError;

/// One step. Units are in the names; `loss` and `grad_norm` are global and from before the update.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StepLine {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Tokens with a label, of all ranks.
    pub tokens: u64,
    /// Wall time since the last step's end: data included, and a validation or a save where one came between.
    pub step_time_s: f64,
    pub tokens_per_second: f64,
    /// Largest over ranks.
    pub peak_memory_bytes: u64,
    /// Time in which rank 0 waited for data, and in which its host waited for or executed collectives.
    pub data_time_s: f64,
    pub comm_time_s: f64,
    pub epoch: u64,
    /// Index in the epoch's order of all samples of the first one of the step.
    pub first_sample: u64,
    /// Operations of the model, see [`crate::mfu`], and their share of the device's peak, of one rank.
    pub tflops: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    #[serde(flatten)]
    pub allocator: Option<AllocatorFigures>,
    /// Nothing was updated: an fp16 gradient overflowed, or something was not finite and was to be left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// What libtorch's allocator of rank 0's GPU tells.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct AllocatorFigures {
    pub max_active_bytes: u64,
    pub max_reserved_bytes: u64,
    pub num_alloc_retries: u64,
    pub num_ooms: u64,
}

/// One validation.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ValidationLine {
    pub step: u64,
    pub val_loss: f64,
    pub val_tokens: u64,
}

/// An open file of lines that each have a step.
#[derive(Debug)]
pub struct StepLines {
    path: PathBuf,
    file: File,
    /// Of whole lines.
    len_bytes: u64,
    /// A line could not be written.
    has_failed: bool,
}

impl StepLines {
    /// Opens the file and cuts it back to the lines of steps up to `step`, where the run goes on.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let file = OpenOptions::new().create(true).truncate(false).read(true).append(true).open(path).map_err(io)?;
        let mut reader = BufReader::new(&file);
        let (mut keep_bytes, mut line) = (0u64, Vec::new());
        loop {
            line.clear();
            let len = reader.read_until(b'\n', &mut line).map_err(io)?;
            let is_whole = line.last() == Some(&b'\n');
            let of_step = serde_json::from_slice::<serde_json::Value>(&line).ok().and_then(|v| v["step"].as_u64());
            if !is_whole || of_step.is_none_or(|s| s > step) {
                break;
            }
            keep_bytes += len as u64;
        }
        file.set_len(keep_bytes).map_err(io)?;
        Ok(StepLines { path: path.to_path_buf(), file, len_bytes: keep_bytes, has_failed: false })
    }

    /// Appends one line; it is in the file when this returns. A full disk costs lines and a warning, not the run.
    pub fn write(&mut self, line: &impl Serialize) {
        let mut text = serde_json::to_vec(line).expect("plain fields are always representable as JSON");
        text.push(b'\n');
        match self.file.write_all(&text) {
            Ok(()) => self.len_bytes += text.len() as u64,
            Err(error) => {
                // No half line stays; where even that fails, the next start cuts it off.
                let _ = self.file.set_len(self.len_bytes);
                if !std::mem::replace(&mut self.has_failed, true) {
                    tracing::warn!("{}: lines are missing from here on: {error}", self.path.display());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_cut_back_to_the_step_that_the_run_resumes_from() {
        let dir = std::env::temp_dir().join(format!("fsdp-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("metrics.jsonl");
        for (text, step, kept) in [
            ("{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n", 2, "{\"step\":1}\n{\"step\":2}\n"),
            (
                "{\"step\":1}\n{\"step\":1,\"val_loss\":2.5}\n{\"step\":2}\n",
                1,
                "{\"step\":1}\n{\"step\":1,\"val_loss\":2.5}\n",
            ),
            ("{\"step\":1}\n{\"step\":2", 2, "{\"step\":1}\n"),
            ("{\"step\":5}\n", 0, ""),
            ("", 3, ""),
        ] {
            std::fs::write(&path, text).unwrap();
            let mut file = StepLines::open(&path, step).unwrap();
            file.write(&ValidationLine { step: 9, val_loss: 0.5, val_tokens: 3 });
            let expected = format!("{kept}{{\"step\":9,\"val_loss\":0.5,\"val_tokens\":3}}\n");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
