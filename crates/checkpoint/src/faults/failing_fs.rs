//! A file system of which one call fails.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::fs::{DirEntry, Disk, FileSystem, FileToWrite};

/// The file system of the machine, but for one call. Clones count calls together.
#[derive(Debug, Clone)]
pub struct FailingFs {
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug)]
struct Plan {
    num_calls: usize,
    failing: usize,
    errno: Errno,
    manner: Manner,
    failed: Option<String>,
}

/// What the failing call has done when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Nothing,
    /// Everything, as when a network file system loses the answer; of a write, half.
    ItsWork,
}

impl FailingFs {
    /// Call number `failing`, from 0, gives `errno`. Asking for free space is not counted.
    pub fn new(failing: usize, errno: Errno, manner: Manner) -> Self {
        let plan = Plan { num_calls: 0, failing, errno, manner, failed: None };
        FailingFs { plan: Arc::new(Mutex::new(plan)) }
    }

    /// The call that failed, in words; `None` if there were not that many.
    pub fn failed(&self) -> Option<String> {
        self.plan().failed.clone()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do instead of a call, if it is the one.
    fn enter(&self, what: &str, path: &Path) -> Option<(Manner, io::Error)> {
        let mut plan = self.plan();
        let is_failing = plan.num_calls == plan.failing;
        plan.num_calls += 1;
        if !is_failing {
            return None;
        }
        plan.failed = Some(format!("{what} {}", path.display()));
        Some((plan.manner, plan.errno.into()))
    }

    fn call<T>(&self, what: &str, path: &Path, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.enter(what, path) {
            None => work(),
            Some((Manner::Nothing, error)) => Err(error),
            Some((Manner::ItsWork, error)) => {
                // What it would have said is lost.
                let _ = work();
                Err(error)
            }
        }
    }

    fn file(&self, file: std::fs::File, path: &Path) -> FailingFile {
        FailingFile { fs: self.clone(), file, path: path.to_owned() }
    }
}

impl FileSystem for FailingFs {
    type File = FailingFile;

    fn create_new(&self, path: &Path) -> io::Result<FailingFile> {
        self.call("create", path, || Ok(self.file(Disk.create_new(path)?, path)))
    }

    fn open_to_write(&self, path: &Path) -> io::Result<FailingFile> {
        self.call("open", path, || Ok(self.file(Disk.open_to_write(path)?, path)))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call("mkdir", path, || Disk.create_dir(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call("rename", from, || Disk.rename(from, to))
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.call("exchange", a, || Disk.exchange(a, b))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.call("unlink", path, || Disk.remove_file(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.call("rmdir", path, || Disk.remove_dir(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.call("fsync folder", path, || Disk.sync_dir(path))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.call("stat", path, || Disk.exists(path))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        self.call("list", dir, || Disk.list(dir))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.call("read", path, || Disk.read(path))
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        Disk.free_bytes(dir)
    }
}

/// An open file of a [`FailingFs`].
#[derive(Debug)]
pub struct FailingFile {
    fs: FailingFs,
    file: std::fs::File,
    path: std::path::PathBuf,
}

impl FileToWrite for FailingFile {
    fn reserve(&self, len_bytes: u64) -> io::Result<()> {
        self.fs.call("reserve", &self.path, || self.file.reserve(len_bytes))
    }

    fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        let write = |bytes| FileToWrite::write_all_at(&self.file, bytes, offset_bytes);
        match self.fs.enter("write", &self.path) {
            None => write(bytes),
            Some((Manner::Nothing, error)) => Err(error),
            Some((Manner::ItsWork, error)) => {
                let _ = write(&bytes[..bytes.len() / 2]);
                Err(error)
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.fs.call("fsync", &self.path, || self.file.sync())
    }
}
