// Row kernels: plain loops over rows in host memory, compiled once for each x86-64 level (rows.cpp), chosen at run time
// (rows_dispatch.cpp). Single-threaded; callers split the rows. Arithmetic is f32 inside, whatever the dtype.
#pragma once

#include <cstdint>

namespace fte {

enum class Dtype { f32, bf16, f16 };

// Rows of `width` contiguous elements whose starts lie `stride` elements apart.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t width;
  int64_t stride;
};

struct RowKernels {
  // y = weight * round(x * rstd), rounded; rstd = 1 / sqrt(mean(x^2) + eps).
  void (*rms_norm)(Matrix x, Matrix weight, Matrix y, float* rstd, float eps, int64_t begin, int64_t end);

  // dx, and dweight [width] += over the rows.
  void (*rms_norm_backward)(
      Matrix dy, Matrix x, Matrix weight, const float* rstd, Matrix dx, float* dweight, int64_t begin, int64_t end);

  // Rotates each head of row n by the angles of position n % num_positions; sign -1 rotates back. y may be x.
  void (*rope)(
      Matrix x, const float* cos, const float* sin, int64_t num_positions, int64_t half_dim, float sign, Matrix y,
      int64_t begin, int64_t end);

  // h = round(silu(gate)) * up, rounded.
  void (*silu_mul)(Matrix gate, Matrix up, Matrix h, int64_t begin, int64_t end);
  void (*silu_mul_backward)(
      Matrix dh, Matrix gate, Matrix up, Matrix dgate, Matrix dup, int64_t begin, int64_t end);

  // losses[n] = -log softmax(logits[n])[targets[n]], and logits = (softmax - onehot) * scale; both 0 for a negative
  // target.
  void (*cross_entropy)(
      Matrix logits, const int64_t* targets, float scale, double* losses, int64_t begin, int64_t end);

  // dst = src, or dst += src, over elements.
  void (*accumulate)(float* dst, const void* src, Dtype src_dtype, bool overwrite, int64_t begin, int64_t end);
};

// The kernels for this processor.
const RowKernels& rows();

}  // namespace fte
