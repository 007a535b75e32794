use fsdp_torch_ext::{with_f32_slice, with_f32_slice_mut};
use tch::{Device, Kind, Tensor};

#[test]
fn slices_are_the_tensors_memory() {
    let t = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([2, 2]);
    assert_eq!(with_f32_slice(&t, <[f32]>::to_vec).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    with_f32_slice_mut(&mut t.get(1), |row| row.fill(9.0)).unwrap();
    assert_eq!(Vec::<f32>::try_from(t.view([-1])).unwrap(), [1.0, 2.0, 9.0, 9.0]);

    let mut empty = Tensor::zeros([0, 4], (Kind::Float, Device::Cpu));
    assert_eq!(with_f32_slice(&empty, <[f32]>::len).unwrap(), 0);
    assert_eq!(with_f32_slice_mut(&mut empty, |s| s.len()).unwrap(), 0);
}

#[test]
fn a_tensor_that_is_no_plain_array_is_an_error() {
    let t = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
    let table = [
        ("strides", with_f32_slice(&t.transpose(0, 1), |_| ()), "contiguous"),
        ("columns", with_f32_slice_mut(&mut t.narrow(1, 0, 3), |_| ()), "contiguous"),
        ("dtype", with_f32_slice(&t.to_kind(Kind::Half), |_| ()), "Half"),
        ("sparse", with_f32_slice(&t.to_sparse(None::<tch::Layout>, None::<&[i64]>, None), |_| ()), "dense"),
        ("undefined", with_f32_slice(&Tensor::new(), |_| ()), "undefined"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert!(error.message.contains(part), "{what}: {error}");
    }
}
