//! Small disks in memory.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A small disk in memory; unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Why none can be mounted; `None` if one can.
    pub fn is_refused() -> Option<String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(folder.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                drop(Tmpfs(folder.path().to_owned()));
                None
            }
            Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Some(format!("mount: {error}")),
        }
    }

    pub fn mount(folder: &Path, len_bytes: u64) -> Self {
        let size = format!("size={len_bytes}");
        let mut mount = Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder).status().expect("mount");
        assert!(status.success(), "{folder:?} cannot be mounted");
        Tmpfs(folder.to_owned())
    }

    /// Writes until there is no room left.
    pub fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.0.join("filler")).expect("a mounted file system");
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    pub fn resize(&self, len_bytes: u64) {
        let options = format!("remount,size={len_bytes}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status().expect("mount");
        assert!(status.success(), "{:?} cannot be resized", self.0);
    }

    pub fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).expect("a mounted file system");
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: what still runs there is being killed.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
