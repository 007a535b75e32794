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

// Queries that attention handles at a time.
constexpr int64_t kBlock = 64;

struct RowKernels {
  // y = weight * round(x * rstd), rounded; rstd = 1 / sqrt(mean(x^2) + eps), NaN if the mean overflows.
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

  // Of a block of kBlock queries, of which the first `rows` exist, at positions first, first + 1, ...; columns are keys.
  // A query sees the `window` keys up to its own position. Scores have rows of `width` elements.
  //
  // weights = exp(score * scale - maximum) in bf16 bits, 0 for keys not seen; sums [kBlock] their f32 sums; lse [rows].
  void (*attention_weights)(
      const float* scores, float scale, int64_t first, int64_t rows, int64_t window, int64_t begin_key, int64_t width,
      uint16_t* weights, float* sums, float* lse);
  // From scores and dweights: weights = exp(score * scale - lse), dscores = weights * (dweights - delta) * scale, in
  // bf16 bits; also as pairs of rows, the even one in the low half.
  void (*attention_weights_backward)(
      const float* scores, const float* dweights, float scale, int64_t first, int64_t rows, int64_t window,
      int64_t begin_key, int64_t width, const float* lse, const float* delta, uint32_t* weight_pairs,
      uint16_t* dscores, uint32_t* dscore_pairs);
  // to[c * to_stride + r] = from[r * from_stride + c], for matrices of 32-bit and of 16-bit elements.
  void (*transpose32)(
      const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to, int64_t to_stride);
  void (*transpose16)(
      const uint16_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint16_t* to, int64_t to_stride);
  // Rows [rows, columns] of f32 as bf16 bits, each times 1 / divisors[row] where divisors are given.
  void (*rows_to_bf16)(
      const float* from, const float* divisors, int64_t rows, int64_t columns, uint16_t* to, int64_t to_stride);
  // dots[r] = the dot product of row r of a and row r of b, in bf16 bits.
  void (*row_dots)(
      const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t rows, int64_t columns,
      float* dots);

  // dst = src, or dst += src, over elements.
  void (*accumulate)(float* dst, const void* src, Dtype src_dtype, bool overwrite, int64_t begin, int64_t end);
};

// The kernels for this processor.
const RowKernels& rows();

}  // namespace fte
