//! `<output.dir>/traces/`: timelines of steps in the Chrome trace format, which chrome://tracing and Perfetto open, one
//! file a rank, and how much of the communication the computation hid.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use fsdp::{Lane, Span};
use fsdp_config::{JobConfig, TraceSteps};
use serde_json::json;

use crate::error::TrainError;

const LANES: [(Lane, &str); 4] = [
    (Lane::Compute, "compute"),
    (Lane::Wait, "compute waits"),
    (Lane::Gather, "all-gather"),
    (Lane::Reduce, "reduce-scatter"),
];

/// Collects the steps that the config asks for and writes them after the last one.
#[derive(Debug)]
pub struct Tracer {
    steps: Option<TraceSteps>,
    output_dir: PathBuf,
    rank: usize,
    traced: Vec<TracedStep>,
    /// The start of the first traced step.
    origin: Option<Instant>,
}

/// One traced step.
#[derive(Debug)]
struct TracedStep {
    step: u64,
    /// Microseconds since the tracer's origin.
    start_us: f64,
    spans: Vec<Span>,
}

impl Tracer {
    pub fn new(config: &JobConfig, rank: usize) -> Self {
        let (steps, output_dir) = (config.metrics.trace_steps, config.output.dir.clone());
        Tracer { steps, output_dir, rank, traced: vec![], origin: None }
    }

    pub fn traces(&self, step: u64) -> bool {
        self.steps.is_some_and(|steps| steps.contains(step))
    }

    /// Takes the timeline of a step that began at `start`; after the last that is asked for, writes all.
    pub fn take(&mut self, step: u64, start: Instant, spans: Vec<Span>) -> Result<(), TrainError> {
        let origin = *self.origin.get_or_insert(start);
        self.traced.push(TracedStep { step, start_us: (start - origin).as_secs_f64() * 1e6, spans });
        if self.steps.is_some_and(|steps| steps.last == step) { self.write() } else { Ok(()) }
    }

    /// The run ends, perhaps amid the steps that are asked for, or without any of them.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        match (self.steps, self.origin) {
            (Some(TraceSteps { first, last }), None) => {
                tracing::warn!("[metrics] trace_steps: this run had none of the steps {first} to {last}");
                Ok(())
            }
            _ if self.traced.is_empty() => Ok(()),
            _ => self.write(),
        }
    }

    fn write(&mut self) -> Result<(), TrainError> {
        let path = write(&self.output_dir, self.rank, &self.traced)?;
        let overlap = Overlap::of(&self.traced);
        tracing::info!(
            "timeline of {} steps in {}: collectives {:.3} s, of which {:.3} s exposed ({:.0} % hidden)",
            self.traced.len(),
            path.display(),
            overlap.communication_secs,
            overlap.exposed_secs,
            100.0 * overlap.hidden()
        );
        self.traced.clear();
        Ok(())
    }
}

/// Sums over traced steps, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Overlap {
    /// Time in which a collective was under way.
    communication_secs: f64,
    /// Time in which the computation waited for one.
    exposed_secs: f64,
}

impl Overlap {
    fn of(steps: &[TracedStep]) -> Self {
        let mut overlap = Overlap::default();
        for step in steps {
            let covered = |lanes: &[Lane]| -> f64 {
                let mut spans: Vec<(f64, f64)> = step
                    .spans
                    .iter()
                    .filter(|span| lanes.contains(&span.lane))
                    .map(|span| (span.start_us, span.end_us))
                    .collect();
                spans.sort_by(|a, b| a.0.total_cmp(&b.0));
                let (mut sum, mut end) = (0.0, f64::NEG_INFINITY);
                for (from, to) in spans {
                    sum += (to - from.max(end)).max(0.0);
                    end = end.max(to);
                }
                sum * 1e-6
            };
            overlap.communication_secs += covered(&[Lane::Gather, Lane::Reduce]);
            overlap.exposed_secs += covered(&[Lane::Wait]);
        }
        overlap
    }

    /// The part of the communication that the computation hid, 0 to 1; 1 without communication.
    fn hidden(&self) -> f64 {
        match self.communication_secs {
            0.0 => 1.0,
            all => (1.0 - self.exposed_secs / all).clamp(0.0, 1.0),
        }
    }
}

/// Writes the steps of one rank; returns the file.
fn write(output_dir: &Path, rank: usize, steps: &[TracedStep]) -> Result<PathBuf, TrainError> {
    let dir = output_dir.join("traces");
    let path = dir.join(format!("rank-{rank}.json"));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&dir)?;
        let mut file = BufWriter::new(File::create(&path)?);
        let meta = |name: &str, tid: usize, value: &str| json!({"ph": "M", "pid": rank, "tid": tid, "name": name, "args": {"name": value}});
        write!(file, "{{\"traceEvents\":[\n{}", meta("process_name", 0, &format!("rank {rank}")))?;
        for (tid, (_, name)) in LANES.iter().enumerate() {
            write!(file, ",\n{}", meta("thread_name", tid, name))?;
        }
        for step in steps {
            for span in &step.spans {
                let tid = LANES.iter().position(|(lane, _)| *lane == span.lane).expect("all lanes are listed");
                let (ts, dur) = (step.start_us + span.start_us, span.end_us - span.start_us);
                let args = json!({"step": step.step});
                write!(
                    file,
                    ",\n{}",
                    json!({"ph": "X", "pid": rank, "tid": tid, "name": span.name, "ts": ts, "dur": dur, "args": args})
                )?;
            }
        }
        file.write_all(b"\n]}\n")?;
        file.into_inner()?.sync_all()
    };
    write().map_err(|source| TrainError::Io { path: path.clone(), source })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_counts_time_once_and_waits_as_exposed() {
        let span = |lane, start_us: f64, end_us: f64| Span { lane, name: String::new(), start_us, end_us };
        let spans = vec![
            span(Lane::Gather, 0.0, 4e6),
            span(Lane::Reduce, 2e6, 6e6),
            span(Lane::Gather, 8e6, 10e6),
            span(Lane::Compute, 0.0, 10e6),
            span(Lane::Wait, 3e6, 5e6),
        ];
        let overlap = Overlap::of(&[TracedStep { step: 1, start_us: 0.0, spans }]);
        assert_eq!(overlap, Overlap { communication_secs: 8.0, exposed_secs: 2.0 });
        assert_eq!(overlap.hidden(), 0.75);
        assert_eq!(Overlap::default().hidden(), 1.0);
    }
}
