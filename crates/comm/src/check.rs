//! What collectives ask of the tensors and segments that they are given.

use fsdp_control::progress::Op;
use tch::{Device, Kind, Tensor};

use crate::sum::{element_bytes, kind_code};
use crate::{CommError, Segment};

/// A tensor that a collective can work on: contiguous, on the group's device, of a known kind and of `numel` elements.
pub(crate) fn check_tensor(op: Op, tensor: &Tensor, numel: usize, kind: Kind, device: Device) -> Result<(), CommError> {
    let bad = |expected: String, got: String| Err(CommError::BadTensor { op, expected, got });
    if kind_code(tensor.kind()) == 0 {
        return bad("f32, f64, bf16, f16 or i64".into(), format!("{:?}", tensor.kind()));
    }
    if tensor.kind() != kind {
        return bad(format!("{kind:?} as the other tensor"), format!("{:?}", tensor.kind()));
    }
    if tensor.device() != device || !tensor.is_contiguous() {
        let got = format!("{:?}, strides {:?}", tensor.device(), tensor.stride());
        return bad(format!("a contiguous tensor on {device:?}"), got);
    }
    if tensor.numel() != numel {
        return bad(format!("{numel} elements"), format!("{} elements {:?}", tensor.numel(), tensor.size()));
    }
    Ok(())
}

/// The output of a reduce-scatter.
///
/// # Panics
/// It is not `numel` contiguous f32 on the group's device.
pub(crate) fn check_out(out: &Tensor, numel: usize, device: Device) {
    let fits = out.kind() == Kind::Float && out.device() == device && out.is_contiguous() && out.numel() == numel;
    let got = format!("{:?} of {:?} on {:?}", out.kind(), out.size(), out.device());
    assert!(fits, "the output is {got}, not {numel} contiguous f32 on {device:?}");
}

/// Checks segments against a buffer's length, and sums them up: their kind if it is one, their bytes.
///
/// # Panics
/// A segment is outside of the buffer or not aligned, or its elements do not divide by the ranks.
pub(crate) fn check_segments(len_bytes: usize, segments: &[Segment], world_size: usize) -> (Option<Kind>, usize) {
    let mut num_bytes = 0;
    for segment in segments {
        check_range(len_bytes, segment.kind, segment.offset_bytes, segment.numel);
        assert!(segment.numel.is_multiple_of(world_size), "{segment:?} is not for {world_size} ranks");
        num_bytes += segment.numel * element_bytes(segment.kind);
    }
    let kind = segments.first().map(|s| s.kind).filter(|kind| segments.iter().all(|s| s.kind == *kind));
    (kind, num_bytes)
}

/// # Panics
/// So many elements are not inside of a buffer of `len_bytes` bytes, or not aligned in it.
pub(crate) fn check_range(len_bytes: usize, kind: Kind, offset_bytes: usize, numel: usize) {
    let element = element_bytes(kind);
    let end = numel.checked_mul(element).and_then(|n| n.checked_add(offset_bytes));
    assert!(
        end.is_some_and(|end| end <= len_bytes) && offset_bytes.is_multiple_of(element),
        "{numel} elements of {kind:?} at byte {offset_bytes} of a buffer of {len_bytes} bytes"
    );
}

pub(crate) fn num_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * element_bytes(tensor.kind())
}
