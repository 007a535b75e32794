//! Checkpoints that were damaged after they were committed: refused with the file's name, and where a run chooses by
//! itself, the one before is taken.

use fastrand::Rng;
use fsdp_checkpoint::faults::damage::{Damage, KINDS, Kind};
use fsdp_checkpoint::sharded::{Checkpoint, newest_valid};
use fsdp_tests_behaviour::job::Job;

use crate::tally::Tally;

/// Six steps of one to three ranks; the checkpoints of steps 2, 4 and 6 stay.
const SAVED: &[&str] =
    &["--set", "training.steps=6", "--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep=3"];
/// The same run goes on so far.
const LONGER: &[&str] =
    &["--set", "training.steps=8", "--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep=3"];

const OLDER: &str = "out/checkpoints/step-00000004";
const NEWEST: &str = "out/checkpoints/step-00000006";

/// How many of the mutations are also put before real runs.
const ONE_RUN_OF: usize = 50;

/// Row 14: `n` random mutations over all files of real checkpoints.
pub fn mutated(tally: &mut Tally, n: usize) {
    let saved = || {
        let job = Job::new();
        job.finish(2, SAVED);
        job
    };
    let jobs = [1, 2, 3].map(|nproc| {
        let job = Job::new();
        job.finish(nproc, SAVED);
        job
    });
    let whole = Job::new();
    whole.finish(2, LONGER);
    let (mut random, mut num_silent, mut num_runs) = (Rng::new(), 0, 0);
    for i in 0..n {
        let (kind, job) = (KINDS[i % KINDS.len()], &jobs[i / KINDS.len() % jobs.len()]);
        let damage = damage(job, kind, &mut random);
        tally.check(format_args!("{}", damage.what), || {
            let refused = Checkpoint::open(&job.path(NEWEST));
            num_silent += usize::from(refused.is_ok());
            let error = refused.expect_err("a damaged checkpoint is loaded");
            assert!(damage.is_named_in(&error.to_string()), "not named: {error}");
            // Another format is no damage, and may be of use to a newer program.
            if error.is_damage() {
                let newest = newest_valid(&job.path("out/checkpoints")).expect("a readable folder");
                assert_eq!(newest.skipped.first().map(|skipped| skipped.step), Some(6));
                assert_eq!(newest.checkpoint.expect("an older one").manifest().step, newest_whole(job));
            }
        });
        damage.undo().expect("a folder of the test");
        if i % ONE_RUN_OF == 0 {
            num_runs += 1;
            let kind = KINDS[fastrand::usize(0..KINDS.len())];
            let job = saved();
            let damage = self::damage(&job, kind, &mut random);
            tally.check(format_args!("before runs: {}", damage.what), || before_runs(&job, &whole, &damage));
        }
    }
    tally.note(format!("{num_silent} silent loads, {num_runs} before real runs"));
}

fn damage(job: &Job, kind: Kind, random: &mut Rng) -> Damage {
    Damage::new(kind, &job.path(NEWEST), &job.path(OLDER), random).expect("a folder of the test")
}

/// The step of the newest checkpoint that a damage to the one of step 6 leaves whole.
fn newest_whole(job: &Job) -> u64 {
    if Checkpoint::open(&job.path(OLDER)).is_ok() { 4 } else { 2 }
}

/// A damaged checkpoint that a person has named is refused; else the one before is taken, loudly, with the bits of a run
/// that met no damage.
fn before_runs(job: &Job, whole: &Job, damage: &Damage) {
    let older = newest_whole(job);
    let is_damage = Checkpoint::open(&job.path(NEWEST)).expect_err("damage").is_damage();
    let ended = job.run(2, &[LONGER, &["--set", &format!("checkpoint.resume={NEWEST}")]].concat());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(damage.is_named_in(&ended.stderr), "not named: {ended:?}");
    assert!(!ended.stderr.contains("resuming after"), "{ended:?}");
    assert!(job.path(NEWEST).is_dir(), "what the person named is left alone");

    let ended = job.run(2, LONGER);
    if !is_damage {
        assert_eq!(ended.status, 2, "{ended:?}");
        assert!(job.path(NEWEST).is_dir(), "what another program may read is left alone");
        return;
    }
    assert_eq!(ended.status, 0, "{ended:?}");
    let loud = ended.stderr.lines().find(|line| line.contains("is damaged and not used"));
    let loud = loud.unwrap_or_else(|| panic!("not told of: {ended:?}"));
    assert!(loud.contains("step-00000006") && damage.is_named_in(loud), "not named: {loud}");
    assert!(ended.stderr.contains(&format!("resuming after step {older} ")), "{ended:?}");
    job.assert_bits_of(whole);
}
