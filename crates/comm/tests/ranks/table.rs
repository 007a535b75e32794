//! Every collective, on every type, against a plain computation of the same thing; bit for bit. For any group of a host
//! back end; its tensors are on the group's device.
//!
//! Legend: W world size, n elements a rank.

use fsdp_comm::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp, Segment};
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 5] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64];
/// One element, odd sizes, and (in f64) more than the staging area of `shm` holds at once, 8 chunks of 128 KiB.
const SIZES: [usize; 5] = [1, 7, 1000, 40_001, 140_003];

/// Makes all ranks' calls; a digest of what all must agree on.
pub fn every_collective(group: &mut ProcessGroup) -> u64 {
    let mut digest = Digest(0);
    for kind in KINDS {
        for n in SIZES {
            all_reduce(group, kind, n, &mut digest);
            broadcast(group, kind, n, &mut digest);
            all_gather(group, kind, n, &mut digest);
            reduce_scatter(group, kind, n);
        }
    }
    max_keeps_nan(group);
    many_at_once(group);
    gather_buffers(group, &mut digest);
    reduce_buffers(group);
    no_elements(group);
    bad_tensors(group);
    group.barrier().unwrap();
    digest.0
}

/// A number that depends on rank, place and salt: of both signs, with fractions that f32 sums must round.
fn number(rank: usize, i: usize, salt: u64) -> f64 {
    let mut x =
        (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64).wrapping_mul(0xd1b5_4a32_d192_ed03) ^ salt;
    x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as f64 - (1u64 << 23) as f64) / 4096.0
}

/// [n] of `kind`, as this test makes it for a rank.
fn input(kind: Kind, rank: usize, n: usize, salt: u64) -> Tensor {
    let numbers: Vec<f64> = (0..n).map(|i| number(rank, i, salt)).collect();
    Tensor::from_slice(&numbers).to_kind(kind)
}

/// The elements combined in order of rank, in f32 for the narrow types, rounded once.
fn combined(kind: Kind, inputs: &[Tensor], op: ReduceOp) -> Tensor {
    let wide = if matches!(kind, Kind::BFloat16 | Kind::Half) { Kind::Float } else { kind };
    let mut sum = inputs[0].to_kind(wide);
    for input in &inputs[1..] {
        sum = match op {
            ReduceOp::Sum => sum + input.to_kind(wide),
            ReduceOp::Max => sum.maximum(&input.to_kind(wide)),
        };
    }
    sum.to_kind(kind)
}

/// What all ranks have, on the CPU.
fn inputs(group: &ProcessGroup, kind: Kind, n: usize, salt: u64) -> Vec<Tensor> {
    (0..group.world_size()).map(|rank| input(kind, rank, n, salt)).collect()
}

/// A copy of this rank's input on the group's device.
fn own(group: &ProcessGroup, inputs: &[Tensor]) -> Tensor {
    inputs[group.rank()].to_device(group.device()).copy()
}

fn zeros(group: &ProcessGroup, kind: Kind, n: usize) -> Tensor {
    Tensor::zeros([n as i64], (kind, group.device()))
}

#[track_caller]
fn assert_same(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((got.kind(), got.numel()), (expected.kind(), expected.numel()), "{what}");
    assert!(bytes(got) == bytes(expected), "{what}: {:?} differs", got.kind());
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.to_device(Device::Cpu).contiguous().view([-1]);
    let mut bytes = vec![0; flat.numel() * flat.kind().elt_size_in_bytes()];
    flat.copy_data_u8(&mut bytes, flat.numel());
    bytes
}

/// FNV-1a over what all ranks must agree on.
struct Digest(u64);

impl Digest {
    fn add(&mut self, tensor: &Tensor) {
        for byte in bytes(tensor) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn all_reduce(group: &mut ProcessGroup, kind: Kind, n: usize, digest: &mut Digest) {
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        let inputs = inputs(group, kind, n, 1);
        let tensor = own(group, &inputs);
        group.all_reduce(&tensor, op).unwrap();
        assert_same(&tensor, &combined(kind, &inputs, op), "all_reduce");
        digest.add(&tensor);
    }
}

fn broadcast(group: &mut ProcessGroup, kind: Kind, n: usize, digest: &mut Digest) {
    let root = n % group.world_size();
    let inputs = inputs(group, kind, n, 2);
    let tensor = own(group, &inputs);
    group.broadcast(&tensor, root).unwrap();
    assert_same(&tensor, &inputs[root], "broadcast");
    digest.add(&tensor);
}

fn all_gather(group: &mut ProcessGroup, kind: Kind, n: usize, digest: &mut Digest) {
    let inputs = inputs(group, kind, n, 3);
    let out = zeros(group, kind, group.world_size() * n);
    group.all_gather_into_tensor(&out, &own(group, &inputs)).unwrap();
    assert_same(&out, &Tensor::cat(&inputs, 0), "all_gather_into_tensor");
    digest.add(&out);
}

fn reduce_scatter(group: &mut ProcessGroup, kind: Kind, n: usize) {
    let inputs = inputs(group, kind, n * group.world_size(), 4);
    let out = zeros(group, kind, n);
    group.reduce_scatter_tensor(&out, &own(group, &inputs)).unwrap();
    let sum = combined(kind, &inputs, ReduceOp::Sum);
    assert_same(&out, &sum.narrow(0, (group.rank() * n) as i64, n as i64), "reduce_scatter_tensor");
}

/// More started collectives than the staging area has slots, one of many chunks among them, waited for out of order.
fn many_at_once(group: &mut ProcessGroup) {
    let sizes = [3, 500_000, 1, 40_000].repeat(6);
    let inputs: Vec<Vec<Tensor>> =
        sizes.iter().enumerate().map(|(i, &n)| inputs(group, Kind::Float, n, 100 + i as u64)).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(|inputs| own(group, inputs)).collect();
    let mut works: Vec<_> = tensors.iter().map(|t| group.start_all_reduce(t, ReduceOp::Sum).unwrap()).collect();
    let middle = works.remove(13);
    group.wait(middle).unwrap();
    for work in works {
        group.wait(work).unwrap();
    }
    for (tensor, inputs) in tensors.iter().zip(&inputs) {
        assert_same(tensor, &combined(Kind::Float, inputs, ReduceOp::Sum), "started all_reduce");
    }
}

/// Two segments of different kinds, in a buffer that is used three times.
fn gather_buffers(group: &mut ProcessGroup, digest: &mut Digest) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let n = 1000;
    let mut buffer: GatherBuffer = group.new_gather_buffer("slot", world_size * n * 6).unwrap();
    let segments = [
        Segment { kind: Kind::Float, offset_bytes: 0, numel: world_size * n },
        Segment { kind: Kind::BFloat16, offset_bytes: world_size * n * 4, numel: world_size * n },
    ];
    for salt in 10..13 {
        group.begin_write(&mut buffer, "unit").unwrap();
        for s in segments {
            let own_offset_bytes = s.offset_bytes + rank * n * s.kind.elt_size_in_bytes();
            buffer.view(s.kind, own_offset_bytes, n).copy_(&input(s.kind, rank, n, salt));
        }
        group.start_all_gather(&mut buffer, &segments, "unit").unwrap();
        group.wait_all_gather(&mut buffer).unwrap();
        for s in segments {
            let whole = buffer.view(s.kind, s.offset_bytes, s.numel);
            assert_same(&whole, &Tensor::cat(&inputs(group, s.kind, n, salt), 0), "all-gather in a buffer");
            digest.add(&whole);
        }
        group.release(&mut buffer).unwrap();
    }
}

/// Each kind of gradient, overwritten and accumulated, on more elements than a block and one that is not a multiple.
fn reduce_buffers(group: &mut ProcessGroup) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let (n, small) = (5001, 64);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let element = kind.elt_size_in_bytes();
        let mut buffer: ReduceBuffer =
            group.new_reduce_buffer("grads", world_size * (n * element + small * 4)).unwrap();
        let segments = [
            Segment { kind: Kind::Float, offset_bytes: 0, numel: world_size * small },
            Segment { kind, offset_bytes: world_size * small * 4, numel: world_size * n },
        ];
        let out: Vec<Tensor> = segments.iter().map(|s| zeros(group, Kind::Float, s.numel / world_size)).collect();
        let mut expected: Vec<Tensor> = out.iter().map(|out| out.to_device(Device::Cpu).copy()).collect();
        for (salt, accumulate) in [(20, false), (21, true), (22, true), (23, false)] {
            group.begin_reduce(&mut buffer, "unit").unwrap();
            for s in segments {
                buffer.view(s.kind, s.offset_bytes, s.numel).copy_(&input(s.kind, rank, s.numel, salt));
            }
            group.start_reduce_scatter(&mut buffer, &segments, "unit").unwrap();
            group.wait_reduce_scatter(&mut buffer, &out.iter().collect::<Vec<_>>(), accumulate).unwrap();
            for ((s, out), expected) in segments.iter().zip(&out).zip(&mut expected) {
                let inputs = inputs(group, s.kind, s.numel, salt);
                let wide = || inputs.iter().map(|t| t.to_kind(Kind::Float)).collect::<Vec<_>>();
                let sum = match group {
                    // In the type of the segment.
                    ProcessGroup::Nccl(_) => combined(s.kind, &inputs, ReduceOp::Sum).to_kind(Kind::Float),
                    _ => combined(Kind::Float, &wide(), ReduceOp::Sum),
                };
                let n = (s.numel / world_size) as i64;
                let sum = sum.narrow(0, rank as i64 * n, n);
                *expected = if accumulate { &*expected + sum } else { sum };
                assert_same(out, expected, "reduce-scatter from a buffer");
            }
        }
    }
}

fn no_elements(group: &mut ProcessGroup) {
    let nothing = zeros(group, Kind::Float, 0);
    group.all_reduce(&nothing, ReduceOp::Sum).unwrap();
    group.broadcast(&nothing, 0).unwrap();
    group.all_gather_into_tensor(&nothing, &nothing).unwrap();
    let mut buffer = group.new_gather_buffer("empty", 0).unwrap();
    group.begin_write(&mut buffer, "unit").unwrap();
    group.start_all_gather(&mut buffer, &[], "unit").unwrap();
    group.wait_all_gather(&mut buffer).unwrap();
    group.release(&mut buffer).unwrap();
}

/// What does not fit is an error on the rank that asks, before anything is sent: the group goes on.
fn bad_tensors(group: &mut ProcessGroup) {
    let device = group.device();
    let f32s = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device));
    let world_size = group.world_size() as i64;
    let cases = [
        group.all_reduce(&f32s(&[2, 3]).transpose(0, 1), ReduceOp::Sum),
        group.all_reduce(&f32s(&[2]).to_kind(Kind::Int), ReduceOp::Sum),
        group.all_gather_into_tensor(&f32s(&[world_size * 2 + 1]), &f32s(&[2])),
        group.all_gather_into_tensor(&f32s(&[world_size * 2]).to_kind(Kind::Half), &f32s(&[2])),
        group.reduce_scatter_tensor(&f32s(&[2]), &f32s(&[world_size * 2 - 1])),
    ];
    for result in cases {
        assert!(matches!(result, Err(CommError::BadTensor { .. })), "{result:?}");
    }
}

/// NaN wins over every number, whichever rank has it.
fn max_keeps_nan(group: &mut ProcessGroup) {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
        for owner in 0..group.world_size() {
            let value = if group.rank() == owner { f64::NAN } else { 1.0 };
            let tensor = Tensor::from_slice(&[value, f64::INFINITY]).to_kind(kind).to_device(group.device());
            group.all_reduce(&tensor, ReduceOp::Max).unwrap();
            assert!(tensor.double_value(&[0]).is_nan() && tensor.double_value(&[1]) == f64::INFINITY, "{kind:?}");
        }
    }
}
