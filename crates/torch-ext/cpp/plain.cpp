// The kernels by libtorch's own operations, for devices that have no kernels of ours: few launches, no look at a
// value by the host. Rounding is that of the kernels, but where an entry point says otherwise.
//
// With these, a Llama block in one dtype is 23 launches forward (7 of them products, 1 attention) and 44 backward (14
// products, 3 attention); a norm over q and one over k add 4 and 10.
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_rms_norm.h>
#include <ATen/ops/_fused_rms_norm_backward.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <limits>

namespace {

constexpr int64_t kIgnore = -100;             // mirrors IGNORE_INDEX in src/kernels.rs
constexpr int64_t kLogitsInFloat = 16 << 20;  // cross-entropy's f32 copy: 64 MiB, near the size of a GPU's cache

bool is_float(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

// These operations too record no graph: a tensor whose gradient is asked for would silently lose it.
void check_operand(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.defined() && t.layout() == at::kStrided, name, ": expected a dense tensor");
  TORCH_CHECK(
      !(at::GradMode::is_enabled() && t.requires_grad()), name, ": requires grad; kernels record no graph, use no_grad");
}

void check_rows(const at::Tensor& t, const char* name) {
  check_operand(t, name);
  TORCH_CHECK(t.dim() >= 1, name, ": expected at least one dimension");
  TORCH_CHECK(is_float(t), name, ": expected float32, bfloat16 or float16, got ", t.scalar_type());
}

void check_like(const at::Tensor& t, const at::Tensor& like, const char* name, const char* like_name) {
  check_rows(t, name);
  TORCH_CHECK(
      t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), name, ": expected the shape and dtype of ",
      like_name, ", ", like.scalar_type(), " ", like.sizes(), ", got ", t.scalar_type(), " ", t.sizes());
}

void check_weight(const at::Tensor& weight, const at::Tensor& x) {
  check_rows(weight, "weight");
  TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1), "weight: expected [", x.size(-1), "], got ", weight.sizes());
  TORCH_CHECK(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat, "weight: expected ",
      x.scalar_type(), " as x, or Float, got ", weight.scalar_type());
}

}  // namespace

// Rounds once, where the kernel rounds before the weight too. 2 launches; a weight in f32 beside a narrower x adds 2.
FTE_API char* fte_plain_rms_norm(fte::Handle x, fte::Handle weight, double eps, at::Tensor** y, at::Tensor** rstd) {
  return fte::guarded([&] {
    check_rows(*x, "x");
    check_weight(*weight, *x);
    at::NoGradGuard no_grad;
    auto [y_new, rstd_new] = at::_fused_rms_norm(
        x->to(weight->scalar_type()).contiguous(), weight->sizes(), weight->contiguous(), eps);
    // The reciprocal of an overflow is 0, and so is the row: its gradient shows the error.
    at::threshold_(rstd_new, 0, std::numeric_limits<float>::quiet_NaN());
    *y = fte::give(y_new.to(x->scalar_type()));
    *rstd = fte::give(rstd_new.reshape({-1}));
  });
}

// The weight's gradient is rounded to the weight's dtype on its way to f32. 3 or 4 launches; a weight in f32 beside a
// narrower x adds 3.
FTE_API char* fte_plain_rms_norm_backward(
    fte::Handle dy, fte::Handle x, fte::Handle weight, fte::Handle rstd, at::Tensor** dx, at::Tensor** dweight) {
  return fte::guarded([&] {
    check_rows(*x, "x");
    check_weight(*weight, *x);
    check_like(*dy, *x, "dy", "x");
    int64_t n = x->size(-1) == 0 ? 0 : x->numel() / x->size(-1);
    TORCH_CHECK(
        rstd->scalar_type() == at::kFloat && rstd->numel() == n, "rstd: expected ", n,
        " float32, one for each row of x, got ", rstd->scalar_type(), " ", rstd->sizes());
    at::NoGradGuard no_grad;
    // [.., 1], as forward gives it; libtorch takes all of them to be contiguous.
    auto stat_shape = x->sizes().vec();
    stat_shape.back() = 1;
    auto dtype = weight->scalar_type();
    auto [dx_new, dweight_new] = at::_fused_rms_norm_backward(
        dy->to(dtype).contiguous(), x->to(dtype).contiguous(), weight->sizes(), rstd->reshape(stat_shape),
        weight->contiguous(), {true, true});
    *dx = fte::give(dx_new.to(x->scalar_type()));
    *dweight = fte::give(dweight_new.to(at::kFloat));
  });
}

// 3 launches.
FTE_API char* fte_plain_rope(fte::Handle x, fte::Handle cos, fte::Handle sin, bool inverse, at::Tensor** y) {
  return fte::guarded([&] {
    check_rows(*x, "x");
    for (auto [table, name] : {std::pair(cos, "cos"), std::pair(sin, "sin")}) {
      check_operand(*table, name);
      TORCH_CHECK(table->scalar_type() == at::kFloat, name, ": expected float32, got ", table->scalar_type());
    }
    TORCH_CHECK(
        cos->dim() == 2 && cos->sizes() == sin->sizes() && cos->numel() > 0,
        "cos and sin: expected [positions, head width / 2] for both, got ", cos->sizes(), " and ", sin->sizes());
    int64_t width = x->size(-1), positions = cos->size(0), half = cos->size(1);
    int64_t n = width == 0 ? 0 : x->numel() / width;
    TORCH_CHECK(
        width % (2 * half) == 0 && n % positions == 0, "x: expected a multiple of ", positions,
        " rows and heads of width ", 2 * half, ", got ", x->sizes());
    at::NoGradGuard no_grad;
    int64_t shape[] = {n / positions, positions, width / (2 * half), 2, half};
    int64_t table_shape[] = {1, positions, 1, half};
    at::Tensor xs = x->reshape(shape), s = sin->reshape(table_shape);
    at::Tensor y_new = at::empty(x->sizes(), x->options());
    at::Tensor ys = y_new.view(shape);
    at::Tensor scaled = at::mul(xs, cos->reshape({1, positions, 1, 1, half}));  // f32
    double sign = inverse ? -1 : 1;
    for (int64_t part : {0, 1}) {
      at::Tensor out = ys.select(3, part);
      at::addcmul_out(out, scaled.select(3, part), xs.select(3, 1 - part), s, part == 0 ? -sign : sign);
    }
    *y = fte::give(y_new);
  });
}

// 2 launches.
FTE_API char* fte_plain_silu_mul(fte::Handle gate, fte::Handle up, at::Tensor** h) {
  return fte::guarded([&] {
    check_rows(*gate, "gate");
    check_like(*up, *gate, "up", "gate");
    at::NoGradGuard no_grad;
    *h = fte::give(at::silu(*gate).mul_(*up));
  });
}

// Rounds dh * up, as `transformers` does and the kernel does not. 4 launches.
FTE_API char* fte_plain_silu_mul_backward(
    fte::Handle dh, fte::Handle gate, fte::Handle up, at::Tensor** dgate, at::Tensor** dup) {
  return fte::guarded([&] {
    check_rows(*gate, "gate");
    check_like(*up, *gate, "up", "gate");
    check_like(*dh, *gate, "dh", "gate");
    at::NoGradGuard no_grad;
    *dup = fte::give(at::silu(*gate).mul_(*dh));
    *dgate = fte::give(at::silu_backward(at::mul(*dh, *up), *gate));
  });
}

// Logits in f32 exist for a block of rows at a time. 5 launches a block, 11 a call. Targets are not checked: the host
// would have to wait for them.
FTE_API char* fte_plain_cross_entropy(
    fte::Handle logits, fte::Handle targets, fte::Handle scale, at::Tensor** loss_sum) {
  return fte::guarded([&] {
    check_rows(*logits, "logits");
    check_operand(*targets, "targets");
    TORCH_CHECK(
        logits->dim() == 2 && logits->size(1) > 0, "logits: expected [N, V] of at least one class, got ",
        logits->sizes());
    int64_t n = logits->size(0);
    TORCH_CHECK(
        targets->scalar_type() == at::kLong && targets->numel() == n, "targets: expected ", n,
        " int64, one for each row of logits, got ", targets->scalar_type(), " ", targets->sizes());
    at::NoGradGuard no_grad;
    at::Tensor valid = targets->reshape({n, 1}).ne(kIgnore);
    at::Tensor ids = targets->reshape({n, 1}).clamp_min(0);
    at::Tensor row_scale = at::mul(valid, *scale).to(at::kFloat);
    at::Tensor at_target = at::empty({n, 1}, logits->options().dtype(at::kFloat));  // log-probabilities
    int64_t block = std::max<int64_t>(1, kLogitsInFloat / logits->size(1));
    for (int64_t start = 0; start < n; start += block) {
      auto part = [&](const at::Tensor& t) { return t.narrow(0, start, std::min(block, n - start)); };
      at::Tensor x = part(*logits), picked = part(at_target);
      at::Tensor log_p = at::_log_softmax(x.to(at::kFloat), 1, /*half_to_float=*/false);
      at::gather_out(picked, log_p, 1, part(ids));
      at::mul_out(x, log_p.exp_(), part(row_scale));
    }
    at::Tensor loss = at::where(valid, at_target, 0.0).sum(at::kDouble).neg_();
    // p - 1 without the loss of digits where p is near 1.
    logits->scatter_(1, ids, at_target.expm1_().mul_(row_scale).to(logits->scalar_type()));
    *loss_sum = fte::give(loss);
  });
}
