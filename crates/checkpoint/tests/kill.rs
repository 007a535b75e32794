//! Two real rank processes save checkpoints in a loop; one of them is killed at a random moment. Whatever the moment,
//! the newest valid checkpoint is one that was committed, whole, and not older than the last one announced.
//!
//! This test brings its own `main` because its processes talk over stdout.

mod fixture;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write, stdin};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, SystemTime};

use fixture::*;
use fsdp_checkpoint::sharded::{ShardReport, commit, list, newest_valid, retain, sweep};

const NUM_KILLS: usize = 20;
const KEEP: usize = 2;

fn tensors() -> Vec<Named> {
    vec![("embed".to_string(), vec![301, 64]), ("norm".to_string(), vec![64])]
}

fn main() {
    let args: Vec<String> = env::args().collect();
    match &args[1..] {
        [mode, root, rank, first_step] if mode == "save" => {
            save_for_ever(Path::new(root), rank.parse().unwrap(), first_step.parse().unwrap())
        }
        _ => kill_at_random_moments(),
    }
}

/// A rank: reports and commits travel as lines, rank 1's report to rank 0, rank 0's commit to rank 1.
fn save_for_ever(root: &Path, rank: usize, first_step: u64) {
    let mut lines = stdin().lines().map(|line| line.expect("the other rank is there"));
    for step in first_step.. {
        let save_id = format!("run-from-{first_step}");
        let report = save_rank(root, step, &save_id, rank, 2, &tensors());
        if rank == 1 {
            println!("{}", serde_json::to_string(&report).unwrap());
            let Some(_committed) = lines.next() else { return };
        } else {
            let Some(line) = lines.next() else { return };
            let other: ShardReport = serde_json::from_str(&line).unwrap();
            commit(root, step, &save_id, &[report, other], meta(step)).unwrap();
            println!("{step}");
            retain(root, KEEP, 0).unwrap();
        }
    }
}

fn start(root: &Path, rank: usize, first_step: u64) -> (Child, ChildStdin, ChildStdout) {
    let mut child = Command::new(env::current_exe().unwrap())
        .arg("save")
        .arg(root)
        .args([rank.to_string(), first_step.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (child, stdin, stdout)
}

/// Passes lines on until an end breaks; remembers the last number among them.
fn forward(from: ChildStdout, mut to: ChildStdin, committed: Option<Arc<AtomicU64>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if let Some(committed) = &committed {
                committed.store(line.parse().unwrap(), SeqCst);
            }
            if writeln!(to, "{line}").is_err() {
                // Read on: what was announced before the kill counts.
                continue;
            }
        }
    })
}

fn kill_at_random_moments() {
    let root = tempfile::tempdir().unwrap();
    let seed = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut newest_step = 0;
    let mut num_with_debris = 0;
    for round in 0..NUM_KILLS {
        let first_step = newest_step + 1;
        let committed = Arc::new(AtomicU64::new(newest_step));
        let (rank0, stdin0, stdout0) = start(root.path(), 0, first_step);
        let (rank1, stdin1, stdout1) = start(root.path(), 1, first_step);
        let threads = [forward(stdout0, stdin1, Some(committed.clone())), forward(stdout1, stdin0, None)];
        thread::sleep(Duration::from_micros(5_000 + random.below(150_000) as u64));
        let mut ranks = [rank0, rank1];
        if random.below(2) == 1 {
            ranks.reverse();
        }
        for (i, rank) in ranks.iter_mut().enumerate() {
            rank.kill().unwrap();
            let status = rank.wait().unwrap();
            assert!(i > 0 || status.signal() == Some(9), "round {round}: a rank ended by itself: {status}");
            // The survivor meets the loss of its peer for a moment before the launcher would end it.
            thread::sleep(Duration::from_millis(2));
        }
        for thread in threads {
            thread.join().unwrap();
        }

        let announced = committed.load(SeqCst);
        let found = newest_valid(root.path()).unwrap();
        assert!(found.skipped.is_empty(), "round {round}: {:?}", found.skipped);
        newest_step = match found.checkpoint {
            None => 0,
            Some(checkpoint) => {
                let step = checkpoint.manifest().step;
                for state in STATES {
                    for (tensor, (name, shape)) in tensors().iter().enumerate() {
                        let mut out = vec![f32::NAN; numel(shape)];
                        checkpoint.read_f32(state, name, 0, &mut out).unwrap();
                        for (element, got) in out.into_iter().enumerate() {
                            assert_eq!(got, saved_value(step, state, tensor, element), "round {round}");
                        }
                    }
                }
                step
            }
        };
        assert!(newest_step >= announced, "round {round}: step {announced} was announced, {newest_step} is there");
        num_with_debris += usize::from(!sweep(root.path()).unwrap().is_empty());
        let num_names = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(num_names, list(root.path()).unwrap().len(), "round {round}: only whole checkpoints are left");
        assert!(num_names <= KEEP + 1, "round {round}: {num_names} checkpoints");
        // The kill may have come before the deletion, round after round.
        retain(root.path(), KEEP, 0).unwrap();
    }
    assert!(newest_step > 0, "no checkpoint was ever committed");
    println!(
        "kill: {NUM_KILLS}/{NUM_KILLS} loadable, {num_with_debris} in the middle of a save, last step {newest_step}"
    );
}
