//! A file system in memory that knows what a power loss may leave of it.
//!
//! The model is the weakest that POSIX allows. Until a file is fsynced, each write to it may be lost, kept or torn,
//! independently of the others, and so may its length. Until a folder is fsynced, each name that was created, removed
//! or renamed in it may be lost or kept, independently of the others, of other folders and of the content of files.
//! Only a rename within a folder is atomic. An fsync of a file says nothing of its name, nor one of a folder of the
//! folder's own name.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::fs::{DirEntry, FileSystem, FileToWrite};

const ROOT: usize = 0;

/// Paths start at `/`, which is there and empty. Clones are the same file system.
#[derive(Debug, Clone)]
pub struct CrashFs {
    state: Arc<Mutex<State>>,
    can_exchange: bool,
}

#[derive(Debug)]
struct State {
    /// Never removed, so that what lost its name can come back.
    nodes: Vec<Node>,
    log: Vec<Operation>,
}

#[derive(Debug, Clone)]
enum Node {
    File(Vec<u8>),
    Dir(BTreeMap<OsString, usize>),
}

/// Something that changes the file or folder of that number, or puts it on disk.
#[derive(Debug)]
struct Operation {
    node: usize,
    change: Change,
    what: String,
}

#[derive(Debug)]
enum Change {
    Write {
        offset_bytes: usize,
        bytes: Vec<u8>,
    },
    Resize {
        len_bytes: usize,
    },
    /// Names, each with what it stands for now, if anything.
    Names(Vec<(OsString, Option<usize>)>),
    Sync,
}

/// What a power loss does to an operation that no fsync has made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    Kept,
    Lost,
    /// Of a write, only so many bytes are kept. Anything else is kept.
    Torn(usize),
}

/// An operation that no fsync has made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undecided {
    pub operation: usize,
    /// The file or folder that it changes.
    pub node: usize,
    /// Of a write. Else 0.
    pub num_bytes: usize,
}

/// Files, with their content, and folders: what is there after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Image(BTreeMap<PathBuf, Option<Vec<u8>>>);

impl CrashFs {
    /// `can_exchange` is whether two folders can change places at once.
    pub fn new(can_exchange: bool) -> Self {
        let nodes = vec![Node::Dir(BTreeMap::new())];
        CrashFs { state: Arc::new(Mutex::new(State { nodes, log: Vec::new() })), can_exchange }
    }

    /// Operations so far.
    pub fn num_operations(&self) -> usize {
        self.lock().log.len()
    }

    /// An operation in words.
    pub fn operation(&self, number: usize) -> String {
        self.lock().log[number].what.clone()
    }

    /// Of the first `at` operations, those that a crash then may undo. `ignored` is an fsync that does nothing.
    pub fn undecided(&self, at: usize, ignored: Option<usize>) -> Vec<Undecided> {
        let state = self.lock();
        let mut synced = HashSet::new();
        let mut undecided = Vec::new();
        for (i, operation) in state.log[..at].iter().enumerate().rev() {
            let node = operation.node;
            let num_bytes = match &operation.change {
                Change::Sync => {
                    if Some(i) != ignored {
                        synced.insert(node);
                    }
                    continue;
                }
                Change::Write { bytes, .. } => bytes.len(),
                Change::Resize { .. } | Change::Names(_) => 0,
            };
            if !synced.contains(&node) {
                undecided.push(Undecided { operation: i, node, num_bytes });
            }
        }
        undecided.reverse();
        undecided
    }

    /// The fsyncs that made something durable.
    pub fn syncs(&self) -> Vec<usize> {
        let is_sync = |i: &usize| matches!(self.lock().log[*i].change, Change::Sync);
        let useful = |i: &usize| self.undecided(i + 1, None).len() < self.undecided(i + 1, Some(*i)).len();
        (0..self.num_operations()).filter(is_sync).filter(useful).collect()
    }

    /// What is there after a crash before operation `at`.
    pub fn image(&self, at: usize, fate: impl Fn(usize) -> Fate) -> Image {
        let state = self.lock();
        let mut nodes = vec![Node::Dir(BTreeMap::new())];
        for node in &state.nodes[1..] {
            nodes.push(match node {
                Node::File(_) => Node::File(Vec::new()),
                Node::Dir(_) => Node::Dir(BTreeMap::new()),
            });
        }
        for (i, operation) in state.log[..at].iter().enumerate() {
            let node = &mut nodes[operation.node];
            match fate(i) {
                Fate::Lost => {}
                Fate::Torn(num) => apply(node, &operation.change, num),
                Fate::Kept => apply(node, &operation.change, usize::MAX),
            }
        }
        let mut image = BTreeMap::new();
        collect(&nodes, ROOT, Path::new(""), &mut image);
        Image(image)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    /// Makes it real, in an existing folder that stands for `/`.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        for (path, content) in &self.0 {
            match content {
                Some(bytes) => std::fs::write(dir.join(path), bytes)?,
                None => std::fs::create_dir(dir.join(path))?,
            }
        }
        Ok(())
    }
}

fn apply(node: &mut Node, change: &Change, max_bytes: usize) {
    match (node, change) {
        (_, Change::Sync) => {}
        (Node::File(content), Change::Write { offset_bytes, bytes }) => {
            let bytes = &bytes[..bytes.len().min(max_bytes)];
            let end = offset_bytes + bytes.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*offset_bytes..end].copy_from_slice(bytes);
        }
        (Node::File(content), Change::Resize { len_bytes }) => content.resize(*len_bytes, 0),
        (Node::Dir(names), Change::Names(changes)) => {
            for (name, target) in changes {
                match target {
                    Some(target) => names.insert(name.clone(), *target),
                    None => names.remove(name),
                };
            }
        }
        (node, change) => unreachable!("{change:?} of {node:?}"),
    }
}

fn collect(nodes: &[Node], dir: usize, path: &Path, image: &mut BTreeMap<PathBuf, Option<Vec<u8>>>) {
    let Node::Dir(names) = &nodes[dir] else { unreachable!("a folder") };
    for (name, &node) in names {
        let path = path.join(name);
        match &nodes[node] {
            Node::File(content) => {
                image.insert(path, Some(content.clone()));
            }
            Node::Dir(_) => {
                image.insert(path.clone(), None);
                collect(nodes, node, &path, image);
            }
        }
    }
}

impl State {
    fn change(&mut self, node: usize, change: Change, what: String) {
        apply(&mut self.nodes[node], &change, usize::MAX);
        self.log.push(Operation { node, change, what });
    }

    fn names(&self, dir: usize) -> io::Result<&BTreeMap<OsString, usize>> {
        match &self.nodes[dir] {
            Node::Dir(names) => Ok(names),
            Node::File(_) => Err(Errno::NOTDIR.into()),
        }
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut node = ROOT;
        for part in path.components() {
            if let Component::Normal(name) = part {
                node = *self.names(node)?.get(name).ok_or(Errno::NOENT)?;
            }
        }
        Ok(node)
    }

    /// The folder that a path is in, and its last name.
    fn place<'a>(&self, path: &'a Path) -> io::Result<(usize, &'a OsStr)> {
        let name = path.file_name().ok_or(Errno::BUSY)?;
        let dir = self.find(path.parent().unwrap_or(Path::new("/")))?;
        self.names(dir)?;
        Ok((dir, name))
    }

    fn create(&mut self, path: &Path, node: Node, what: &str) -> io::Result<usize> {
        let (dir, name) = self.place(path)?;
        if self.names(dir)?.contains_key(name) {
            return Err(Errno::EXIST.into());
        }
        self.nodes.push(node);
        let new = self.nodes.len() - 1;
        self.change(dir, Change::Names(vec![(name.to_owned(), Some(new))]), format!("{what} {}", path.display()));
        Ok(new)
    }

    fn remove(&mut self, path: &Path, what: &str) -> io::Result<()> {
        let (dir, name) = self.place(path)?;
        self.change(dir, Change::Names(vec![(name.to_owned(), None)]), format!("{what} {}", path.display()));
        Ok(())
    }

    fn is_empty_dir(&self, node: usize) -> bool {
        matches!(&self.nodes[node], Node::Dir(names) if names.is_empty())
    }
}

impl FileSystem for CrashFs {
    type File = CrashFile;

    fn create_new(&self, path: &Path) -> io::Result<CrashFile> {
        let node = self.lock().create(path, Node::File(Vec::new()), "create")?;
        Ok(CrashFile { fs: self.clone(), node, path: path.to_owned() })
    }

    fn open_to_write(&self, path: &Path) -> io::Result<CrashFile> {
        let node = self.lock().find(path)?;
        Ok(CrashFile { fs: self.clone(), node, path: path.to_owned() })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.lock().create(path, Node::Dir(BTreeMap::new()), "mkdir")?;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let ((from_dir, from_name), (to_dir, to_name)) = (state.place(from)?, state.place(to)?);
        let node = state.find(from)?;
        // Nothing here renames files over each other.
        if state.find(to).is_ok_and(|target| !state.is_empty_dir(target)) {
            return Err(Errno::NOTEMPTY.into());
        }
        let what = format!("rename {} to {}", from.display(), to.display());
        let (old, new) = ((from_name.to_owned(), None), (to_name.to_owned(), Some(node)));
        if from_dir == to_dir {
            state.change(to_dir, Change::Names(vec![old, new]), what);
        } else {
            state.change(to_dir, Change::Names(vec![new]), what.clone());
            state.change(from_dir, Change::Names(vec![old]), what);
        }
        Ok(())
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let ((dir_a, name_a), (dir_b, name_b)) = (state.place(a)?, state.place(b)?);
        let (node_a, node_b) = (state.find(a)?, state.find(b)?);
        if !self.can_exchange || dir_a != dir_b {
            return Err(Errno::INVAL.into());
        }
        let names = vec![(name_a.to_owned(), Some(node_b)), (name_b.to_owned(), Some(node_a))];
        state.change(dir_a, Change::Names(names), format!("exchange {} and {}", a.display(), b.display()));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        match state.nodes[state.find(path)?] {
            Node::File(_) => state.remove(path, "unlink"),
            Node::Dir(_) => Err(Errno::ISDIR.into()),
        }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.is_empty_dir(state.find(path)?) {
            return Err(Errno::NOTEMPTY.into());
        }
        state.remove(path, "rmdir")
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let node = state.find(path)?;
        state.change(node, Change::Sync, format!("fsync folder {}", path.display()));
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.lock().find(path).is_ok())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.lock();
        let names = state.names(state.find(dir)?)?;
        let is_dir = |node: usize| matches!(state.nodes[node], Node::Dir(_));
        Ok(names.iter().map(|(name, &node)| DirEntry { name: name.clone(), is_dir: is_dir(node) }).collect())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.lock();
        match &state.nodes[state.find(path)?] {
            Node::File(content) => Ok(content.clone()),
            Node::Dir(_) => Err(Errno::ISDIR.into()),
        }
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

/// An open file of a [`CrashFs`].
#[derive(Debug)]
pub struct CrashFile {
    fs: CrashFs,
    node: usize,
    path: PathBuf,
}

impl CrashFile {
    fn change(&self, change: Change, what: String) {
        self.fs.lock().change(self.node, change, format!("{what} {}", self.path.display()));
    }
}

impl FileToWrite for CrashFile {
    fn reserve(&self, len_bytes: u64) -> io::Result<()> {
        self.change(Change::Resize { len_bytes: len_bytes as usize }, format!("reserve {len_bytes} bytes for"));
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        let what = format!("write {} bytes from {offset_bytes} on to", bytes.len());
        self.change(Change::Write { offset_bytes: offset_bytes as usize, bytes: bytes.to_vec() }, what);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.change(Change::Sync, "fsync".into());
        Ok(())
    }
}
