//! The kernels' own conversions between f32, bf16 and f16 against libtorch's.

use fsdp_torch_ext::kernels::{accumulate, rope};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Every value of a 16-bit dtype.
fn all_values(kind: Kind) -> Tensor {
    let bits: Vec<i16> = (0..=u16::MAX).map(|b| b as i16).collect();
    Tensor::from_slice(&bits).view_dtype(kind)
}

#[test]
fn loading_is_exact_for_every_value() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let values = all_values(kind);
        let mut loaded = Tensor::zeros([1 << 16], F32);
        accumulate(&mut loaded, &values, true).unwrap();
        let expected = values.to_kind(Kind::Float);
        assert_eq!(num_different(&loaded, &expected), 0, "{kind:?}");
    }
}

/// Elements that are neither equal nor both NaN.
fn num_different(a: &Tensor, b: &Tensor) -> i64 {
    let same = a.eq_tensor(b).logical_or(&a.isnan().logical_and(&b.isnan()));
    same.logical_not().sum(Kind::Int64).int64_value(&[])
}

/// Rotating by an "angle" of cosine c and sine 0 multiplies by c in f32 and rounds once.
#[test]
fn storing_rounds_to_nearest_even_over_the_whole_range() {
    for kind in [Kind::BFloat16, Kind::Half] {
        // The second half of the one head is zero, so that no infinity is multiplied by sine 0.
        let values = all_values(kind);
        let x = Tensor::cat(&[&values, &values.zeros_like()], 0).view([1, -1]);
        let sine = Tensor::zeros([1, 1 << 16], F32);
        for c in [1.0, -1.0, 1.001, 0.7, 1.0 + 1.0 / 512.0, 1.0 + 1.0 / 4096.0, 1e-3, 1e-6, 37.0, 4e4] {
            let cosine = Tensor::full([1, 1 << 16], c, F32);
            let y = rope(&x, &cosine, &sine, false).unwrap().narrow(1, 0, 1 << 16).view([-1]);
            let expected = (values.to_kind(Kind::Float) * &cosine.view([-1])).to_kind(kind);
            assert_eq!(num_different(&y, &expected), 0, "{kind:?} * {c}");
        }
    }
}
