//! What a person sees. Rank 0 draws one live line where the launcher's stderr is a terminal, and plain lines elsewhere;
//! every rank logs to `<output.dir>/logs/rank-N.log`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fsdp_control::env::WorkerEnv;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Back to the line's start, and erase it.
const CLEAR_LINE: &str = "\r\x1b[K";
const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// Logs go to the rank's file, and to stderr: all of rank 0's, the others' warnings. `RUST_LOG` sets the file's level.
pub fn start_logging(log_dir: &Path, env: &WorkerEnv) -> io::Result<()> {
    std::fs::create_dir_all(log_dir)?;
    let path = log_dir.join(format!("rank-{}.log", env.rank));
    let file: File = OpenOptions::new().create(true).append(true).open(path)?;
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    // A full disk is no reason to stop, nor to say so with each line.
    let to_file =
        fmt::layer().with_writer(Mutex::new(file)).log_internal_errors(false).with_ansi(false).with_filter(filter);
    let level = if env.rank == 0 { LevelFilter::INFO } else { LevelFilter::WARN };
    let stderr = Stderr { clear: env.terminal_width.is_some() && env.rank == 0 };
    let to_stderr = fmt::layer()
        .with_writer(stderr)
        .log_internal_errors(false)
        .with_ansi(env.terminal_width.is_some())
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_filter(level);
    tracing_subscriber::registry().with(to_file).with(to_stderr).init();
    Ok(())
}

/// Stderr, where a log line first wipes the live line. A closed stderr is no reason to stop.
struct Stderr {
    clear: bool,
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = io::Stderr;

    fn make_writer(&'a self) -> Self::Writer {
        let mut stderr = io::stderr();
        if self.clear {
            let _ = stderr.write_all(CLEAR_LINE.as_bytes());
        }
        stderr
    }
}

/// The figures of one step that a person wants to see.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub step: u64,
    pub total_steps: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub tokens_per_second: f64,
    /// Where the device's peak is known.
    pub mfu: Option<f64>,
    pub peak_memory_bytes: u64,
    pub remaining: Duration,
}

impl Figures {
    fn line(&self) -> String {
        format!(
            "step: {:>width$}/{}  loss: {:8.5}  grad_norm: {:7.4}  memory: {:5.2}GiB  tps: {:.0}{}  remaining: {}",
            self.step,
            self.total_steps,
            self.loss,
            self.grad_norm,
            self.peak_memory_bytes as f64 / (1u64 << 30) as f64,
            self.tokens_per_second,
            self.mfu.map_or_else(String::new, |mfu| format!("  mfu: {:.1}%", 100.0 * mfu)),
            duration(self.remaining),
            width = self.total_steps.to_string().len(),
        )
    }
}

/// Rank 0's progress display; silent on the other ranks.
#[derive(Debug)]
pub struct Console {
    terminal_width: Option<usize>,
    is_silent: bool,
    log_every: u64,
    last_drawn: Option<Instant>,
}

impl Console {
    pub fn new(env: &WorkerEnv, log_every: u64) -> Self {
        Console {
            terminal_width: env.terminal_width.map(usize::from),
            is_silent: env.rank != 0,
            log_every,
            last_drawn: None,
        }
    }

    /// Redraws the live line, or logs every so many steps.
    pub fn step(&mut self, figures: &Figures) {
        if self.is_silent {
            return;
        }
        let is_last = figures.step == figures.total_steps;
        let is_due = figures.step == 1 || is_last || figures.step.is_multiple_of(self.log_every);
        match self.terminal_width {
            None if is_due => tracing::info!("{}", figures.line()),
            None => {}
            Some(width) => {
                let is_fresh = self.last_drawn.is_some_and(|at| at.elapsed() < REDRAW_INTERVAL);
                if is_last {
                    tracing::info!("{}", figures.line());
                } else if !is_fresh {
                    self.last_drawn = Some(Instant::now());
                    let line: String = figures.line().chars().take(width.saturating_sub(1)).collect();
                    let _ = write!(io::stderr(), "{CLEAR_LINE}{line}");
                }
            }
        }
    }

    /// What goes on where no step does.
    pub fn phase(&self, text: &str) {
        match self.terminal_width {
            _ if self.is_silent => {}
            Some(_) => drop(write!(io::stderr(), "{CLEAR_LINE}{text}")),
            None => tracing::info!("{text}"),
        }
    }
}

/// `1h02m`, `3m07s`, `12s`.
fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s / 60 % 60),
    }
}
