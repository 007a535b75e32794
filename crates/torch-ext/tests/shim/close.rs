use tch::{Kind, Tensor};

/// Asserts `|actual - expected| <= tolerance * max(1, |expected|)` for each element, in f64.
pub fn assert_close(actual: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(actual.size(), expected.size(), "{what}");
    let (actual, expected) = (actual.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let error = (&actual - &expected).abs() / expected.abs().clamp_min(1.0);
    let worst = if error.numel() == 0 { 0.0 } else { error.max().double_value(&[]) };
    assert!(worst <= tolerance, "{what}: off by {worst:e}, tolerance {tolerance:e}");
}

/// Asserts the same elements, bit for bit.
pub fn assert_same(actual: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((actual.kind(), actual.size()), (expected.kind(), expected.size()), "{what}");
    assert!(actual.equal(expected), "{what}: {actual:?} differs");
}
