//! Crashes at every operation of a run that saves, and of one that exports; of each, many outcomes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs;
use std::path::Path;

use super::crash_fs::{CrashFs, Fate, Image, Undecided};
use super::sample;
use crate::elements::Dtype;
use crate::error::Result;
use crate::export::{Export, ExportLayout};
use crate::fs::{FileSystem, FileToWrite};
use crate::hf_folder::ModelFolder;
use crate::sharded::{abort_on, list, newest_valid, retain_on, set_aside_on, sweep, sweep_on};

/// Random outcomes of each crash, besides those that are always tried.
const NUM_RANDOM: usize = 12;

/// How much was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explored {
    /// Operations of the run; there was a crash before each and after the last.
    pub num_operations: usize,
    /// Different choices of what is lost, over all crashes.
    pub num_outcomes: usize,
    /// Different states of the file system among these, with different things expected of them. All were checked.
    pub num_states: usize,
}

/// A power loss that harms.
#[derive(Debug, Clone)]
pub struct Violation {
    pub num_operations: usize,
    /// The last operation before the crash.
    pub last: String,
    /// Operations without effect.
    pub lost: Vec<String>,
    pub reason: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { num_operations, last, lost, reason } = self;
        write!(f, "power lost after {num_operations} operations, the last {last:?}, without {lost:?}: {reason}")
    }
}

impl std::error::Error for Violation {}

/// A run that was recorded, and what must hold after a crash in it.
#[derive(Debug)]
pub struct Recorded<E> {
    pub fs: CrashFs,
    /// Each holds from so many operations on, until the next does.
    expected: Vec<(usize, E)>,
}

/// What must be there of a run that saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Saved {
    /// The newest step whose commit has returned, and that was not damaged since; 0 for none.
    newest: u64,
    /// The step whose checkpoint was damaged by the run, if it may still be there.
    damaged: Option<u64>,
}

/// What must be there of a run that exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exported {
    /// Exports whose commit has returned.
    num_committed: usize,
}

impl<E: Copy> Recorded<E> {
    fn new(can_exchange: bool, expected: E) -> Self {
        Recorded { fs: CrashFs::new(can_exchange), expected: vec![(0, expected)] }
    }

    fn expect(&mut self, expected: E) {
        self.expected.push((self.fs.num_operations(), expected));
    }
}

/// Two ranks save, delete, find debris and damage, and give up, all in `/out/checkpoints`.
pub fn record_saves() -> Recorded<Saved> {
    let mut run = Recorded::new(true, Saved { newest: 0, damaged: None });
    record_saves_into(&mut run).expect("nothing fails in memory");
    run
}

fn record_saves_into(run: &mut Recorded<Saved>) -> Result<()> {
    let root = Path::new("/out/checkpoints");
    let fs = &run.fs.clone();
    crate::durable::create_dir_all(fs, root)?;
    let save = |run: &mut Recorded<Saved>, step: u64, save_id: &str, keep_every: u64| -> Result<()> {
        sample::save(fs, root, step, save_id, 2)?;
        run.expect(Saved { newest: step, damaged: None });
        retain_on(fs, root, 2, keep_every).map(drop)
    };
    for step in 1..=3 {
        save(run, step, "first", 0)?;
    }

    // As if killed amid the save of step 4, and started again.
    sample::begin_rank(fs, root, 4, "killed", 0, 2)?;
    sweep_on(fs, root)?;

    // Step 3 turns out to be damaged.
    run.expect(Saved { newest: 2, damaged: Some(3) });
    let dir = root.join("step-00000003");
    let file = fs.open_to_write(&dir.join("rank-00001-of-00002.safetensors")).expect("it was saved");
    file.write_all_at(b"damage", 1000).expect("nothing fails in memory");
    set_aside_on(fs, &dir)?;
    save(run, 3, "second", 0)?;
    save(run, 4, "second", 2)?;

    sample::begin_rank(fs, root, 5, "failed", 1, 2)?;
    abort_on(fs, root, 5, "failed")?;
    save(run, 5, "second", 2)
}

/// Whether a run that saves can go on from what is in the folder that stands for `/`.
pub fn check_saves(expected: &Saved, disk: &Path) -> std::result::Result<(), String> {
    let root = disk.join("out/checkpoints");
    let text = |error: crate::CheckpointError| error.to_string();
    for (step, path) in list(&root).map_err(text)? {
        match sample::check(&path) {
            Ok(got) if got == step => {}
            Ok(got) => return Err(format!("{} is of step {got}", path.display())),
            Err(_) if expected.damaged == Some(step) => {}
            Err(reason) => return Err(format!("has a checkpoint's name and is not whole: {reason}")),
        }
    }
    let newest = newest_valid(&root).map_err(text)?.checkpoint.map_or(0, |checkpoint| checkpoint.manifest().step);
    if newest < expected.newest {
        return Err(format!("step {} was committed, the newest is {newest}", expected.newest));
    }
    sweep(&root).map_err(text)?;
    let names = fs::read_dir(&root).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let debris: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.contains(".tmp-") || name.starts_with(".trash-"))
        .collect();
    if debris.is_empty() { Ok(()) } else { Err(format!("debris cannot be removed: {debris:?}")) }
}

/// One rank exports three times to `/out/hf`, the k-th time weights that are all k.
///
/// # Panics
/// If `source`, a folder for the `config.json` of the model, cannot be written.
pub fn record_exports(can_exchange: bool, source: &Path) -> Recorded<Exported> {
    fs::write(source.join("config.json"), "{}").expect("a folder of the caller");
    let mut run = Recorded::new(can_exchange, Exported { num_committed: 0 });
    let layout = export_layout();
    for num in 1..=3 {
        let export = || -> Result<()> {
            let mut export = Export::create_on(&run.fs, &layout, Path::new("/out/hf"), source)?;
            for (name, shape) in export_tensors() {
                let half = vec![num as f32; shape[0] / 2];
                export.write_f32(&name, 0, &half)?;
                export.write_f32(&name, half.len(), &half)?;
            }
            export.commit()
        };
        export().expect("nothing fails in memory");
        run.expect(Exported { num_committed: num });
    }
    run
}

fn export_tensors() -> [(String, Vec<usize>); 2] {
    [("a".to_string(), vec![40]), ("b".to_string(), vec![60])]
}

fn export_layout() -> ExportLayout {
    ExportLayout::new(&export_tensors(), Dtype::F32, 200)
}

/// Whether the folder that stands for `/` has a whole export, not older than expected; where folders cannot change
/// places, under the name that the next export takes it from.
pub fn check_exports(expected: &Exported, can_exchange: bool, disk: &Path) -> std::result::Result<(), String> {
    let hf = disk.join("out/hf");
    let found = if hf.exists() || can_exchange { hf } else { disk.join("out/.hf.trash") };
    if !found.exists() {
        return if expected.num_committed == 0 { Ok(()) } else { Err("there is no export".to_string()) };
    }
    let read = || -> Result<BTreeMap<String, Vec<f32>>> {
        let folder = ModelFolder::open(&found)?;
        folder.expect(&export_tensors())?;
        let mut all = BTreeMap::new();
        for info in folder.tensors() {
            let mut values = vec![f32::NAN; info.numel()];
            folder.read_f32(&info.name, 0, &mut values)?;
            all.insert(info.name.clone(), values);
        }
        Ok(all)
    };
    let values: Vec<f32> = read().map_err(|error| error.to_string())?.into_values().flatten().collect();
    if values.iter().any(|&value| value != values[0] || value < expected.num_committed as f32) {
        return Err(format!("{} exports were committed, this holds {values:?}", expected.num_committed));
    }
    match found.join("config.json").metadata() {
        Ok(config) if config.len() > 0 => Ok(()),
        _ => Err("there is no config.json".to_string()),
    }
}

impl<E: Copy + Eq + std::hash::Hash> Recorded<E> {
    /// Loses power before every operation and after the last. Of what no fsync has put on disk, all is lost, or kept,
    /// or only what came before some operation is kept; each operation, and each file and folder, alone is lost, or
    /// kept, or torn; and random ones. `scratch` is a folder for the states; each is removed again.
    ///
    /// # Errors
    /// The first outcome that `check` finds fault with.
    ///
    /// # Panics
    /// If `scratch` cannot be written.
    pub fn explore(
        &self,
        seed: u64,
        scratch: &Path,
        check: impl Fn(&E, &Path) -> std::result::Result<(), String>,
    ) -> std::result::Result<Explored, Violation> {
        self.explore_ignoring(None, seed, scratch, &check, &mut HashSet::new())
    }

    /// The fsyncs, in words, that could be left out one at a time without `check` finding fault with any outcome. None
    /// of them, if the run has no needless fsync and the exploration finds what each is for.
    pub fn needless_syncs(
        &self,
        seed: u64,
        scratch: &Path,
        check: impl Fn(&E, &Path) -> std::result::Result<(), String>,
    ) -> Vec<String> {
        let mut sound = HashSet::new();
        let is_needless = |i: &usize| self.explore_ignoring(Some(*i), seed, scratch, &check, &mut sound).is_ok();
        let needless = self.fs.syncs().into_iter().filter(is_needless);
        needless.map(|i| format!("operation {i}: {}", self.fs.operation(i))).collect()
    }

    fn explore_ignoring(
        &self,
        ignored: Option<usize>,
        seed: u64,
        scratch: &Path,
        check: &impl Fn(&E, &Path) -> std::result::Result<(), String>,
        sound: &mut HashSet<(Image, E)>,
    ) -> std::result::Result<Explored, Violation> {
        let mut random = fastrand::Rng::with_seed(seed);
        let num_operations = self.fs.num_operations();
        let mut explored = Explored { num_operations, num_outcomes: 0, num_states: 0 };
        // Before an fsync that is ignored, all is as it was.
        for at in ignored.map_or(0, |ignored| ignored + 1)..=num_operations {
            let (_, expected) = self.expected.iter().rev().find(|(from, _)| *from <= at).expect("the first is from 0");
            for fates in outcomes(&self.fs.undecided(at, ignored), &mut random) {
                explored.num_outcomes += 1;
                let fate = |i: usize| fates.get(&i).copied().unwrap_or(Fate::Kept);
                let image = self.fs.image(at, fate);
                let disk = scratch.join("disk");
                if sound.contains(&(image.clone(), *expected)) {
                    continue;
                }
                explored.num_states += 1;
                fs::create_dir(&disk).and_then(|()| image.write_to(&disk)).expect("a folder of the caller");
                let checked = check(expected, &disk);
                fs::remove_dir_all(&disk).expect("a folder of the caller");
                checked.map_err(|reason| {
                    let lost = fates.iter().filter(|(_, fate)| **fate != Fate::Kept);
                    let last = at.checked_sub(1).map_or("none".to_string(), |i| self.fs.operation(i));
                    let lost = lost.map(|(&i, _)| self.fs.operation(i)).collect();
                    Violation { num_operations: at, last, lost, reason }
                })?;
                sound.insert((image, *expected));
            }
        }
        Ok(explored)
    }
}

/// Different ways in which a crash may decide what is undecided.
fn outcomes(undecided: &[Undecided], random: &mut fastrand::Rng) -> BTreeSet<BTreeMap<usize, Fate>> {
    let decide = |fate: &dyn Fn(&Undecided) -> Fate| -> BTreeMap<usize, Fate> {
        undecided.iter().map(|one| (one.operation, fate(one))).collect()
    };
    let kept_if = |is_kept: bool| if is_kept { Fate::Kept } else { Fate::Lost };
    let mut outcomes = BTreeSet::from([decide(&|_| Fate::Lost), decide(&|_| Fate::Kept)]);
    for this in undecided {
        // In order.
        outcomes.insert(decide(&|one| kept_if(one.operation < this.operation)));
        for others in [true, false] {
            // Files and folders independently of each other.
            outcomes.insert(decide(&|one| kept_if((one.node == this.node) != others)));
            for fate in [Fate::Kept, Fate::Lost, torn(this, random)] {
                outcomes.insert(decide(&|one| if one == this { fate } else { kept_if(others) }));
            }
        }
    }
    for _ in 0..NUM_RANDOM {
        let mut fates = BTreeMap::new();
        for one in undecided {
            let all = [Fate::Kept, Fate::Lost, torn(one, random)];
            let fate = *random.choice(&all).expect("three of them");
            fates.insert(one.operation, fate);
        }
        outcomes.insert(fates);
    }
    outcomes
}

fn torn(write: &Undecided, random: &mut fastrand::Rng) -> Fate {
    match write.num_bytes {
        0 => Fate::Kept,
        num => Fate::Torn(random.usize(0..num)),
    }
}
