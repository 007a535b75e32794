//! Embedding and head: loss and all gradients, with tokens in several chunks, ignored targets, and narrow dtypes.

use fsdp_model::{Embedding, Head, Segment, unmarked};
use tch::{Device, Kind, Tensor};

use crate::reference::{Random, assert_near, rms_norm};

const EPS: f64 = 1e-5;

/// N tokens, V rows, D columns: one chunk; several, the last one short; one token; more tokens than the largest chunk.
const SIZES: [(i64, i64, i64); 4] = [(5, 30, 8), (150, 70_000, 4), (1, 7, 3), (4100, 11, 4)];

struct Fixture {
    norm: Tensor,    // [D]
    weight: Tensor,  // [V, D]
    x: Tensor,       // [N, D]
    targets: Tensor, // [N]
}

impl Fixture {
    fn new((n, v, d): (i64, i64, i64), weight_kind: Kind, compute: Kind) -> Self {
        tch::set_num_threads(1);
        let mut random = Random::new(2);
        let rounded = |t: Tensor, kind| t.to_kind(kind).to_kind(Kind::Float);
        // Every fourth target is ignored, so that a chunk may begin or end with one.
        let targets: Vec<i64> = (0..n).map(|i| if i % 4 == 3 { -100 } else { i * 7919 % v }).collect();
        Fixture {
            norm: rounded(random.tensor(&[d], 0.3) + 1.0, compute),
            weight: rounded(random.tensor(&[v, d], 0.5), weight_kind),
            x: rounded(random.tensor(&[n, d], 1.0), compute),
            targets: Tensor::from_slice(&targets),
        }
    }

    /// (loss sum, logits, gradients of scale * loss sum for x, norm and weight).
    fn reference(&self, scale: f64) -> (f64, Tensor, Vec<Tensor>) {
        let track = |t: &Tensor| t.detach().copy().set_requires_grad(true);
        let inputs = [track(&self.x), track(&self.norm), track(&self.weight)];
        let logits = rms_norm(&inputs[0], &inputs[1], EPS).matmul(&inputs[2].tr());
        let valid = self.targets.ge(0);
        let picked = logits.log_softmax(-1, Kind::Float).gather(1, &self.targets.clamp_min(0).unsqueeze(1), false);
        let loss = -(picked.squeeze_dim(1) * valid).sum(Kind::Float);
        let grads = fsdp_torch_ext::grad(&[&(&loss * scale)], &inputs.each_ref(), &[], false, false).unwrap();
        (loss.double_value(&[]), logits.detach(), grads.into_iter().map(Option::unwrap).collect())
    }
}

#[test]
fn the_head_agrees_with_autograd_over_any_chunks() {
    for sizes in SIZES {
        for (compute, weight_kind, grad_kind, tolerance) in [
            (Kind::Float, Kind::Float, Kind::Float, 1e-5),
            (Kind::BFloat16, Kind::BFloat16, Kind::Float, 2e-2),
            (Kind::BFloat16, Kind::BFloat16, Kind::BFloat16, 2e-2),
            (Kind::BFloat16, Kind::Float, Kind::Float, 2e-2),
            (Kind::Half, Kind::Half, Kind::Float, 4e-3),
        ] {
            let name = |what: &str| format!("{sizes:?}, {compute:?} with {weight_kind:?}: {what}");
            let fixture = Fixture::new(sizes, weight_kind, compute);
            let scale = 0.37 * 64.0;
            let (loss, logits, expected) = fixture.reference(scale);
            let (norm, weight) = (fixture.norm.to_kind(compute), fixture.weight.to_kind(weight_kind));
            let x = fixture.x.to_kind(compute);
            let unwritten = |t: &Tensor| t.full_like(f64::NAN).to_kind(grad_kind);
            let (norm_grad, weight_grad) = (unwritten(&norm), unwritten(&weight));
            let head = Head::new(sizes.1 as usize, EPS, Device::Cpu);
            let (targets, scale) = (&fixture.targets, Tensor::from(scale));
            let mut seen = vec![];
            let mut mark = |segment| seen.push(segment);
            let got = head
                .loss_and_backward(&norm, &weight, &norm_grad, &weight_grad, &x, targets, &scale, &mut mark)
                .unwrap();
            assert!(seen.starts_with(&[Segment::HeadNorm, Segment::HeadChunk]), "{seen:?}");
            assert_eq!(seen.last(), Some(&Segment::HeadNormBackward));
            let loss_sum = got.loss_sum.double_value(&[]);
            assert!((loss_sum - loss).abs() <= tolerance * loss, "{}: {loss}", name(&loss_sum.to_string()));
            for ((what, got), expected) in
                [("dx", &got.dx), ("norm", &norm_grad), ("weight", &weight_grad)].into_iter().zip(&expected)
            {
                assert_near(&name(what), got, expected, tolerance);
            }
            // Forward alone gives the same bits.
            assert!(head.loss(&norm, &weight, &x, targets).unwrap().equal(&got.loss_sum), "{}", name("loss"));
            if compute == Kind::Float {
                let rows = Tensor::from_slice(&[sizes.0 - 1, 0]);
                let next = head.argmax(&norm, &weight, &x, &rows).unwrap();
                assert!(next.equal(&logits.index_select(0, &rows).argmax(1, false)), "{}", name("argmax"));
            }
        }
    }
}

#[test]
fn without_any_valid_target_loss_and_gradients_are_zero() {
    let fixture = Fixture::new((150, 70_000, 4), Kind::Float, Kind::Float);
    let unwritten = |t: &Tensor| t.full_like(f64::NAN);
    let (norm_grad, weight_grad) = (unwritten(&fixture.norm), unwritten(&fixture.weight));
    let ignored = Tensor::full([150], -100, (Kind::Int64, Device::Cpu));
    let head = Head::new(70_000, EPS, Device::Cpu);
    let (norm, weight, x) = (&fixture.norm, &fixture.weight, &fixture.x);
    let scale = Tensor::from(1.0);
    let got =
        head.loss_and_backward(norm, weight, &norm_grad, &weight_grad, x, &ignored, &scale, &mut unmarked).unwrap();
    assert_eq!(got.loss_sum.double_value(&[]), 0.0);
    for grad in [&got.dx, &norm_grad, &weight_grad] {
        assert_eq!(grad.abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn the_embedding_gathers_rows_and_sums_their_gradients() {
    let mut random = Random::new(3);
    let (v, d) = (12, 5);
    let weight = random.tensor(&[v, d], 1.0);
    // One id often, some never.
    let ids: Vec<i64> = (0..600).map(|i| if i % 3 == 0 { 4 } else { i % 7 }).collect();
    let ids = Tensor::from_slice(&ids);
    let dx = random.tensor(&[600, d], 1.0);
    for (weight_kind, compute) in
        [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::BFloat16), (Kind::Float, Kind::BFloat16)]
    {
        let weight = weight.to_kind(weight_kind);
        let y = Embedding::forward(&weight, &ids, compute).unwrap();
        assert!(y.kind() == compute && y.equal(&weight.index_select(0, &ids).to_kind(compute)));
        let dx = dx.to_kind(compute);
        let expected = Tensor::zeros([v, d], (Kind::Double, Device::Cpu)).index_add(0, &ids, &dx.to_kind(Kind::Double));
        for (grad_kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
            let grad = Tensor::full([v, d], f64::NAN, (grad_kind, Device::Cpu));
            Embedding::backward(&grad, &ids, &dx).unwrap();
            assert_near(&format!("{weight_kind:?} to {grad_kind:?}"), &grad, &expected, tolerance);
        }
    }
}

#[test]
fn ids_and_targets_outside_the_vocabulary_are_errors() {
    let fixture = Fixture::new((5, 30, 8), Kind::Float, Kind::Float);
    for id in [30i64, -1] {
        assert!(Embedding::forward(&fixture.weight, &Tensor::from_slice(&[id]), Kind::Float).is_err());
        let targets = Tensor::from_slice(&[1, 2, id, 3, 4]);
        assert!(Head::new(30, EPS, Device::Cpu).loss(&fixture.norm, &fixture.weight, &fixture.x, &targets).is_err());
    }
}
