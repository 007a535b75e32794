//! Which rank gets which sample when: free of the number of ranks, each sample once an epoch, resumable anywhere.

mod common;

use std::collections::BTreeSet;

use common::{Folder, numbered};
use fsdp_data::{DataSpec, Dataset, Loader, MicroBatch, Position};
use proptest::prelude::*;

const MASKED: i64 = -1;

/// The samples of a microbatch, by their first token.
fn samples(batch: &MicroBatch) -> Vec<i64> {
    let row = |b: usize| b * batch.seq_len;
    (0..batch.batch).map(|b| if batch.targets[row(b)] == -100 { MASKED } else { batch.input_ids[row(b)] }).collect()
}

/// The loaders of all ranks over a file of `num_samples` samples.
fn ranks(
    num_samples: u64,
    shuffle: bool,
    seed: u64,
    world_size: usize,
    batch: usize,
    accumulation: usize,
) -> Vec<Loader> {
    let folder = Folder::new();
    let spec = numbered(&folder, num_samples, shuffle, seed);
    (0..world_size)
        .map(|rank| Loader::new(Dataset::open(&spec).unwrap(), rank, world_size, batch, accumulation))
        .collect()
}

/// The next step's samples in the global order: microbatch by microbatch, rank by rank.
fn global_step(ranks: &mut [Loader]) -> Vec<i64> {
    let steps: Vec<Vec<MicroBatch>> = ranks.iter_mut().map(|rank| rank.next_step().unwrap()).collect();
    assert!(ranks.iter().all(|rank| rank.position() == ranks[0].position()));
    (0..steps[0].len()).flat_map(|m| steps.iter().flat_map(move |rank| samples(&rank[m]))).collect()
}

fn epoch(ranks: &mut [Loader]) -> Vec<i64> {
    (0..ranks[0].steps_per_epoch()).flat_map(|_| global_step(ranks)).collect()
}

#[test]
fn without_shuffling_ranks_share_the_lines_in_file_order() {
    let mut ranks = ranks(20, false, 0, 2, 2, 2);
    let step: Vec<Vec<Vec<i64>>> =
        ranks.iter_mut().map(|rank| rank.next_step().unwrap().iter().map(samples).collect()).collect();
    assert_eq!(step, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]);
    assert_eq!(global_step(&mut ranks), [8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(ranks[0].position(), Position { epoch: 0, sample: 16 });
    // The epoch's last step is filled with masked sequences, on every rank as many microbatches as ever.
    assert_eq!(global_step(&mut ranks), [16, 17, 18, 19, MASKED, MASKED, MASKED, MASKED]);
    assert_eq!(ranks[0].position(), Position { epoch: 1, sample: 0 });
    assert_eq!(global_step(&mut ranks), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn a_masked_sequence_is_padding_without_targets() {
    let batch = ranks(1, false, 0, 1, 2, 1)[0].next_step().unwrap().remove(0);
    assert_eq!((batch.input_ids, batch.targets), (vec![0; 4], vec![0, -100, -100, -100]));
    assert_eq!(batch.num_valid_tokens, 1);
}

#[test]
fn the_shuffled_order_is_pinned() {
    // A change of the generator would silently break the resumption of saved runs.
    let mut ranks = ranks(12, true, 42, 1, 12, 1);
    assert_eq!(global_step(&mut ranks), PINNED_EPOCH_0);
    assert_eq!(global_step(&mut ranks), PINNED_EPOCH_1);
}

const PINNED_EPOCH_0: [i64; 12] = [11, 5, 6, 1, 9, 10, 3, 4, 7, 0, 2, 8];
const PINNED_EPOCH_1: [i64; 12] = [2, 4, 0, 6, 9, 3, 8, 1, 11, 10, 5, 7];

#[test]
fn shuffling_is_even() {
    // Over many seeds, each sample must come first, in the middle and last about equally often.
    let (num_samples, num_seeds) = (8, 4_000);
    let folder = Folder::new();
    let spec = numbered(&folder, num_samples, true, 0);
    let mut counts = [[0_u32; 8]; 8];
    for seed in 0..num_seeds {
        let spec = DataSpec { seed, ..spec.clone() };
        let mut loader = Loader::new(Dataset::open(&spec).unwrap(), 0, 1, 8, 1);
        for (place, sample) in samples(&loader.next_step().unwrap()[0]).into_iter().enumerate() {
            counts[place][sample as usize] += 1;
        }
    }
    // Expected 500 each, standard deviation 21.
    for count in counts.concat() {
        assert!((390..=610).contains(&count), "{counts:?}");
    }
}

#[test]
fn a_position_outside_the_data_is_refused() {
    let mut loader = ranks(5, false, 0, 1, 2, 1).remove(0);
    let error = loader.seek(Position { epoch: 0, sample: 5 }).unwrap_err();
    assert!(error.to_string().contains("sample 5 of an epoch: the data has only 5 samples"), "{error}");
    assert_eq!(loader.position(), Position { epoch: 0, sample: 0 });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_epoch_has_each_sample_once(
        num_samples in 1_u64..60, shuffle: bool, seed: u64, world_size in 1_usize..5, batch in 1_usize..4, accumulation in 1_usize..4
    ) {
        let mut ranks = ranks(num_samples, shuffle, seed, world_size, batch, accumulation);
        let first = epoch(&mut ranks);
        let second = epoch(&mut ranks);
        for order in [&first, &second] {
            let real: Vec<i64> = order.iter().copied().filter(|s| *s != MASKED).collect();
            prop_assert_eq!(real.len() as u64, num_samples);
            prop_assert_eq!(real.iter().copied().collect::<BTreeSet<_>>().len() as u64, num_samples);
            // All masked sequences come at the end.
            prop_assert!(order[real.len()..].iter().all(|s| *s == MASKED));
        }
        prop_assert_eq!(ranks[0].position(), Position { epoch: 2, sample: 0 });
        if !shuffle {
            prop_assert_eq!(&first, &second);
        } else if num_samples > 12 {
            prop_assert_ne!(&first, &second);
        }
    }

    #[test]
    fn the_order_does_not_depend_on_the_number_of_ranks(num_samples in 1_u64..60, shuffle: bool, seed: u64) {
        // (world size, sequences, accumulation) of the same global batch
        let orders: Vec<Vec<i64>> = [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]
            .into_iter()
            .map(|(world_size, batch, accumulation)| {
                let mut ranks = ranks(num_samples, shuffle, seed, world_size, batch, accumulation);
                let mut order = epoch(&mut ranks);
                order.extend(epoch(&mut ranks));
                order
            })
            .collect();
        for order in &orders[1..] {
            prop_assert_eq!(order, &orders[0]);
        }
    }

    #[test]
    fn seeking_continues_exactly(
        num_samples in 1_u64..40, shuffle: bool, seed: u64, num_steps in 0_u64..30, other_world_size: bool
    ) {
        let mut unbroken = ranks(num_samples, shuffle, seed, 2, 2, 1);
        for _ in 0..num_steps {
            global_step(&mut unbroken);
        }
        let saved = serde_json::to_string(&unbroken[0].position()).unwrap();
        let position: Position = serde_json::from_str(&saved).unwrap();
        let (world_size, batch) = if other_world_size { (4, 1) } else { (2, 2) };
        let mut resumed = ranks(num_samples, shuffle, seed, world_size, batch, 1);
        for rank in &mut resumed {
            rank.seek(position).unwrap();
        }
        for _ in 0..12 {
            prop_assert_eq!(global_step(&mut resumed), global_step(&mut unbroken));
        }
    }
}
