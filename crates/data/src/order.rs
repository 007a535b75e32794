//! The order of samples in an epoch.

/// Samples in the order in which an epoch takes them.
#[derive(Debug)]
pub(crate) enum EpochOrder {
    File,
    Shuffled(Vec<u64>),
}

impl EpochOrder {
    /// A permutation that depends on (seed, epoch, num_samples) alone, by Fisher and Yates.
    pub(crate) fn shuffled(seed: u64, epoch: u64, num_samples: u64) -> Self {
        let mut samples: Vec<u64> = (0..num_samples).collect();
        let key = mix(mix(seed).wrapping_add(epoch));
        for i in (1..samples.len()).rev() {
            samples.swap(i, below(key, i as u64, i as u64 + 1) as usize);
        }
        EpochOrder::Shuffled(samples)
    }

    pub(crate) fn sample(&self, index: u64) -> u64 {
        match self {
            EpochOrder::File => index,
            EpochOrder::Shuffled(samples) => samples[index as usize],
        }
    }
}

/// Number `counter` of the stream `key`, in 0..bound. The product's high half is uneven by at most bound / 2^64.
fn below(key: u64, counter: u64, bound: u64) -> u64 {
    let random = mix(key ^ mix(counter));
    ((u128::from(random) * u128::from(bound)) >> 64) as u64
}

/// The finaliser of splitmix64 after its step: a bijection of u64 whose outputs look random.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
