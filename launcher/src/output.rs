//! What ranks print: to the terminal, to files, and the last lines kept for the report. Nothing here waits for a
//! reader: supervision goes on however slow or closed the other end is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Stderr, Stdout, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};

use crate::processes::timespec;

/// Where the launcher prints.
#[derive(Debug)]
pub struct Outlets {
    pub stdout: Outlet,
    pub stderr: Outlet,
}

impl Outlets {
    pub fn new() -> Self {
        Self { stdout: Outlet::new(Stream::Out(io::stdout())), stderr: Outlet::new(Stream::Err(io::stderr())) }
    }

    /// See [`Outlet::finish`].
    pub fn finish(&mut self, patience: Duration) {
        self.stdout.finish(patience);
        self.stderr.finish(patience);
    }
}

/// The launcher's stdout or stderr, behind a queue.
#[derive(Debug)]
pub struct Outlet {
    to: Stream,
    queue: VecDeque<u8>,
    /// The reader is gone; what comes is dropped.
    closed: bool,
    /// The last byte taken was a line's end.
    at_line_start: bool,
}

#[derive(Debug)]
enum Stream {
    Out(Stdout),
    Err(Stderr),
    /// Either of them, opened once more.
    Terminal(OwnedFd),
}

/// More than this is dropped while the reader sleeps; the ranks' log files have it all.
const MAX_QUEUE_BYTES: usize = 1 << 20;

/// A pipe that is ready takes so much without blocking (`PIPE_BUF`).
const WRITE_BYTES: usize = 4096;

impl Outlet {
    fn new(to: Stream) -> Self {
        let mut outlet = Self { to, queue: VecDeque::new(), closed: false, at_line_start: true };
        // A terminal that is ready may have room for a few bytes only, and then blocks. Not to do so is a property of the
        // opened file, which other processes share: so it is opened once more.
        if rustix::termios::isatty(outlet.fd()) {
            let path = format!("/proc/self/fd/{}", outlet.fd().as_raw_fd());
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(terminal) = rustix::fs::open(path, flags, Mode::empty()) {
                outlet.to = Stream::Terminal(terminal);
            }
        }
        outlet
    }

    /// Takes `bytes` as they are.
    pub fn push(&mut self, bytes: &[u8]) {
        if !self.closed && self.queue.len() + bytes.len() <= MAX_QUEUE_BYTES {
            self.queue.extend(bytes);
            self.at_line_start = bytes.last().map_or(self.at_line_start, |&byte| byte == b'\n');
        }
    }

    /// Takes a line of the launcher's own, below an unfinished line of a rank.
    pub fn push_line(&mut self, line: &str) {
        let gap = if self.at_line_start { "" } else { "\n" };
        self.push(format!("{gap}{line}\n").as_bytes());
    }

    pub fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.to {
            Stream::Out(stdout) => stdout.as_fd(),
            Stream::Err(stderr) => stderr.as_fd(),
            Stream::Terminal(terminal) => terminal.as_fd(),
        }
    }

    /// Writes some of the queue; call it when the descriptor is ready, so that it does not block.
    pub fn write_some(&mut self) {
        let (front, _) = self.queue.as_slices();
        match rustix::io::write(self.fd(), &front[..front.len().min(WRITE_BYTES)]) {
            Ok(num) => drop(self.queue.drain(..num)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => {
                self.closed = true;
                self.queue.clear();
            }
        }
    }

    /// Writes the rest, but gives up on a reader that does not read for as long as `patience`.
    pub fn finish(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.is_waiting() && Instant::now() < deadline {
            let left = timespec(deadline.saturating_duration_since(Instant::now()));
            let mut fds = [PollFd::from_borrowed_fd(self.fd(), PollFlags::OUT)];
            if rustix::event::poll(&mut fds, Some(&left)) == Ok(1) {
                self.write_some();
            }
        }
    }
}

/// The last lines that a rank printed.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<Vec<u8>>,
    /// The line that is not finished yet.
    open: Vec<u8>,
}

const MAX_TAIL_LINES: usize = 20;
const MAX_LINE_BYTES: usize = 2000;

impl Tail {
    pub fn push(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, is_whole) = match part.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (part, false),
            };
            let room = MAX_LINE_BYTES - self.open.len();
            self.open.extend_from_slice(&text[..text.len().min(room)]);
            if is_whole {
                self.lines.push_back(std::mem::take(&mut self.open));
                if self.lines.len() > MAX_TAIL_LINES {
                    self.lines.pop_front();
                }
            }
        }
    }

    /// The lines as text, oldest first.
    pub fn lines(&self) -> Vec<String> {
        let open = (!self.open.is_empty()).then_some(&self.open);
        self.lines.iter().chain(open).map(|line| String::from_utf8_lossy(line).trim_end().to_owned()).collect()
    }
}

/// A file that is made when the first byte comes. A disk that is full ends the file, not the run.
#[derive(Debug)]
pub struct OutFile {
    path: PathBuf,
    file: Option<File>,
    left_bytes: usize,
}

const MAX_FILE_BYTES: usize = 64 << 20;

impl OutFile {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None, left_bytes: MAX_FILE_BYTES }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        if self.left_bytes == 0 || bytes.is_empty() {
            return;
        }
        if self.file.is_none() {
            self.file = File::options().create(true).append(true).open(&self.path).ok();
        }
        let bytes = &bytes[..bytes.len().min(self.left_bytes)];
        match self.file.as_mut().map(|file| file.write_all(bytes)) {
            Some(Ok(())) => self.left_bytes -= bytes.len(),
            _ => self.left_bytes = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_lines_and_cuts_long_ones() {
        let mut tail = Tail::default();
        for number in 0..100 {
            tail.push(format!("line {number}\nhalf of").as_bytes());
            tail.push(b" a line\n");
        }
        tail.push("ü".repeat(5000).as_bytes());
        let lines = tail.lines();
        assert_eq!(lines.len(), MAX_TAIL_LINES + 1);
        assert_eq!(lines[MAX_TAIL_LINES - 2..MAX_TAIL_LINES], ["line 99", "half of a line"]);
        assert_eq!(lines[MAX_TAIL_LINES].len(), MAX_LINE_BYTES);
    }

    #[test]
    fn a_file_appears_with_its_first_byte_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rank-1.out");
        let mut file = OutFile::new(&path);
        file.push(b"");
        assert!(!path.exists());
        file.push(b"a");
        file.push(b"b");
        assert_eq!(std::fs::read(&path).unwrap(), b"ab");
        // A place that cannot be written is given up silently.
        OutFile::new(&folder.path().join("no/such/folder")).push(b"a");
    }

    #[test]
    fn own_lines_start_below_unfinished_ones() {
        let mut outlet = Outlets::new().stderr;
        outlet.push(b"step 3");
        outlet.push_line("stopped");
        outlet.push_line("done");
        assert_eq!(outlet.queue.make_contiguous(), b"step 3\nstopped\ndone\n");
        outlet.push(&vec![0; MAX_QUEUE_BYTES]);
        assert_eq!(outlet.queue.len(), 20, "what does not fit is dropped, not waited for");
        outlet.queue.clear();
    }
}
