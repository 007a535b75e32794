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

inline float from_bf16(uint32_t bits) { return float_of(bits << 16); }

inline float from_f16(uint32_t bits) {
  uint32_t magnitude = bits & 0x7fff;
  uint32_t shifted = magnitude << 13;
  float normal = float_of(shifted + (112u << 23));   // exponent bias 127 - 15
  float special = float_of(shifted + (224u << 23));  // infinities and NaN: exponent 31 becomes 255
  float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  float value = magnitude >= 0x7c00 ? special : magnitude >= 0x0400 ? normal : subnormal;
  return float_of(bits_of(value) | (bits & 0x8000) << 16);
}

inline float load(float x) { return x; }
inline float load(bf16 x) { return from_bf16(x.bits); }
inline float load(f16 x) { return from_f16(x.bits); }

// The conversions below round to nearest, ties to even; NaN stays a (quiet) NaN. They stay in 32 bits until the store,
// so that vectors need not change their element size.

inline uint32_t to_bf16(float x) {
  uint32_t u = bits_of(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return x != x ? 0x7fc0 : rounded;
}

inline uint32_t to_f16(float x) {
  uint32_t u = bits_of(x);
  uint32_t magnitude = u & 0x7fffffff;
  uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 0.5 leaves multiples of 2^-24, the spacing of f16's subnormals, in the low bits.
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477ff000 ? 0x7c00 : value;
  value = magnitude > 0x7f800000 ? 0x7e00 : value;
  return value | ((u >> 16) & 0x8000);
}

inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) { to.bits = uint16_t(to_bf16(x)); }
inline void store(f16& to, float x) { to.bits = uint16_t(to_f16(x)); }

// x as it would be loaded after a store.
template <class T>
float round_to(float x);
template <>
inline float round_to<float>(float x) { return x; }
template <>
inline float round_to<bf16>(float x) { return from_bf16(to_bf16(x)); }
template <>
inline float round_to<f16>(float x) { return from_f16(to_f16(x)); }

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

// 0 where exp_cut would be cut, so that its product with a huge x is not wrong.
inline float sigmoid(float x) { return x < -87.0f ? 0.0f : 1.0f / (1.0f + exp_cut(-x)); }

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
    float mean = squares / float(x.width);
    // The reciprocal of an overflow would be 0, and so would the row: the error must show.
    float scale = mean < __builtin_inff() ? 1.0f / __builtin_sqrtf(mean + eps) : __builtin_nanf("");
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

void attention_weights(
    const float* scores, float scale, int64_t first, int64_t rows, int64_t window, int64_t begin_key, int64_t width,
    uint16_t* weights, float* sums, float* lse) {
  for (int64_t i = 0; i < kBlock; i++) {
    const float* ss = scores + i * width;
    uint16_t* ws = weights + i * width;
    // Keys seen, as columns.
    int64_t end = i < rows ? first + i + 1 - begin_key : 0;
    int64_t begin = end > window ? end - window : 0;
    float highest = -__builtin_inff(), sum = 0;
    SIMD_MAX(highest)
    for (int64_t c = begin; c < end; c++) highest = ss[c] > highest ? ss[c] : highest;
    highest *= scale;
    SIMD
    for (int64_t c = 0; c < begin; c++) ws[c] = 0;
    SIMD_SUM(sum)
    for (int64_t c = begin; c < end; c++) {
      float weight = exp_cut(ss[c] * scale - highest);
      sum += weight;
      ws[c] = uint16_t(to_bf16(weight));
    }
    SIMD
    for (int64_t c = end; c < width; c++) ws[c] = 0;
    sums[i] = i < rows ? sum : 1.0f;
    if (i < rows) lse[i] = highest + float(__builtin_log(double(sum)));
  }
}

void attention_weights_backward(
    const float* scores, const float* dweights, float scale, int64_t first, int64_t rows, int64_t window,
    int64_t begin_key, int64_t width, const float* lse, const float* delta, uint32_t* weight_pairs, uint16_t* dscores,
    uint32_t* dscore_pairs) {
  for (int64_t i = 0; i < kBlock; i += 2) {
    const float *s0 = scores + i * width, *s1 = s0 + width, *dw0 = dweights + i * width, *dw1 = dw0 + width;
    uint16_t *ds0 = dscores + i * width, *ds1 = ds0 + width;
    uint32_t *ws = weight_pairs + i / 2 * width, *dss = dscore_pairs + i / 2 * width;
    int end0 = int(i < rows ? first + i + 1 - begin_key : 0), end1 = int(i + 1 < rows ? first + i + 2 - begin_key : 0);
    int begin0 = end0 > window ? int(end0 - window) : 0, begin1 = end1 > window ? int(end1 - window) : 0;
    float lse0 = i < rows ? lse[i] : 0, lse1 = i + 1 < rows ? lse[i + 1] : 0;
    float delta0 = i < rows ? delta[i] : 0, delta1 = i + 1 < rows ? delta[i + 1] : 0;
    SIMD
    for (int c = 0; c < int(width); c++) {
      float w0 = exp_cut(s0[c] * scale - lse0), w1 = exp_cut(s1[c] * scale - lse1);
      w0 = (c >= begin0) & (c < end0) ? w0 : 0.0f;
      w1 = (c >= begin1) & (c < end1) ? w1 : 0.0f;
      uint32_t d0 = to_bf16(w0 * (dw0[c] - delta0) * scale), d1 = to_bf16(w1 * (dw1[c] - delta1) * scale);
      ws[c] = to_bf16(w0) | to_bf16(w1) << 16;
      dss[c] = d0 | d1 << 16;
      ds0[c] = uint16_t(d0);
      ds1[c] = uint16_t(d1);
    }
  }
}

template <class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t tile = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += tile) {
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      int64_t r1 = r0 + tile < rows ? r0 + tile : rows, c1 = c0 + tile < columns ? c0 + tile : columns;
      for (int64_t c = c0; c < c1; c++) {
        for (int64_t r = r0; r < r1; r++) to[c * to_stride + r] = from[r * from_stride + c];
      }
    }
  }
}

void rows_to_bf16(
    const float* from, const float* divisors, int64_t rows, int64_t columns, uint16_t* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r++) {
    float factor = divisors ? 1.0f / divisors[r] : 1.0f;
    SIMD
    for (int64_t c = 0; c < columns; c++) {
      to[r * to_stride + c] = uint16_t(to_bf16(from[r * columns + c] * factor));
    }
  }
}

void row_dots(
    const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t rows, int64_t columns,
    float* dots) {
  for (int64_t r = 0; r < rows; r++) {
    float dot = 0;
    SIMD_SUM(dot)
    for (int64_t c = 0; c < columns; c++) dot += from_bf16(a[r * a_stride + c]) * from_bf16(b[r * b_stride + c]);
    dots[r] = dot;
  }
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
const RowKernels ROWS = {
    rms_norm,
    rms_norm_backward,
    rope,
    silu_mul,
    silu_mul_backward,
    cross_entropy,
    attention_weights,
    attention_weights_backward,
    transpose<uint32_t>,
    transpose<uint16_t>,
    rows_to_bf16,
    row_dots,
    accumulate,
};

}  // namespace fte
