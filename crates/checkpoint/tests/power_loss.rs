//! Power is lost at every operation of runs that save and export; each fsync is there for a reason.

use fsdp_checkpoint::faults::power_loss::*;

const SEED: u64 = 12;

/// In memory, as it is written and removed thousands of times.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn a_power_loss_at_any_operation_costs_no_committed_checkpoint() {
    let scratch = scratch();
    let explored = record_saves().explore(SEED, scratch.path(), check_saves).unwrap_or_else(|found| panic!("{found}"));
    println!("{explored:?}");
    assert!(explored.num_operations > 150 && explored.num_states > 1000, "{explored:?}");
}

#[test]
fn no_fsync_of_a_save_can_be_left_out_unnoticed() {
    let scratch = scratch();
    let run = record_saves();
    assert_eq!(run.needless_syncs(SEED, scratch.path(), check_saves), [""; 0]);
    println!("{} fsyncs, each needed", run.fs.syncs().len());
}

#[test]
fn a_power_loss_at_any_operation_leaves_an_exported_model() {
    for can_exchange in [true, false] {
        let (scratch, source) = (scratch(), scratch());
        let run = record_exports(can_exchange, source.path());
        let check = |expected: &Exported, disk: &std::path::Path| check_exports(expected, can_exchange, disk);
        let explored = run.explore(SEED, scratch.path(), check).unwrap_or_else(|found| panic!("{found}"));
        println!("exchange {can_exchange}: {explored:?}, {} fsyncs", run.fs.syncs().len());
        assert_eq!(run.needless_syncs(SEED, scratch.path(), check), [""; 0]);
    }
}
