#include "kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace {

fte::Matrix weight_for(const at::Tensor& weight, const at::Tensor& x) {
  fte::Matrix w = fte::matrix(weight, "weight");
  TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1), "weight: expected [", x.size(-1), "], got ", weight.sizes());
  TORCH_CHECK(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat, "weight: expected ",
      x.scalar_type(), " as x, or Float, got ", weight.scalar_type());
  return w;
}

}  // namespace

FTE_API char* fte_rms_norm(fte::Handle x, fte::Handle weight, double eps, at::Tensor** y, at::Tensor** rstd) {
  return fte::guarded([&] {
    fte::Matrix xs = fte::matrix(*x, "x"), ws = weight_for(*weight, *x);
    int64_t n = fte::num_rows(*x);
    at::Tensor y_new = at::empty_like(*x, at::MemoryFormat::Contiguous);
    at::Tensor rstd_new = at::empty({n}, x->options().dtype(at::kFloat));
    fte::Matrix ys = fte::matrix(y_new, "y");
    float* scales = rstd_new.mutable_data_ptr<float>();
    fte::parallel_rows(n, xs.width, [&](int64_t begin, int64_t end) {
      fte::rows().rms_norm(xs, ws, ys, scales, static_cast<float>(eps), begin, end);
    });
    *y = fte::give(y_new);
    *rstd = fte::give(rstd_new);
  });
}

FTE_API char* fte_rms_norm_backward(
    fte::Handle dy, fte::Handle x, fte::Handle weight, fte::Handle rstd, at::Tensor** dx, at::Tensor** dweight) {
  return fte::guarded([&] {
    fte::Matrix xs = fte::matrix(*x, "x"), ws = weight_for(*weight, *x);
    fte::Matrix dys = fte::matrix_like(*dy, *x, "dy", "x");
    const float* scales = fte::f32_table(*rstd, "rstd");
    int64_t n = fte::num_rows(*x), d = xs.width;
    TORCH_CHECK(rstd->numel() == n, "rstd: expected ", n, " elements, one for each row of x, got ", rstd->numel());

    at::Tensor dx_new = at::empty_like(*x, at::MemoryFormat::Contiguous);
    fte::Matrix dxs = fte::matrix(dx_new, "dx");
    // Rows are cut into blocks by their number alone and the blocks' sums added in order: the same bits for any
    // number of threads.
    int64_t block = std::max<int64_t>(32, (n + 63) / 64);
    int64_t blocks = (n + block - 1) / block;
    at::Tensor partial = at::zeros({std::max<int64_t>(1, blocks), d}, x->options().dtype(at::kFloat));
    float* sums = partial.mutable_data_ptr<float>();
    fte::parallel_rows(blocks, block * d, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        fte::rows().rms_norm_backward(
            dys, xs, ws, scales, dxs, sums + b * d, b * block, std::min(n, (b + 1) * block));
      }
    });
    for (int64_t b = 1; b < blocks; b++) {
      fte::rows().accumulate(sums, sums + b * d, fte::Dtype::f32, /*overwrite=*/false, 0, d);
    }
    *dx = fte::give(dx_new);
    *dweight = fte::give(blocks > 1 ? partial.select(0, 0).clone() : partial.select(0, 0));
  });
}
