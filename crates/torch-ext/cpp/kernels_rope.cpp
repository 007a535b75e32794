#include "kernels.h"

#include <ATen/ops/empty_like.h>

namespace {

void rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool inverse, const at::Tensor& y) {
  fte::Matrix xs = fte::matrix(x, "x"), ys = fte::matrix(y, "y");
  const float* c = fte::f32_table(cos, "cos");
  const float* s = fte::f32_table(sin, "sin");
  TORCH_CHECK(
      cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.numel() > 0,
      "cos and sin: expected [positions, head width / 2] for both, got ", cos.sizes(), " and ", sin.sizes());
  int64_t n = fte::num_rows(x), positions = cos.size(0), half = cos.size(1);
  TORCH_CHECK(
      xs.width % (2 * half) == 0 && n % positions == 0, "x: expected a multiple of ", positions,
      " rows and heads of width ", 2 * half, ", got ", x.sizes());
  fte::parallel_rows(n, xs.width, [&](int64_t begin, int64_t end) {
    fte::rows().rope(xs, c, s, positions, half, inverse ? -1.0f : 1.0f, ys, begin, end);
  });
}

}  // namespace

FTE_API char* fte_rope(fte::Handle x, fte::Handle cos, fte::Handle sin, bool inverse, at::Tensor** y) {
  return fte::guarded([&] {
    at::Tensor y_new = at::empty_like(*x, at::MemoryFormat::Contiguous);
    rope(*x, *cos, *sin, inverse, y_new);
    *y = fte::give(y_new);
  });
}

FTE_API char* fte_rope_in_place(fte::Handle x, fte::Handle cos, fte::Handle sin, bool inverse) {
  return fte::guarded([&] {
    rope(*x, *cos, *sin, inverse, *x);
    x->unsafeGetTensorImpl()->bump_version();
  });
}
