//! Random weights: element i of a tensor depends on (seed, name, i) only, so any rank makes any range of it.

use fsdp_plan::Init;

/// Fills `out` with elements `start..` of the flattened tensor `name`, on `num_threads` threads.
pub fn fill(seed: u64, name: &str, init: Init, start: usize, out: &mut [f32], num_threads: usize) {
    /// Less is not worth a thread.
    const MIN_CHUNK: usize = 1 << 16;
    match init {
        Init::Zeros => out.fill(0.0),
        Init::Ones => out.fill(1.0),
        Init::Normal { std } => {
            let key = name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
            let chunk = out.len().div_ceil(num_threads).max(MIN_CHUNK);
            std::thread::scope(|scope| {
                for (i, part) in out.chunks_mut(chunk).enumerate() {
                    let mut fill = move || fill_normal(key, std as f32, start + i * chunk, part);
                    if num_threads > 1 { drop(scope.spawn(fill)) } else { fill() }
                }
            });
        }
    }
}

fn fill_normal(key: u64, std: f32, start: usize, out: &mut [f32]) {
    let mut pair = (f32::NAN, f32::NAN);
    for (i, value) in out.iter_mut().enumerate() {
        let index = start + i;
        let is_first = index.is_multiple_of(2);
        if i == 0 || is_first {
            pair = normal_pair(key, index as u64 / 2);
        }
        *value = std * if is_first { pair.0 } else { pair.1 };
    }
}

/// Two independent standard normal numbers by the Box-Muller transform of two uniform ones, the halves of one hash.
fn normal_pair(key: u64, index: u64) -> (f32, f32) {
    let bits = mix(key ^ mix(index));
    let radius = (-2.0 * uniform(bits >> 32).ln()).sqrt();
    let (sin, cos) = (std::f32::consts::TAU * uniform(bits & 0xFFFF_FFFF)).sin_cos();
    (radius * cos, radius * sin)
}

/// 32 random bits -> a number above 0, at most 1.
fn uniform(bits: u64) -> f32 {
    (bits + 1) as f32 * (1.0 / (1u64 << 32) as f32)
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbouring inputs.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_has_the_same_elements() {
        let init = Init::Normal { std: 0.02 };
        let mut whole = vec![0.0; 1_000_001];
        fill(7, "model.embed_tokens.weight", init, 0, &mut whole, 1);
        let mut threaded = whole.clone();
        for num_threads in [2, 3, 16] {
            threaded.fill(0.0);
            fill(7, "model.embed_tokens.weight", init, 0, &mut threaded, num_threads);
            assert!(threaded == whole, "{num_threads} threads");
        }
        let mut part = vec![0.0; 100];
        for start in [450, 451] {
            fill(7, "model.embed_tokens.weight", init, start, &mut part, 1);
            assert_eq!(part, whole[start..start + 100]);
        }
        let mut other = vec![0.0; 100];
        fill(7, "lm_head.weight", init, 450, &mut other, 1);
        assert_ne!(other, part);
    }

    #[test]
    fn has_the_moments_of_a_normal_distribution() {
        let mut values = vec![0.0f32; 200_000];
        fill(1, "w", Init::Normal { std: 2.0 }, 0, &mut values, 1);
        let moment = |k: i32| values.iter().map(|v| f64::from(*v / 2.0).powi(k)).sum::<f64>() / values.len() as f64;
        // Standard errors: 0.0022, 0.0032, 0.022.
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.015, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "{}", moment(4));
    }
}
