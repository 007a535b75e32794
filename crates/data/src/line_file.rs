//! One JSON lines file: where each line that is not blank begins, a digest of the contents, and reads by position.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use xxhash_rust::xxh3::Xxh3Default;

use crate::error::{DataError, LineProblem};
use crate::format::Located;

/// The longest line that is accepted; it bounds the memory that a damaged file can cost.
pub const MAX_LINE_BYTES: u64 = 16 << 20;

const CHUNK_BYTES: usize = 1 << 20;
const BOM: &[u8] = b"\xef\xbb\xbf";

/// An open file whose lines are known. The file must not change: each read checks its size and time of modification.
#[derive(Debug)]
pub(crate) struct LineFile {
    path: PathBuf,
    file: File,
    len_bytes: u64,
    modified: SystemTime,
    /// Offset of each line that is not blank.
    starts: Vec<u64>,
    /// Where the last of them ends at the latest.
    end: u64,
    digest: u128,
}

impl LineFile {
    /// Opens `path` and finds the lines in its first `limit_bytes` bytes (rounded up to whole reads, and at least the
    /// first line); a line that goes beyond the limit is left out.
    pub(crate) fn open(path: &Path, limit_bytes: u64) -> Result<Self, DataError> {
        let io = |action| move |source| DataError::Io { path: path.to_owned(), action, source };
        // Before open(), which would wait for a FIFO's writer.
        let metadata = std::fs::metadata(path).map_err(io("open"))?;
        if !metadata.is_file() {
            return Err(DataError::NotAFile { path: path.to_owned(), kind: kind(&metadata) });
        }
        let file = File::open(path).map_err(io("open"))?;
        let metadata = file.metadata().map_err(io("open"))?;
        let mut lines = LineFile {
            path: path.to_owned(),
            file,
            len_bytes: metadata.len(),
            modified: metadata.modified().map_err(io("open"))?,
            starts: Vec::new(),
            end: 0,
            digest: 0,
        };
        lines.scan(limit_bytes)?;
        lines.check_unchanged()?;
        if lines.starts.is_empty() {
            return Err(DataError::NoSamples { path: path.to_owned(), len_bytes: lines.len_bytes });
        }
        Ok(lines)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn num_lines(&self) -> u64 {
        self.starts.len() as u64
    }

    /// Bytes that were scanned: the whole file, or the limit given to `open`.
    pub(crate) fn scanned_bytes(&self) -> u64 {
        self.end
    }

    /// Size and xxh3-128 of the contents, as text.
    pub(crate) fn digest(&self) -> String {
        format!("{}:{:032x}", self.len_bytes, self.digest)
    }

    /// Line `index` among those that are not blank, without its line end.
    pub(crate) fn read(&self, index: u64) -> Result<Vec<u8>, DataError> {
        let index = index as usize;
        let start = self.starts[index];
        let end = *self.starts.get(index + 1).unwrap_or(&self.end);
        // Blank lines may follow; `scan` saw that the line itself is no longer than the bound.
        let mut line = vec![0; (end - start).min(MAX_LINE_BYTES + 1) as usize];
        self.read_at(&mut line, start)?;
        self.check_unchanged()?;
        if let Some(newline) = memchr::memchr(b'\n', &line) {
            line.truncate(newline);
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(line)
    }

    /// The error for a problem with line `index`. Line numbers are not kept, so this counts line ends from the
    /// beginning of the file.
    pub(crate) fn error(&self, index: u64, (problem, byte): Located) -> DataError {
        match self.line_number(self.starts[index as usize]) {
            Ok(line) => DataError::Line { path: self.path.clone(), line, byte, problem },
            Err(e) => e,
        }
    }

    fn scan(&mut self, limit_bytes: u64) -> Result<(), DataError> {
        let mut hasher = Xxh3Default::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut line = Line { start: 0, number: 1, blank: true };
        let mut at = 0;
        while at < self.len_bytes && (at < limit_bytes || self.starts.is_empty()) {
            let len = (self.len_bytes - at).min(CHUNK_BYTES as u64) as usize;
            let chunk = &mut chunk[..len];
            self.read_at(chunk, at)?;
            hasher.update(chunk);
            let mut rest = 0; // of the chunk: the first byte not yet looked at
            if at == 0 && chunk.starts_with(BOM) {
                rest = BOM.len();
                line.start = BOM.len() as u64;
            }
            while rest < len {
                let newline = memchr::memchr(b'\n', &chunk[rest..]).map(|n| rest + n);
                let part = &chunk[rest..newline.unwrap_or(len)];
                rest += part.len();
                line.blank = line.blank && part.iter().all(u8::is_ascii_whitespace);
                self.check_line_length(&line, at + rest as u64)?;
                if newline.is_some() {
                    rest += 1;
                    self.end_line(&mut line, at + rest as u64);
                }
            }
            at += len as u64;
        }
        // A last line without a line end; one that the limit cuts is left out.
        if at == self.len_bytes {
            self.end_line(&mut line, at);
        }
        self.end = at;
        self.digest = hasher.digest128();
        self.starts.shrink_to_fit();
        Ok(())
    }

    fn end_line(&mut self, line: &mut Line, next_start: u64) {
        if !line.blank {
            self.starts.push(line.start);
        }
        *line = Line { start: next_start, number: line.number + 1, blank: true };
    }

    fn check_line_length(&self, line: &Line, end: u64) -> Result<(), DataError> {
        if line.blank || end - line.start <= MAX_LINE_BYTES {
            return Ok(());
        }
        Err(DataError::Line {
            path: self.path.clone(),
            line: line.number,
            byte: None,
            problem: LineProblem::TooManyBytes { max_bytes: MAX_LINE_BYTES },
        })
    }

    /// Number of line `index` in the file, from 1.
    pub(crate) fn number(&self, index: u64) -> Result<u64, DataError> {
        self.line_number(self.starts[index as usize])
    }

    fn line_number(&self, offset: u64) -> Result<u64, DataError> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut line = 1;
        let mut at = 0;
        while at < offset {
            let len = (offset - at).min(CHUNK_BYTES as u64) as usize;
            self.read_at(&mut chunk[..len], at)?;
            line += memchr::memchr_iter(b'\n', &chunk[..len]).count() as u64;
            at += len as u64;
        }
        Ok(line)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DataError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                DataError::Changed { path: self.path.clone() }
            } else {
                self.read_error(source)
            }
        })
    }

    fn check_unchanged(&self) -> Result<(), DataError> {
        let now = self.file.metadata().map_err(|e| self.read_error(e))?;
        let modified = now.modified().map_err(|e| self.read_error(e))?;
        if now.len() != self.len_bytes || modified != self.modified {
            return Err(DataError::Changed { path: self.path.clone() });
        }
        Ok(())
    }

    fn read_error(&self, source: std::io::Error) -> DataError {
        DataError::Io { path: self.path.clone(), action: "read", source }
    }
}

/// The line that a scan is in.
struct Line {
    start: u64,
    /// From 1.
    number: u64,
    /// Nothing but white space so far.
    blank: bool,
}

fn kind(metadata: &Metadata) -> &'static str {
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}
