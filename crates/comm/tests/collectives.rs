//! Every collective of `shm`, with 1 to 4 ranks (`ranks/table.rs`).

mod ranks;

use ranks::{connect, report, run, table};

#[test]
fn collectives_agree_with_a_plain_computation() {
    for world_size in 1..=4 {
        // The digests of what all ranks must agree on; and the same bits when run again.
        let first = run("all", world_size);
        assert!(first.iter().all(|results| results == &first[0] && !results.is_empty()), "ranks differ");
        if world_size == 3 {
            assert_eq!(first, run("all", world_size), "a rerun differs");
        }
    }
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    assert_eq!(ranks::case(), "all");
    report(table::every_collective(&mut connect().unwrap()));
}
