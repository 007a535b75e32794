//! Files that survive a crash: space reserved before the first byte, fsync, rename, fsync of the folder.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, ftruncate, statvfs};
use rustix::io::{Errno, retry_on_intr};

use crate::error::{CheckpointError, Result};

/// A new file of `len_bytes` whose blocks are reserved, so that a full disk shows here and not half-way.
///
/// # Errors
/// The file exists, or the space is not there (the file is removed again).
pub(crate) fn create_reserved(path: &Path, len_bytes: u64) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(CheckpointError::io("create", path))?;
    if let Err(errno) = reserve(&file, path, len_bytes) {
        // Given back first, so that the free space in the message is what the next try will find.
        drop(file);
        let _ = fs::remove_file(path);
        return Err(CheckpointError::write(path, len_bytes)(errno.into()));
    }
    Ok(file)
}

fn reserve(file: &File, path: &Path, len_bytes: u64) -> std::result::Result<(), Errno> {
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, len_bytes)) {
        // File systems without fallocate: the free space now is the best that can be known.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) if free_bytes(path) < len_bytes => Err(Errno::NOSPC),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => retry_on_intr(|| ftruncate(file, len_bytes)),
        other => other,
    }
}

/// Bytes that this process may still write beside `path`; 0 if the file system cannot say.
pub(crate) fn free_bytes(path: &Path) -> u64 {
    statvfs(parent(path)).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A small file with its content on disk. The name is durable only after [`sync_dir`].
pub(crate) fn write_new(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).open(path)?;
        io::Write::write_all(&mut file, content)?;
        file.sync_all()
    };
    write().map_err(CheckpointError::write(path, content.len() as u64))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(CheckpointError::io("fsync folder", dir))
}

pub(crate) fn create_dir_all(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(CheckpointError::io("create folder", dir))
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(CheckpointError::io("rename", from))
}

/// Removes a folder and what is in it; one that is not there is fine.
pub(crate) fn remove_dir_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CheckpointError::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// The folder that holds `path`, also for a bare name.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Opens a regular file for reading (links are followed) and tells its size in bytes. A pipe would block for ever.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let metadata = fs::metadata(path).map_err(CheckpointError::io("open", path))?;
    if !metadata.is_file() {
        return Err(CheckpointError::io("open", path)(io::Error::other("not a regular file")));
    }
    let file = File::open(path).map_err(CheckpointError::io("open", path))?;
    Ok((file, metadata.len()))
}

/// A whole JSON file as text, refused above `max_bytes`.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    let (file, len_bytes) = open_regular(path)?;
    if len_bytes > max_bytes {
        return Err(CheckpointError::io("read", path)(io::Error::other(format!(
            "{len_bytes} bytes, at most {max_bytes} expected"
        ))));
    }
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, max_bytes), &mut text)
        .map_err(CheckpointError::io("read", path))?;
    Ok(text)
}
