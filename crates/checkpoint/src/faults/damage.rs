//! Damage to the files of a committed checkpoint. Whatever its kind, the checkpoint must no longer open, and the error
//! must name a file that was touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::sharded::{Manifest, State};

const MANIFEST: &str = "manifest.json";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    FlipBit,
    Truncate,
    Extend,
    /// Bytes in the middle are gone, what follows moves up.
    Cut,
    /// A block is zeros, as after a power loss on some file systems.
    ZeroBlock,
    Delete,
    /// Two ranks' files change places; in a checkpoint of one rank, as `SwapSteps`.
    SwapRanks,
    /// A file changes places with that of the other checkpoint.
    SwapSteps,
    /// A file is replaced by that of the other checkpoint.
    FromOther,
    /// The manifest, by somebody who does not know its digest.
    EditManifest,
    /// The manifest, its digest made to match, so that it contradicts itself or the files.
    EditSealedManifest,
}

pub const KINDS: [Kind; 11] = [
    Kind::FlipBit,
    Kind::Truncate,
    Kind::Extend,
    Kind::Cut,
    Kind::ZeroBlock,
    Kind::Delete,
    Kind::SwapRanks,
    Kind::SwapSteps,
    Kind::FromOther,
    Kind::EditManifest,
    Kind::EditSealedManifest,
];

/// Done damage, which can be undone.
#[derive(Debug)]
pub struct Damage {
    /// In words.
    pub what: String,
    /// An error names one of these.
    names: Vec<String>,
    /// Files as they were.
    originals: Vec<(PathBuf, Vec<u8>)>,
}

impl Damage {
    /// Damages the checkpoint in `dir`. `other` is another one of the same world size, which is damaged too where files
    /// change places.
    ///
    /// # Errors
    /// The folders cannot be read or written.
    pub fn new(kind: Kind, dir: &Path, other: &Path, random: &mut fastrand::Rng) -> io::Result<Damage> {
        let mut names: Vec<String> = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let shards: Vec<&String> = names.iter().filter(|name| *name != MANIFEST).collect();
        let name = random.choice(&names).expect("a manifest at least").clone();
        let (path, foreign) = (dir.join(&name), other.join(&name));
        let mut damage = Damage { what: format!("{kind:?}: {name}"), names: vec![name.clone()], originals: Vec::new() };
        let content = fs::read(&path)?;
        let at = random.usize(0..content.len());
        match kind {
            Kind::FlipBit => {
                let mut bad = content;
                bad[at] ^= 1 << random.u8(0..8);
                damage.write(&path, bad)?;
            }
            Kind::Truncate => damage.write(&path, content[..at].to_vec())?,
            Kind::Extend => damage.write(&path, [content, vec![0; random.usize(1..5000)]].concat())?,
            Kind::Cut => {
                let end = random.usize(at + 1..=content.len());
                damage.write(&path, [&content[..at], &content[end..]].concat())?;
            }
            Kind::ZeroBlock => {
                let mut bad = content.clone();
                let block = at / 512 * 512..(at / 512 * 512 + 512).min(content.len());
                bad[block].fill(0);
                if bad == content {
                    bad[at] = 1;
                }
                damage.write(&path, bad)?;
            }
            Kind::Delete => {
                damage.originals.push((path.clone(), content));
                fs::remove_file(&path)?;
            }
            Kind::SwapRanks if shards.len() > 1 => {
                let first = random.usize(0..shards.len());
                let second = (first + random.usize(1..shards.len())) % shards.len();
                damage.names = vec![shards[first].clone(), shards[second].clone()];
                damage.what = format!("{kind:?}: {:?}", damage.names);
                damage.swap(&dir.join(shards[first]), &dir.join(shards[second]))?;
            }
            Kind::SwapRanks | Kind::SwapSteps => damage.swap(&path, &foreign)?,
            Kind::FromOther => damage.write(&path, fs::read(&foreign)?)?,
            Kind::EditManifest => {
                let path = dir.join(MANIFEST);
                let mut text = fs::read(&path)?;
                let digits: Vec<usize> = (0..text.len()).filter(|&i| text[i].is_ascii_digit()).collect();
                let at = *random.choice(&digits).expect("a manifest has numbers");
                text[at] = b'0' + (text[at] - b'0' + random.u8(1..10)) % 10;
                damage.names = vec![MANIFEST.to_string()];
                damage.what = format!("{kind:?}: a digit at byte {at}");
                damage.write(&path, text)?;
            }
            Kind::EditSealedManifest => {
                let path = dir.join(MANIFEST);
                let text = fs::read_to_string(&path)?;
                let mut manifest = Manifest::parse(&text, &path).map_err(io::Error::other)?;
                let what = contradict(&mut manifest, random);
                damage.names = vec![MANIFEST.to_string()];
                damage.names.extend(shards.into_iter().cloned());
                damage.what = format!("{kind:?}: {what}");
                damage.write(&path, manifest.to_sealed_text().into_bytes())?;
            }
        }
        Ok(damage)
    }

    /// Whether an error message says which file it is.
    pub fn is_named_in(&self, message: &str) -> bool {
        self.names.iter().any(|name| message.contains(name.as_str()))
    }

    pub fn undo(self) -> io::Result<()> {
        self.originals.into_iter().try_for_each(|(path, content)| fs::write(path, content))
    }

    fn write(&mut self, path: &Path, content: Vec<u8>) -> io::Result<()> {
        self.originals.push((path.to_owned(), fs::read(path)?));
        fs::write(path, content)
    }

    fn swap(&mut self, a: &Path, b: &Path) -> io::Result<()> {
        let (content_a, content_b) = (fs::read(a)?, fs::read(b)?);
        self.write(a, content_b)?;
        self.write(b, content_a)
    }
}

/// Changes one thing that the rest of the manifest, or the files, say otherwise. Says which.
fn contradict(manifest: &mut Manifest, random: &mut fastrand::Rng) -> String {
    let file = random.usize(0..manifest.files.len());
    let i = random.usize(0..manifest.chunks.len());
    let num_files = manifest.files.len();
    let chunk = &mut manifest.chunks[i];
    let num = random.u64(1..100);
    match random.u8(0..17) {
        0 => change("step", &mut manifest.step, |step| step + num),
        1 => change("save_id", &mut manifest.save_id, |id| format!("{id}x")),
        2 => change("world_size", &mut manifest.world_size, |size| size + num as usize),
        3 => change("files.len_bytes", &mut manifest.files[file].len_bytes, |len| len + num),
        4 => change("files.digest", &mut manifest.files[file].digest, |digest| digest.chars().rev().collect()),
        5 => change("files.name", &mut manifest.files[file].name, |name| format!("../{name}")),
        6 => change("format_version", &mut manifest.format_version, |version| version + num as u32),
        7 => change("chunks.start", &mut chunk.start, |start| start + num as usize),
        8 => change("chunks.len", &mut chunk.len, |len| len + num as usize),
        9 => change("chunks.offset_bytes", &mut chunk.offset_bytes, |offset| offset - 4),
        10 => change("chunks.digest", &mut chunk.digest, |digest| digest.chars().rev().collect()),
        11 => change("chunks.dtype", &mut chunk.dtype, |_| "F16".to_string()),
        12 => change("chunks.name", &mut chunk.name, |name| format!("{name}x")),
        13 => change("chunks.state", &mut chunk.state, |state| match state {
            State::Param => State::ExpAvg,
            State::ExpAvg | State::ExpAvgSq => State::Param,
        }),
        14 => change("chunks.shape", &mut chunk.shape, |shape| [shape.as_slice(), &[2]].concat()),
        15 => change("chunks.file", &mut chunk.file, |file| (file + 1) % (num_files + 1)),
        _ => {
            let chunk = manifest.chunks.remove(i);
            format!("without {:?} of {} from {} on", chunk.state, chunk.name, chunk.start)
        }
    }
}

fn change<T: std::fmt::Debug>(what: &str, value: &mut T, to: impl FnOnce(&T) -> T) -> String {
    let new = to(value);
    let text = format!("{what} is {new:?} instead of {value:?}");
    *value = new;
    text
}
