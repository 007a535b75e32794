//! Tensors on a device over `shm`: the same results as on the host (`ranks/table.rs`), and slots that keep their contents
//! while ranks drift apart (`skew.rs`). Without a GPU the device is the host: other memory, and the same copies. With one,
//! all ranks share it.

mod ranks;

use ranks::walk::Walk;
use ranks::{connect, report, run, table};
use tch::Device;

#[test]
fn collectives_agree_with_a_plain_computation() {
    for world_size in 1..=3 {
        let results = run("all", world_size);
        assert!(results.iter().all(|r| r == &results[0] && !r.is_empty()), "ranks differ");
    }
}

#[test]
fn slots_keep_their_contents_while_ranks_drift_apart() {
    run("skew", 3);
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    let mut group = connect().unwrap().staged(Device::cuda_if_available());
    match ranks::case().as_str() {
        "all" => report(table::every_collective(&mut group)),
        "skew" => Walk::new(&mut group).unwrap().rounds(&mut group, 40).unwrap(),
        other => panic!("no case {other:?}"),
    }
}
