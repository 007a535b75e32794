// What the kernels' entry points share: checks, and the way from at::Tensor to rows.h.
#pragma once

#include "rows.h"
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace fte {

inline Dtype dtype_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

// The kernels work on memory and record no graph: a tensor whose gradient is asked for would silently lose it.
inline void check_plain(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.defined(), name, ": expected a tensor, got an undefined one");
  TORCH_CHECK(t.is_cpu() && t.layout() == at::kStrided, name, ": expected a dense CPU tensor, got one on ", t.device());
  TORCH_CHECK(
      !(at::GradMode::is_enabled() && t.requires_grad()), name, ": requires grad; kernels record no graph, use no_grad");
}

// A tensor as rows of its last dimension: contiguous of any shape, or of two dimensions with any row stride.
inline Matrix matrix(const at::Tensor& t, const char* name) {
  check_plain(t, name);
  TORCH_CHECK(t.dim() >= 1, name, ": expected at least one dimension");
  int64_t width = t.size(-1), stride = width;
  if (!t.is_contiguous()) {
    TORCH_CHECK(
        t.dim() == 2 && t.stride(1) == 1 && t.stride(0) >= width, name,
        ": expected a contiguous tensor or a matrix of contiguous rows, got sizes ", t.sizes(), " with strides ",
        t.strides());
    stride = t.stride(0);
  }
  return {t.data_ptr(), dtype_of(t, name), width, stride};
}

inline Matrix matrix_like(const at::Tensor& t, const at::Tensor& like, const char* name, const char* like_name) {
  Matrix m = matrix(t, name);
  TORCH_CHECK(
      t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), name, ": expected the shape and dtype of ",
      like_name, ", ", like.scalar_type(), " ", like.sizes(), ", got ", t.scalar_type(), " ", t.sizes());
  return m;
}

inline const float* f32_table(const at::Tensor& t, const char* name) {
  check_plain(t, name);
  TORCH_CHECK(
      t.scalar_type() == at::kFloat && t.is_contiguous(), name, ": expected a contiguous float32 tensor, got ",
      t.scalar_type(), " ", t.sizes(), " with strides ", t.strides());
  return t.const_data_ptr<float>();
}

inline int64_t num_rows(const at::Tensor& t) { return t.size(-1) == 0 ? 0 : t.numel() / t.size(-1); }

// Calls body(begin, end) over the rows, in parallel where they hold enough elements to pay for it.
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& body) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  at::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, width)), body);
}

}  // namespace fte
