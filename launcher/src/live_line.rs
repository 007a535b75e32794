//! How far a command is: one line on stderr that is drawn over, where stderr is a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use fsdp_plan::plan::format_bytes;

const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// The line; it goes away with this.
#[derive(Debug)]
pub struct LiveLine {
    /// What is done with what.
    what: String,
    num_bytes: u64,
    total_bytes: u64,
    /// `None`: no terminal.
    drawn: Option<Instant>,
}

impl LiveLine {
    pub fn new(what: String, total_bytes: u64) -> Self {
        let drawn = io::stderr().is_terminal().then(Instant::now);
        let line = LiveLine { what, num_bytes: 0, total_bytes, drawn };
        line.draw();
        line
    }

    /// So many bytes more are done.
    pub fn add(&mut self, num_bytes: u64) {
        self.num_bytes += num_bytes;
        if self.drawn.is_some_and(|drawn| drawn.elapsed() >= REDRAW_INTERVAL) {
            self.draw();
            self.drawn = Some(Instant::now());
        }
    }

    fn draw(&self) {
        if self.drawn.is_none() {
            return;
        }
        let (done, total) = (format_bytes(self.num_bytes), format_bytes(self.total_bytes));
        let _ = write!(io::stderr(), "\r\x1b[K{}: {done} of {total}", self.what);
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
