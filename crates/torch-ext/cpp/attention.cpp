#include "shim.h"

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

namespace {

// libtorch's kernels do not look at the stride of this dimension.
void check_last_dimension(const at::Tensor& t, const char* name) {
  TORCH_CHECK(
      t.size(-1) <= 1 || t.stride(-1) == 1, name, ": expected a contiguous last dimension, got sizes ", t.sizes(),
      " with strides ", t.strides());
}

// libtorch's kernels read these shapes from one tensor and use them for all.
void check_shapes(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool is_causal,
    const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
      "q and k: expected [B, H, T, D] and [B, H, S, D], got ", q.sizes(), " and ", k.sizes());
  // They divide by sizes.
  TORCH_CHECK(q.numel() > 0 && k.numel() > 0, "q and k: expected elements, got ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "v: expected the shape of k, ", k.sizes(), ", got ", v.sizes());
  for (auto [t, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v")}) check_last_dimension(*t, name);
  if (!mask) return;
  TORCH_CHECK(!is_causal, "mask: not together with is_causal");
  int64_t full[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = mask->dim() == 2 || mask->dim() == 4;
  for (int64_t d = 1; fits && d <= mask->dim(); d++) fits = mask->size(-d) == full[4 - d] || mask->size(-d) == 1;
  TORCH_CHECK(fits, "mask: expected [T, S] or [B, H, T, S], sizes ", at::IntArrayRef(full), " or 1, got ", mask->sizes());
}

}  // namespace

FTE_API char* fte_flash_attention_cpu(
    fte::Handle q, fte::Handle k, fte::Handle v, bool is_causal, fte::Handle mask, const double* scale,
    at::Tensor** out, at::Tensor** logsumexp) {
  return fte::guarded([&] {
    check_shapes(*q, *k, *v, is_causal, fte::maybe(mask));
    auto [o, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        *q, *k, *v, /*dropout_p=*/0.0, is_causal, fte::maybe(mask), fte::maybe(scale));
    *out = fte::give(o);
    *logsumexp = fte::give(lse);
  });
}

FTE_API char* fte_flash_attention_cpu_backward(
    fte::Handle grad_out, fte::Handle q, fte::Handle k, fte::Handle v, fte::Handle out, fte::Handle logsumexp,
    bool is_causal, fte::Handle mask, const double* scale, at::Tensor** grad_q, at::Tensor** grad_k,
    at::Tensor** grad_v) {
  return fte::guarded([&] {
    check_shapes(*q, *k, *v, is_causal, fte::maybe(mask));
    for (auto [t, name] : {std::pair(grad_out, "grad_out"), std::pair(out, "out")}) {
      TORCH_CHECK(t->sizes() == q->sizes(), name, ": expected the shape of q, ", q->sizes(), ", got ", t->sizes());
      check_last_dimension(*t, name);
    }
    TORCH_CHECK(
        logsumexp->sizes() == q->sizes().slice(0, 3), "logsumexp: expected ", q->sizes().slice(0, 3), ", got ",
        logsumexp->sizes());
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        *grad_out, *q, *k, *v, *out, *logsumexp, /*dropout_p=*/0.0, is_causal, fte::maybe(mask), fte::maybe(scale));
    *grad_q = fte::give(dq);
    *grad_k = fte::give(dk);
    *grad_v = fte::give(dv);
  });
}
