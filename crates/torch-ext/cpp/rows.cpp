// The row kernels of rows.h, under the name ROWS. Includes no header with inline functions (see build.rs). Loops marked
// `omp simd` may be reassociated by the compiler, in a fixed way: same input, same bits on the same processor.
#include "rows.h"

#define SIMD _Pragma("omp simd")
#define SIMD_SUM(name) _Pragma(SIMD_STRING(omp simd reduction(+ : name)))
#define SIMD_MAX(name) _Pragma(SIMD_STRING(omp simd reduction(max : name)))
#define SIMD_STRING(text) #text

namespace fte {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

inline float load(float x) { return x; }

inline float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float load(f16 x) {
  uint32_t magnitude = x.bits & 0x7fff;
  uint32_t shifted = magnitude << 13;
  float normal = float_of(shifted + (112u << 23));    // exponent bias 127 - 15
  float special = float_of(shifted + (224u << 23));   // infinities and NaN: exponent 31 becomes 255
  float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  float value = magnitude >= 0x7c00 ? special : magnitude >= 0x0400 ? normal : subnormal;
  return float_of(bits_of(value) | (uint32_t(x.bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even; NaN stays a (quiet) NaN.
inline void store(float& to, float x) { to = x; }

inline void store(bf16& to, float x) {
  uint32_t u = bits_of(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  uint32_t nan = (u >> 16) | 0x40;
  to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

inline void store(f16& to, float x) {
  uint32_t u = bits_of(x);
  uint32_t magnitude = u & 0x7fffffff;
  uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 0.5 leaves multiples of 2^-24, the spacing of f16's subnormals, in the low bits.
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477ff000 ? 0x7c00 : value;
  value = magnitude > 0x7f800000 ? 0x7e00 : value;
  to.bits = uint16_t(value | ((u >> 16) & 0x8000));
}

template <class T>
inline float round_to(float x) {
  T rounded;
  store(rounded, x);
  return load(rounded);
}

// exp(x) within 2e-7, relative; x is cut to [-87, 88], where results are normal numbers. NaN gives NaN.
inline float exp_cut(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  constexpr float log2e = 1.44269504f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  float shifted = x * log2e + shift;
  float n = shifted - shift;
  float r = (x - n * ln2_high) - n * ln2_low;  // |r| <= ln(2) / 2
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) - bits_of(shift) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_cut(-x)); }

template <class T>
inline T* row(const Matrix& m, int64_t n) {
  return static_cast<T*>(m.data) + n * m.stride;
}

// Calls `body` with a value of the C++ type of `dtype`.
template <class F>
inline void with_type(Dtype dtype, F body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::bf16: return body(bf16{});
    case Dtype::f16: return body(f16{});
  }
}

template <class T, class W>
void rms_norm_typed(Matrix x, Matrix weight, Matrix y, float* rstd, float eps, int64_t begin, int64_t end) {
  const W* w = row<W>(weight, 0);
  for (int64_t n = begin; n < end; n++) {
    const T* xs = row<T>(x, n);
    T* ys = row<T>(y, n);
    float squares = 0;
    SIMD_SUM(squares)
    for (int64_t d = 0; d < x.width; d++) squares += load(xs[d]) * load(xs[d]);
    float scale = 1.0f / __builtin_sqrtf(squares / float(x.width) + eps);
    rstd[n] = scale;
    SIMD
    for (int64_t d = 0; d < x.width; d++) store(ys[d], load(w[d]) * round_to<T>(load(xs[d]) * scale));
  }
}

template <class T, class W>
void rms_norm_backward_typed(
    Matrix dy, Matrix x, Matrix weight, const float* rstd, Matrix dx, float* dweight, int64_t begin, int64_t end) {
  const W* w = row<W>(weight, 0);
  for (int64_t n = begin; n < end; n++) {
    const T* dys = row<T>(dy, n);
    const T* xs = row<T>(x, n);
    T* dxs = row<T>(dx, n);
    float scale = rstd[n], dot = 0;
    SIMD_SUM(dot)
    for (int64_t d = 0; d < x.width; d++) {
      float normed = round_to<T>(load(xs[d]) * scale);
      dot += load(dys[d]) * load(w[d]) * load(xs[d]);
      dweight[d] += load(dys[d]) * normed;
    }
    float pull = dot * scale * scale / float(x.width);
    SIMD
    for (int64_t d = 0; d < x.width; d++) store(dxs[d], scale * (load(dys[d]) * load(w[d]) - load(xs[d]) * pull));
  }
}

void rms_norm(Matrix x, Matrix weight, Matrix y, float* rstd, float eps, int64_t begin, int64_t end) {
  with_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (weight.dtype == x.dtype) rms_norm_typed<T, T>(x, weight, y, rstd, eps, begin, end);
    else rms_norm_typed<T, float>(x, weight, y, rstd, eps, begin, end);
  });
}

void rms_norm_backward(
    Matrix dy, Matrix x, Matrix weight, const float* rstd, Matrix dx, float* dweight, int64_t begin, int64_t end) {
  with_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (weight.dtype == x.dtype) rms_norm_backward_typed<T, T>(dy, x, weight, rstd, dx, dweight, begin, end);
    else rms_norm_backward_typed<T, float>(dy, x, weight, rstd, dx, dweight, begin, end);
  });
}

void rope(
    Matrix x, const float* cos, const float* sin, int64_t num_positions, int64_t half_dim, float sign, Matrix y,
    int64_t begin, int64_t end) {
  with_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = begin; n < end; n++) {
      const float* c = cos + n % num_positions * half_dim;
      const float* s = sin + n % num_positions * half_dim;
      for (int64_t head = 0; head < x.width; head += 2 * half_dim) {
        const T* xs = row<T>(x, n) + head;
        T* ys = row<T>(y, n) + head;
        SIMD
        for (int64_t i = 0; i < half_dim; i++) {
          float a = load(xs[i]), b = load(xs[half_dim + i]), angle_sin = sign * s[i];
          store(ys[i], a * c[i] - b * angle_sin);
          store(ys[half_dim + i], b * c[i] + a * angle_sin);
        }
      }
    }
  });
}

void silu_mul(Matrix gate, Matrix up, Matrix h, int64_t begin, int64_t end) {
  with_type(gate.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = begin; n < end; n++) {
      const T* gs = row<T>(gate, n);
      const T* us = row<T>(up, n);
      T* hs = row<T>(h, n);
      SIMD
      for (int64_t f = 0; f < gate.width; f++) {
        float g = load(gs[f]);
        store(hs[f], round_to<T>(g * sigmoid(g)) * load(us[f]));
      }
    }
  });
}

void silu_mul_backward(Matrix dh, Matrix gate, Matrix up, Matrix dgate, Matrix dup, int64_t begin, int64_t end) {
  with_type(gate.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = begin; n < end; n++) {
      const T* dhs = row<T>(dh, n);
      const T* gs = row<T>(gate, n);
      const T* us = row<T>(up, n);
      T* dgs = row<T>(dgate, n);
      T* dus = row<T>(dup, n);
      SIMD
      for (int64_t f = 0; f < gate.width; f++) {
        float g = load(gs[f]), d = load(dhs[f]), s = sigmoid(g);
        store(dus[f], d * round_to<T>(g * s));
        store(dgs[f], d * load(us[f]) * s * (1.0f + g * (1.0f - s)));
      }
    }
  });
}

void cross_entropy(Matrix logits, const int64_t* targets, float scale, double* losses, int64_t begin, int64_t end) {
  with_type(logits.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t n = begin; n < end; n++) {
      T* xs = row<T>(logits, n);
      int64_t target = targets[n];
      losses[n] = 0;
      if (target < 0) {
        SIMD
        for (int64_t v = 0; v < logits.width; v++) store(xs[v], 0.0f);
        continue;
      }
      float highest = -__builtin_inff(), sum = 0;
      SIMD_MAX(highest)
      for (int64_t v = 0; v < logits.width; v++) highest = load(xs[v]) > highest ? load(xs[v]) : highest;
      SIMD_SUM(sum)
      for (int64_t v = 0; v < logits.width; v++) sum += exp_cut(load(xs[v]) - highest);
      float at_target = load(xs[target]) - highest;
      losses[n] = __builtin_log(double(sum)) - double(at_target);
      float factor = scale / sum;
      SIMD
      for (int64_t v = 0; v < logits.width; v++) store(xs[v], exp_cut(load(xs[v]) - highest) * factor);
      store(xs[target], (exp_cut(at_target) / sum - 1.0f) * scale);
    }
  });
}

void accumulate(float* dst, const void* src, Dtype src_dtype, bool overwrite, int64_t begin, int64_t end) {
  with_type(src_dtype, [&](auto t) {
    auto* from = static_cast<const decltype(t)*>(src);
    if (overwrite) {
      SIMD
      for (int64_t i = begin; i < end; i++) dst[i] = load(from[i]);
    } else {
      SIMD
      for (int64_t i = begin; i < end; i++) dst[i] += load(from[i]);
    }
  });
}

}  // namespace

extern const RowKernels ROWS;
const RowKernels ROWS = {rms_norm, rms_norm_backward, rope, silu_mul, silu_mul_backward, cross_entropy, accumulate};

}  // namespace fte
