//! Files that survive a crash: space reserved before the first byte, fsync, rename, fsync of the folder. Errors say
//! what was tried on which path.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{CheckpointError, Result};
use crate::fs::{FileSystem, FileToWrite};

/// A new file of `len_bytes` whose blocks are reserved, so that a full disk shows here and not half-way.
///
/// # Errors
/// The file exists, or the space is not there (the file is removed again).
pub(crate) fn create_reserved<F: FileSystem>(fs: &F, path: &Path, len_bytes: u64) -> Result<F::File> {
    let file = fs.create_new(path).map_err(|error| write_error(fs, "create", path, len_bytes, error))?;
    if let Err(error) = file.reserve(len_bytes) {
        // Given back first, so that the free space in the message is what the next try will find.
        drop(file);
        let _ = fs.remove_file(path);
        return Err(write_error(fs, "reserve space for", path, len_bytes, error));
    }
    Ok(file)
}

/// A small file with its content on disk. The name is durable only after [`sync_dir`].
pub(crate) fn write_new<F: FileSystem>(fs: &F, path: &Path, content: &[u8]) -> Result<()> {
    let failed = |op| move |error| write_error(fs, op, path, content.len() as u64, error);
    let file = fs.create_new(path).map_err(failed("create"))?;
    file.write_all_at(content, 0).map_err(failed("write"))?;
    file.sync().map_err(failed("fsync"))
}

/// What a failed write says: how much was needed, and how much is free.
pub(crate) fn write_error<F: FileSystem>(
    fs: &F,
    op: &'static str,
    path: &Path,
    needed_bytes: u64,
    error: io::Error,
) -> CheckpointError {
    let free_bytes = fs.free_bytes(&parent(path)).ok().flatten();
    CheckpointError::write(op, path, needed_bytes, free_bytes, error)
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir<F: FileSystem>(fs: &F, dir: &Path) -> Result<()> {
    fs.sync_dir(dir).map_err(CheckpointError::io("fsync folder", dir))
}

/// Makes durable the names in a folder, and its own name: whoever created it, and those above it, need not have done
/// so.
pub(crate) fn sync_dirs_from<F: FileSystem>(fs: &F, dir: &Path) -> Result<()> {
    sync_dir(fs, dir)?;
    for above in dir.ancestors().skip(1) {
        match sync_dir(fs, if above.as_os_str().is_empty() { Path::new(".") } else { above }) {
            // Not one where this program has created anything.
            Err(CheckpointError::Io { error, .. }) if error.kind() == ErrorKind::PermissionDenied => break,
            other => other?,
        }
    }
    Ok(())
}

/// Creates a folder and those above it. Their names are not yet durable.
pub(crate) fn create_dir_all<F: FileSystem>(fs: &F, dir: &Path) -> Result<()> {
    match fs.create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound && parent(dir) != dir => {
            create_dir_all(fs, &parent(dir))?;
            match fs.create_dir(dir) {
                // Another rank was faster.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                other => other.map_err(|error| write_error(fs, "create folder", dir, 0, error)),
            }
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|error| write_error(fs, "create folder", dir, 0, error)),
    }
}

pub(crate) fn rename<F: FileSystem>(fs: &F, from: &Path, to: &Path) -> Result<()> {
    fs.rename(from, to).map_err(|error| write_error(fs, "rename", from, 0, error))
}

pub(crate) fn exists<F: FileSystem>(fs: &F, path: &Path) -> Result<bool> {
    fs.exists(path).map_err(CheckpointError::io("look for", path))
}

/// Removes a folder and what is in it; what is not there is fine, and so is another process that removes it too.
pub(crate) fn remove_dir_all<F: FileSystem>(fs: &F, dir: &Path) -> Result<()> {
    let Some(entries) = unless_missing(fs.list(dir)).map_err(CheckpointError::io("list", dir))? else {
        return Ok(());
    };
    for entry in entries {
        let path = dir.join(entry.name);
        if entry.is_dir {
            remove_dir_all(fs, &path)?;
        } else {
            unless_missing(fs.remove_file(&path)).map_err(CheckpointError::io("remove", &path))?;
        }
    }
    unless_missing(fs.remove_dir(dir)).map_err(CheckpointError::io("remove", dir))?;
    Ok(())
}

pub(crate) fn unless_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// The folder that holds `path`, also for a bare name.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        Some(_) => PathBuf::from("."),
        None => path.to_path_buf(),
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
