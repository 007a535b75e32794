use fsdp_torch_ext::{accelerator, pinned};
use tch::{Device, Kind, Tensor};

use crate::close::assert_same;

#[test]
fn host_memory_is_there_with_and_without_an_accelerator() {
    for kind in [Kind::Int64, Kind::BFloat16, Kind::Float] {
        let mut t = pinned::empty(&[3, 5], kind).unwrap();
        assert_eq!((t.size(), t.kind(), t.device()), (vec![3, 5], kind, Device::Cpu));
        // libtorch can only tell where there is an accelerator.
        assert!(!accelerator::is_available() || t.is_pinned(Device::Cuda(0)));
        let src = Tensor::arange(15, (Kind::Float, Device::Cpu)).view([3, 5]);
        pinned::copy_non_blocking(&mut t, &src).unwrap();
        assert_same(&t, &src.to_kind(kind), "copied and cast");
    }
    assert_eq!(pinned::empty(&[0, 4], Kind::Float).unwrap().numel(), 0);
    let error = pinned::empty(&[-1], Kind::Float).unwrap_err();
    assert!(error.op == "pinned::empty" && error.message.contains("negative"), "{error}");
    let mut short = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    let error = pinned::copy_non_blocking(&mut short, &Tensor::zeros([3], (Kind::Float, Device::Cpu))).unwrap_err();
    assert!(error.message.contains("size of tensor"), "{error}");
}
