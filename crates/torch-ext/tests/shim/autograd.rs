use fsdp_torch_ext::grad;
use tch::{Device, Kind, Tensor, no_grad};

use crate::close::assert_same;
use crate::seeded;

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

#[test]
fn grad_is_the_product_of_grad_outputs_and_the_jacobian() {
    let x = Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true);
    let y = Tensor::from_slice(&[4f32, 5.0, 6.0]).set_requires_grad(true);
    let unused = Tensor::zeros([2], F32).set_requires_grad(true);
    let (product, square) = (&x * &y, x.square());
    let (g_product, g_square) = (Tensor::from_slice(&[1f32, 10.0, 100.0]), Tensor::from_slice(&[1f32, 1.0, 0.5]));

    let grads = grad(&[&product, &square], &[&x, &y, &unused], &[&g_product, &g_square], true, true).unwrap();
    let expected_x = &g_product * y.detach() + &g_square * 2.0 * x.detach();
    assert_same(grads[0].as_ref().unwrap(), &expected_x, "x");
    assert_same(grads[1].as_ref().unwrap(), &(&g_product * x.detach()), "y");
    assert!(grads[2].is_none());
    assert!(!x.grad().defined(), "nothing is accumulated");

    // The graph was retained: the same again; then it is gone.
    grad(&[&product], &[&x], &[&g_product], false, false).unwrap();
    let gone = grad(&[&product], &[&x], &[&g_product], false, false).unwrap_err();
    assert!(gone.message.contains("backward through the graph a second time"), "{gone}");
}

#[test]
fn what_autograd_refuses_is_an_error_of_one_line() {
    let _guard = seeded(13);
    let x = Tensor::ones([3], F32).set_requires_grad(true);
    let plain = Tensor::ones([3], F32);
    let y = &x * 2.0;
    let other = Tensor::ones([1], F32).set_requires_grad(true);
    let table = [
        ("no graph", grad(&[&plain], &[&x], &[&plain], false, false), "does not require grad"),
        ("wrong shape", grad(&[&y], &[&x], &[&Tensor::ones([4], F32)], true, false), "shape"),
        ("unused", grad(&[&y], &[&other], &[&plain], true, false), "not have been used"),
        ("not a scalar", grad(&[&y], &[&x], &[], true, false), "scalar outputs"),
        ("missing grad_output", grad(&[&y, &y], &[&x], &[&plain], true, false), "grad"),
    ];
    for (what, result, part) in table {
        let error = result.expect_err(what);
        assert_eq!(error.op, "grad");
        assert!(error.message.contains(part), "{what}: {error}");
        assert!(!error.message.contains('\n') && !error.message.contains("frame #"), "{what}: {error}");
    }
}

/// Units of the slot test: h -> tanh(h w), with weights in slots.
const UNITS: usize = 4;
const SLOTS: usize = 2;
const WIDTH: i64 = 8;

fn weights() -> Vec<Tensor> {
    (0..UNITS).map(|_| Tensor::randn([WIDTH, WIDTH], F32)).collect()
}

#[test]
fn views_of_slots_are_valid_again_when_the_slot_is_refilled() {
    let _guard = seeded(14);
    let (weights, x) = (weights(), Tensor::randn([5, WIDTH], F32));
    let g = Tensor::randn([5, WIDTH], F32);

    // Each unit has memory of its own.
    let leaves: Vec<_> = weights.iter().map(|w| w.copy().set_requires_grad(true)).collect();
    let out = leaves.iter().fold(x.shallow_clone(), |h, w| h.matmul(w).tanh());
    let inputs: Vec<_> = leaves.iter().collect();
    let expected = grad(&[&out], &inputs, &[&g], false, false).unwrap();

    // The same over two slots; the graph of each unit is kept.
    let slots: Vec<_> = (0..SLOTS).map(|_| Tensor::zeros([WIDTH * WIDTH], F32)).collect();
    let fill = |u: usize| slots[u % SLOTS].data().copy_(&weights[u].view([-1]));
    let poison = |u: usize| {
        let _ = slots[u % SLOTS].data().fill_(f64::NAN);
    };
    let leaves: Vec<_> =
        (0..UNITS).map(|u| slots[u % SLOTS].data().view([WIDTH, WIDTH]).set_requires_grad(true)).collect();
    let (mut inputs, mut outputs) = (vec![], vec![]);
    let mut h = x;
    for (u, leaf) in leaves.iter().enumerate() {
        fill(u);
        let input = h.detach().set_requires_grad(true);
        let output = input.matmul(leaf).tanh();
        h = output.detach();
        inputs.push(input);
        outputs.push(output);
        poison(u);
    }
    assert_same(&h, &out.detach(), "forward");
    let mut g = g;
    for u in (0..UNITS).rev() {
        fill(u);
        let grads = grad(&[&outputs[u]], &[&leaves[u], &inputs[u]], &[&g], false, false).unwrap();
        assert_same(grads[0].as_ref().unwrap(), expected[u].as_ref().unwrap(), &format!("unit {u}"));
        g = grads[1].as_ref().unwrap().shallow_clone();
        poison(u);
    }
}

#[test]
fn data_has_a_version_counter_of_its_own_and_detach_has_not() {
    for own_counter in [true, false] {
        let slot = Tensor::ones([3, 3], F32);
        let x = Tensor::ones([3, 3], F32).set_requires_grad(true);
        let y = x.matmul(&slot);
        let mut alias = if own_counter { slot.data() } else { slot.detach() };
        let _ = no_grad(|| alias.fill_(7.0));
        assert_eq!(slot.double_value(&[0, 0]), 7.0, "same memory");
        let result = grad(&[&y], &[&x], &[&y.ones_like()], false, false);
        match result {
            Ok(grads) if own_counter => assert_eq!(grads[0].as_ref().unwrap().double_value(&[0, 0]), 21.0),
            Err(error) if !own_counter => assert!(error.message.contains("inplace operation"), "{error}"),
            other => panic!("own counter {own_counter}: {other:?}"),
        }
    }
}
