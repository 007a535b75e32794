// Causal attention in bf16: blocks of 64 queries against all keys they see, products by oneDNN's small-matrix kernels
// (bf16 in, f32 out), softmax by our own loops in between, all in cache.
//
// B batch, H query heads, G key heads (H / G queries' heads share one), T positions, D head width. A kernel's right
// operand is "packed": its rows are taken in pairs, element (k, n) lies at [k / 2][n][k % 2], i.e. a matrix of 32-bit
// pairs.
#include "kernels.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <cstring>

namespace {

using at::native::cpublas::brgemm;
using fte::kBlock;

// [B, heads, T, D] of bf16 bits with any strides but the last.
struct Heads {
  uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;

  explicit Heads(const at::Tensor& t)
      : data(static_cast<uint16_t*>(t.data_ptr())),
        batch_stride(t.stride(0)),
        head_stride(t.stride(1)),
        row_stride(t.stride(2)) {}

  uint16_t* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch_stride + h * head_stride + t * row_stride;
  }
};

struct Shape {
  int64_t b, h, g, t, d;
  int64_t padded;  // t up to a multiple of kBlock
};

Shape check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3) &&
          k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "q and k: expected [B, H, T, D] and [B, G, T, D] with G dividing H, got ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "v: expected the shape of k, ", k.sizes(), ", got ", v.sizes());
  TORCH_CHECK(q.numel() > 0, "q: expected elements, got ", q.sizes());
  TORCH_CHECK(q.size(3) % 2 == 0, "q: expected an even head width, got ", q.size(3));
  int64_t t = q.size(2);
  return {q.size(0), q.size(1), k.size(1), t, q.size(3), (t + kBlock - 1) / kBlock * kBlock};
}

void check_operand(const at::Tensor& t, const char* name) {
  fte::check_plain(t, name);
  TORCH_CHECK(
      t.scalar_type() == at::kBFloat16 && t.stride(-1) == 1, name,
      ": expected bfloat16 with a contiguous last dimension, got ", t.scalar_type(), " with strides ", t.strides());
}

// A result [B, heads, T, D] that is contiguous as [B, T, heads, D].
at::Tensor empty_heads(const at::Tensor& like, int64_t heads) {
  return at::empty({like.size(0), like.size(2), heads, like.size(3)}, like.options()).transpose(1, 2);
}

template <class T>
struct Scratch {
  at::Tensor memory;
  T* data;

  explicit Scratch(int64_t n) : memory(at::empty({n * static_cast<int64_t>(sizeof(T))}, at::kByte)) {
    data = static_cast<T*>(memory.data_ptr());
  }
};

const at::BFloat16* left(const uint16_t* bits) { return reinterpret_cast<const at::BFloat16*>(bits); }
const at::BFloat16* right(const uint32_t* pairs) { return reinterpret_cast<const at::BFloat16*>(pairs); }

// Rows [t, d] of one head as the packed right operand [d, t]: `padded` columns, those behind t zero.
void pack_transposed(const uint16_t* rows, int64_t stride, const Shape& s, uint32_t* packed) {
  // A row is d / 2 pairs already, where it starts at a multiple of 4 bytes.
  if (stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(uint32_t) == 0) {
    fte::rows().transpose32(
        reinterpret_cast<const uint32_t*>(rows), stride / 2, s.t, s.d / 2, packed, s.padded);
  } else {
    for (int64_t t = 0; t < s.t; t++) {
      for (int64_t p = 0; p < s.d / 2; p++) std::memcpy(packed + p * s.padded + t, rows + t * stride + 2 * p, 4);
    }
  }
  for (int64_t p = 0; p < s.d / 2; p++) std::fill(packed + p * s.padded + s.t, packed + (p + 1) * s.padded, 0);
}

// Rows [t, d] as the packed right operand [t, d]: `padded` rows, those behind t zero.
void pack_rows(const uint16_t* rows, int64_t stride, int64_t t, int64_t padded, int64_t d, uint32_t* packed) {
  for (int64_t pair = 0; pair < padded / 2; pair++) {
    const uint16_t* even = rows + 2 * pair * stride;
    const uint16_t* odd = even + stride;
    uint32_t* to = packed + pair * d;
    if (2 * pair + 1 < t) {
      for (int64_t i = 0; i < d; i++) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    } else if (2 * pair < t) {
      for (int64_t i = 0; i < d; i++) to[i] = even[i];
    } else {
      std::fill(to, to + d, 0);
    }
  }
}

// The `count` existing rows of a block, then zeros.
void copy_block(const uint16_t* rows, int64_t stride, int64_t count, int64_t d, uint16_t* block) {
  for (int64_t i = 0; i < count; i++) std::memcpy(block + i * d, rows + i * stride, d * sizeof(uint16_t));
  std::fill(block + count * d, block + kBlock * d, 0);
}

// A gradient [d, padded] in f32 as rows [t, d] of bf16, through `block`.
void store_transposed(const float* gradient, const Shape& s, float* block, uint16_t* rows, int64_t stride) {
  for (int64_t first = 0; first < s.t; first += kBlock) {
    int64_t count = std::min(kBlock, s.t - first);
    fte::rows().transpose32(
        reinterpret_cast<const uint32_t*>(gradient) + first, s.padded, s.d, count, reinterpret_cast<uint32_t*>(block),
        s.d);
    fte::rows().rows_to_bf16(block, nullptr, count, s.d, rows + first * stride, stride);
  }
}

// Of the block of queries that starts at `first`: their number, and the keys they see, in whole blocks.
struct Span {
  int64_t first, rows, begin_key, width;

  Span(int64_t first, int64_t t, int64_t window)
      : first(first),
        rows(std::min(kBlock, t - first)),
        begin_key(std::max<int64_t>(0, first + 1 - window) / kBlock * kBlock),
        width(first + kBlock - begin_key) {}
};

}  // namespace

FTE_API bool fte_causal_attention_available() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

FTE_API char* fte_causal_attention(
    fte::Handle q, fte::Handle k, fte::Handle v, double scale, int64_t window, at::Tensor** out, at::Tensor** lse) {
  return fte::guarded([&] {
    Shape s = check_shapes(*q, *k, *v);
    for (auto [t, name] : {std::pair(q, "q"), std::pair(k, "k"), std::pair(v, "v")}) check_operand(*t, name);
    at::Tensor out_new = empty_heads(*q, s.h);
    at::Tensor lse_new = at::empty({s.b, s.h, s.t}, q->options().dtype(at::kFloat));
    Heads qs(*q), ks(*k), vs(*v), outs(out_new);
    float* lses = lse_new.mutable_data_ptr<float>();

    at::parallel_for(0, s.b * s.g, 1, [&](int64_t begin, int64_t end) {
      Scratch<uint32_t> k_transposed(s.d / 2 * s.padded), v_packed(s.padded / 2 * s.d);
      Scratch<uint16_t> q_block(kBlock * s.d), weights(kBlock * s.padded);
      Scratch<float> scores(kBlock * s.padded), result(kBlock * s.d);
      float sums[kBlock];
      for (int64_t bg = begin; bg < end; bg++) {
        int64_t b = bg / s.g, g = bg % s.g;
        pack_transposed(ks.at(b, g, 0), ks.row_stride, s, k_transposed.data);
        pack_rows(vs.at(b, g, 0), vs.row_stride, s.t, s.padded, s.d, v_packed.data);
        for (int64_t h = g * (s.h / s.g); h < (g + 1) * (s.h / s.g); h++) {
          for (int64_t first = 0; first < s.t; first += kBlock) {
            Span span(first, s.t, window);
            copy_block(qs.at(b, h, first), qs.row_stride, span.rows, s.d, q_block.data);
            brgemm(
                kBlock, span.width, s.d, s.d, s.padded, span.width, false, left(q_block.data),
                right(k_transposed.data + span.begin_key), scores.data);
            fte::rows().attention_weights(
                scores.data, static_cast<float>(scale), first, span.rows, window, span.begin_key, span.width,
                weights.data, sums, lses + (b * s.h + h) * s.t + first);
            brgemm(
                kBlock, s.d, span.width, span.width, s.d, s.d, false, left(weights.data),
                right(v_packed.data + span.begin_key / 2 * s.d), result.data);
            fte::rows().rows_to_bf16(result.data, sums, span.rows, s.d, outs.at(b, h, first), outs.row_stride);
          }
        }
      }
      at::native::cpublas::brgemm_release();
    });
    *out = fte::give(out_new);
    *lse = fte::give(lse_new);
  });
}

FTE_API char* fte_causal_attention_backward(
    fte::Handle grad_out, fte::Handle q, fte::Handle k, fte::Handle v, fte::Handle out, fte::Handle lse, double scale,
    int64_t window, at::Tensor** grad_q, at::Tensor** grad_k, at::Tensor** grad_v) {
  return fte::guarded([&] {
    Shape s = check_shapes(*q, *k, *v);
    for (auto [t, name] : {std::pair(grad_out, "grad_out"), std::pair(out, "out")}) {
      TORCH_CHECK(
          t->defined() && t->sizes() == q->sizes(), name, ": expected the shape of q, ", q->sizes(), ", got ",
          t->sizes());
    }
    for (auto [t, name] :
         {std::pair(grad_out, "grad_out"), std::pair(q, "q"), std::pair(k, "k"), std::pair(v, "v"),
          std::pair(out, "out")}) {
      check_operand(*t, name);
    }
    const float* lses = fte::f32_table(*lse, "lse");
    TORCH_CHECK(lse->sizes() == q->sizes().slice(0, 3), "lse: expected ", q->sizes().slice(0, 3), ", got ", lse->sizes());

    at::Tensor dq_new = empty_heads(*q, s.h), dk_new = empty_heads(*k, s.g), dv_new = empty_heads(*v, s.g);
    Heads qs(*q), ks(*k), vs(*v), outs(*out), gs(*grad_out), dqs(dq_new), dks(dk_new), dvs(dv_new);
    at::parallel_for(0, s.b * s.g, 1, [&](int64_t begin, int64_t end) {
      int64_t wide = kBlock * s.padded;
      Scratch<uint32_t> k_transposed(s.d / 2 * s.padded), v_transposed(s.d / 2 * s.padded);
      Scratch<uint32_t> k_packed(s.padded / 2 * s.d), weight_pairs(wide / 2), dscore_pairs(wide / 2);
      Scratch<uint16_t> q_block(kBlock * s.d), g_block(kBlock * s.d), dscores(wide);
      Scratch<uint16_t> q_block_t(kBlock * s.d), g_block_t(kBlock * s.d);
      Scratch<float> scores(wide), dweights(wide), block(kBlock * s.d);
      Scratch<float> dk_t(s.d * s.padded), dv_t(s.d * s.padded);  // [D, T]
      float delta[kBlock];
      for (int64_t bg = begin; bg < end; bg++) {
        int64_t b = bg / s.g, g = bg % s.g;
        pack_transposed(ks.at(b, g, 0), ks.row_stride, s, k_transposed.data);
        pack_transposed(vs.at(b, g, 0), vs.row_stride, s, v_transposed.data);
        pack_rows(ks.at(b, g, 0), ks.row_stride, s.t, s.padded, s.d, k_packed.data);
        std::fill(dk_t.data, dk_t.data + s.d * s.padded, 0.0f);
        std::fill(dv_t.data, dv_t.data + s.d * s.padded, 0.0f);
        for (int64_t h = g * (s.h / s.g); h < (g + 1) * (s.h / s.g); h++) {
          for (int64_t first = 0; first < s.t; first += kBlock) {
            Span span(first, s.t, window);
            copy_block(qs.at(b, h, first), qs.row_stride, span.rows, s.d, q_block.data);
            copy_block(gs.at(b, h, first), gs.row_stride, span.rows, s.d, g_block.data);
            fte::rows().transpose16(q_block.data, s.d, kBlock, s.d, q_block_t.data, kBlock);
            fte::rows().transpose16(g_block.data, s.d, kBlock, s.d, g_block_t.data, kBlock);
            fte::rows().row_dots(
                outs.at(b, h, first), outs.row_stride, g_block.data, s.d, span.rows, s.d, delta);
            brgemm(
                kBlock, span.width, s.d, s.d, s.padded, span.width, false, left(q_block.data),
                right(k_transposed.data + span.begin_key), scores.data);
            brgemm(
                kBlock, span.width, s.d, s.d, s.padded, span.width, false, left(g_block.data),
                right(v_transposed.data + span.begin_key), dweights.data);
            fte::rows().attention_weights_backward(
                scores.data, dweights.data, static_cast<float>(scale), first, span.rows, window, span.begin_key,
                span.width, lses + (b * s.h + h) * s.t + first, delta, weight_pairs.data, dscores.data,
                dscore_pairs.data);
            brgemm(
                s.d, span.width, kBlock, kBlock, span.width, s.padded, true, left(g_block_t.data),
                right(weight_pairs.data), dv_t.data + span.begin_key);
            brgemm(
                s.d, span.width, kBlock, kBlock, span.width, s.padded, true, left(q_block_t.data),
                right(dscore_pairs.data), dk_t.data + span.begin_key);
            brgemm(
                kBlock, s.d, span.width, span.width, s.d, s.d, false, left(dscores.data),
                right(k_packed.data + span.begin_key / 2 * s.d), block.data);
            fte::rows().rows_to_bf16(block.data, nullptr, span.rows, s.d, dqs.at(b, h, first), dqs.row_stride);
          }
        }
        store_transposed(dk_t.data, s, block.data, dks.at(b, g, 0), dks.row_stride);
        store_transposed(dv_t.data, s, block.data, dvs.at(b, g, 0), dvs.row_stride);
      }
      at::native::cpublas::brgemm_release();
    });
    *grad_q = fte::give(dq_new);
    *grad_k = fte::give(dk_new);
    *grad_v = fte::give(dv_new);
  });
}
