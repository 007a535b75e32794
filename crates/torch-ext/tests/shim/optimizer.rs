use fsdp_torch_ext::{AdamW, TorchError, foreach_norm, fused_adamw};
use tch::{Device, Kind, Tensor};

use crate::close::{assert_close, assert_same};
use crate::seeded;

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const HP: AdamW = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

/// Param, exp_avg, exp_avg_sq.
type State = [Tensor; 3];

fn state(n: i64) -> State {
    [Tensor::randn([n], F32), Tensor::zeros([n], F32), Tensor::zeros([n], F32)]
}

fn copy(s: &State) -> State {
    s.each_ref().map(|t| t.copy())
}

fn step(states: &[State], grads: &[Tensor], t: f64, scale: Option<f64>, inf: f64) -> Result<(), TorchError> {
    let list = |i: usize| states.iter().map(|s| &s[i]).collect::<Vec<_>>();
    let steps: Vec<_> = grads.iter().map(|_| Tensor::from(t as f32)).collect();
    fused_adamw(
        &list(0),
        &grads.iter().collect::<Vec<_>>(),
        &list(1),
        &list(2),
        &steps.iter().collect::<Vec<_>>(),
        &HP,
        scale.map(|s| Tensor::from(s as f32)).as_ref(),
        &Tensor::from(inf as f32),
    )
}

/// The textbook step, in f64.
fn plain_step(s: &mut State, g: &Tensor, t: f64) {
    let [param, m, v] = s.each_ref().map(|t| t.to_kind(Kind::Double));
    let g = g.to_kind(Kind::Double);
    let m = m * HP.beta1 + &g * (1.0 - HP.beta1);
    let v = v * HP.beta2 + g.square() * (1.0 - HP.beta2);
    let denominator = (&v / (1.0 - HP.beta2.powf(t))).sqrt() + HP.eps;
    let param = param * (1.0 - HP.lr * HP.weight_decay) - &m / (1.0 - HP.beta1.powf(t)) / denominator * HP.lr;
    *s = [param, m, v];
}

#[test]
fn fused_adamw_is_the_textbook_step() {
    let _guard = seeded(22);
    for scale in [None, Some(1024.0)] {
        let states = [state(37), state(1000)];
        let mut expected = states.each_ref().map(copy);
        for t in 1..=5 {
            let grads: Vec<_> = states.iter().map(|s| s[0].randn_like()).collect();
            for (s, g) in expected.iter_mut().zip(&grads) {
                plain_step(s, g, t as f64);
            }
            let scaled: Vec<_> = grads.iter().map(|g| g * scale.unwrap_or(1.0)).collect();
            step(&states, &scaled, t as f64, scale, 0.0).unwrap();
        }
        for (s, e) in states.iter().zip(&expected) {
            for (i, what) in ["param", "exp_avg", "exp_avg_sq"].iter().enumerate() {
                assert_close(&s[i], &e[i], 1e-6, what);
            }
        }
    }
}

#[test]
fn fused_adamw_changes_nothing_when_found_inf_is_set() {
    let _guard = seeded(23);
    let states = [state(100)];
    let before = copy(&states[0]);
    let grads = [Tensor::full([100], f64::NAN, F32)];
    step(&states, &grads, 1.0, None, 1.0).unwrap();
    for (now, before) in states[0].iter().zip(&before) {
        assert_same(now, before, "state");
    }
}

/// On CUDA libtorch reads the first tensor of lists that have none. A rank may own no parameter of a kind.
#[test]
fn fused_adamw_of_nothing_is_nothing() {
    step(&[], &[], 1.0, Some(2.0), 0.0).unwrap();
}

#[test]
fn fused_adamw_refuses_lists_that_do_not_fit() {
    let _guard = seeded(24);
    let table = [
        ("length", vec![], "expected 1 grads"),
        ("shape", vec![Tensor::zeros([99], F32)], "[99]"),
        ("strides", vec![Tensor::zeros([200], F32).slice(0, None, None, 2)], "strides [2]"),
        ("dtype", vec![Tensor::zeros([100], (Kind::BFloat16, Device::Cpu))], "BFloat16"),
    ];
    for (what, grads, part) in table {
        let error = step(&[state(100)], &grads, 1.0, None, 0.0).expect_err(what);
        assert!(error.op == "fused_adamw" && error.message.contains(part), "{what}: {error}");
    }
    let nothing = Tensor::zeros([0], F32);
    let error = fused_adamw(&[], &[], &[], &[], &[], &HP, None, &nothing).unwrap_err();
    assert!(error.message.starts_with("found_inf: expected one f32"), "{error}");
}

#[test]
fn foreach_norm_is_the_l2_norm_of_each() {
    let _guard = seeded(25);
    let tensors = [Tensor::randn([1000], F32), Tensor::from_slice(&[3f32, -4.0]).view([1, 2]), Tensor::zeros([0], F32)];
    let norms = foreach_norm(&tensors.each_ref()).unwrap();
    for (t, norm) in tensors.iter().zip(&norms) {
        assert_close(norm, &t.square().sum(Kind::Double).sqrt(), 1e-6, "norm");
    }
    assert!(foreach_norm(&[]).is_err_and(|e| e.op == "foreach_norm"));
    let inf = foreach_norm(&[&Tensor::from_slice(&[1f32, f32::INFINITY])]).unwrap();
    assert!(inf[0].double_value(&[]).is_infinite());
}
