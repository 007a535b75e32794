//! The `released` and `written` conditions, with ranks that drift apart on purpose.
//!
//! Each rank walks over 6 units forward and back, round after round, with 2 slots and 2 gradient buffers as the engine
//! does, and sleeps at random between any two things it does. It looks at a slot's contents when they are whole and once
//! more after a sleep, just before it releases them.
//!
//! Each of the four conditions taken out makes this fail in the first rounds (it was tried). Why without the release: two units after u, a fast rank
//! writes its range of u + 2 into u's slot. A slow rank that sleeps between its two looks then sees u + 2 in the second
//! one, since all ranks' ranges are in one mapping. A barrier after the write does not help, because the write comes
//! before it. The same holds for gradients: without waiting for the peers' release, a fast rank overwrites the gradients
//! of u with those of u - 2 while a slow one still adds up u.

mod ranks;

use ranks::walk::Walk;
use ranks::{connect, run};

#[test]
fn slots_keep_their_contents_while_ranks_drift_apart() {
    for world_size in [2, 3] {
        run("skew", world_size);
    }
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    assert_eq!(ranks::case(), "skew");
    let mut group = connect().unwrap();
    Walk::new(&mut group).unwrap().rounds(&mut group, 120).unwrap();
}
