//! The file system calls behind a save: what a test can take the place of, to lose power between any two of them or to
//! let any of them fail. [`Disk`] is the real one and costs nothing.
//!
//! Reading checkpoints and models is not behind it: those files are read as they lie on the disk.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, fstatvfs, ftruncate, renameat_with, statvfs};
use rustix::io::{Errno, retry_on_intr};

/// Calls that create, change, find and remove files. Each is one operation of the system, or leaves nothing behind when
/// it fails. Paths are as `std::fs` takes them; links are not followed by what removes or renames.
pub trait FileSystem: Clone + fmt::Debug + Send + Sync {
    type File: FileToWrite;

    /// A new, empty file.
    fn create_new(&self, path: &Path) -> io::Result<Self::File>;

    /// A file that is there, for writing.
    fn open_to_write(&self, path: &Path) -> io::Result<Self::File>;

    fn create_dir(&self, path: &Path) -> io::Result<()>;

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Two paths change places, at once.
    ///
    /// # Errors
    /// `EINVAL` or `ENOSYS` where that cannot be done.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;

    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Puts the names in a folder on disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Whether there is something of that name, also a dangling link.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>>;

    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Bytes that this process may still write in an existing folder; `None` where the file system cannot tell.
    fn free_bytes(&self, dir: &Path) -> io::Result<Option<u64>>;
}

/// An open file of a [`FileSystem`]. Closing it is dropping it: what closing could report, [`sync`](Self::sync) has.
pub trait FileToWrite: fmt::Debug + Send {
    /// Makes the file `len_bytes` long, with blocks of its own: a full disk shows here and not half-way.
    fn reserve(&self, len_bytes: u64) -> io::Result<()>;

    fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()>;

    /// Puts the content on disk. The name is there only after [`FileSystem::sync_dir`].
    fn sync(&self) -> io::Result<()>;
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    pub name: OsString,
    /// Not so for a link to a folder.
    pub is_dir: bool,
}

/// The file system of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk;

impl FileSystem for Disk {
    type File = File;

    fn create_new(&self, path: &Path) -> io::Result<File> {
        File::options().write(true).create_new(true).open(path)
    }

    fn open_to_write(&self, path: &Path) -> io::Result<File> {
        File::options().write(true).open(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match File::open(path)?.sync_all() {
            // Some network file systems have no such call for folders, and need none.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Ok(()),
            other => other,
        }
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            entries.push(DirEntry { name: entry.file_name(), is_dir: entry.file_type()?.is_dir() });
        }
        Ok(entries)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        let stat = statvfs(dir)?;
        Ok((stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize)))
    }
}

impl FileToWrite for File {
    fn reserve(&self, len_bytes: u64) -> io::Result<()> {
        match retry_on_intr(|| fallocate(self, FallocateFlags::empty(), 0, len_bytes)) {
            // File systems without it: the free space now is the best that can be known.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let stat = fstatvfs(self)?;
                if stat.f_blocks > 0 && stat.f_bavail.saturating_mul(stat.f_frsize) < len_bytes {
                    return Err(Errno::NOSPC.into());
                }
                Ok(retry_on_intr(|| ftruncate(self, len_bytes))?)
            }
            other => Ok(other?),
        }
    }

    fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset_bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}
