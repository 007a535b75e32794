// Causal attention on CUDA: libtorch's flash attention, by cumulative lengths of the sequences, or where that does not
// go (f32, very wide heads, old cards) its memory-efficient attention. Both keep memory linear in the sequence.
//
// B batch, H query heads, G key heads (H / G queries' heads share one), T positions, D head width, N = B * T. Kernels
// want a head width that is a multiple of 8: another one is filled up with zeros, which change no product.
#include "cuda.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

namespace {

constexpr int64_t kCausalFromTopLeft = 1;  // of libtorch's enum sdp::CustomMaskType

struct Shape {
  int64_t b, h, g, t, d;
  int64_t padded;  // d up to a multiple of 8
};

Shape check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  for (auto [t, name] : {std::pair(&q, "q"), std::pair(&k, "k"), std::pair(&v, "v")}) {
    TORCH_CHECK(t->defined() && t->is_cuda(), name, ": expected a CUDA tensor");
    TORCH_CHECK(
        t->scalar_type() == q.scalar_type(), name, ": expected ", q.scalar_type(), " as q, got ", t->scalar_type());
  }
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3) &&
          k.size(1) > 0 && q.size(1) % k.size(1) == 0,
      "q and k: expected [B, H, T, D] and [B, G, T, D] with G dividing H, got ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "v: expected the shape of k, ", k.sizes(), ", got ", v.sizes());
  TORCH_CHECK(q.numel() > 0, "q: expected elements, got ", q.sizes());
  int64_t d = q.size(3);
  return {q.size(0), q.size(1), k.size(1), q.size(2), d, (d + 7) / 8 * 8};
}

// What libtorch's own choice asks of a flash kernel with a backward.
bool flash_fits(const at::Tensor& q, const Shape& s) {
  if (q.scalar_type() != at::kBFloat16 && q.scalar_type() != at::kHalf) return false;
  auto [major, minor] = fte::compute_capability(q.device().index());
  bool much_shared_memory = (major == 8 && minor == 0) || major == 9 || major == 10;
  return major >= 8 && s.padded <= (much_shared_memory ? 256 : 192);
}

// How far to the left a position sees: -1 is all the way, which is another kernel. A sequence of one position always
// has a window, as libtorch takes it for decoding otherwise and orders the logsumexp in another way.
int64_t left_of(int64_t window, const Shape& s) { return window >= s.t && s.t > 1 ? -1 : std::min(window, s.t) - 1; }

// Where each sequence starts among all tokens, and where the last one ends: [B + 1].
at::Tensor starts(const at::Tensor& q, const Shape& s) {
  return at::arange(0, s.b * s.t + 1, s.t, q.options().dtype(at::kInt));
}

// [B, heads, T, D] -> [B, T, heads, padded], without a copy where the width is a multiple of 8.
at::Tensor by_position(const at::Tensor& x, const Shape& s) {
  at::Tensor t = x.transpose(1, 2);
  return s.padded == s.d ? t : at::constant_pad_nd(t, {0, s.padded - s.d});
}

// [B, T, heads, padded] -> [B, heads, T, D].
at::Tensor by_head(const at::Tensor& x, const Shape& s) {
  return (s.padded == s.d ? x : x.narrow(3, 0, s.d)).transpose(1, 2);
}

// [B, heads, T, D] -> [N, heads, padded], without a copy where the tokens' layout is that already.
at::Tensor tokens(const at::Tensor& x, const Shape& s) {
  return by_position(x, s).reshape({s.b * s.t, x.size(1), s.padded});
}

// [N, heads, padded] -> [B, heads, T, D].
at::Tensor heads(const at::Tensor& x, const Shape& s) {
  return by_head(x.view({s.b, s.t, x.size(1), s.padded}), s);
}

// [B, G, T, D] -> [B, T, H, padded], each key head repeated for its query heads.
at::Tensor repeated(const at::Tensor& x, const Shape& s) {
  at::Tensor t = by_position(x, s);
  if (s.g == s.h) return t;
  return t.unsqueeze(3).expand({s.b, s.t, s.g, s.h / s.g, s.padded}).reshape({s.b, s.t, s.h, s.padded});
}

// The gradient of `repeated`.
at::Tensor summed(const at::Tensor& grad, const Shape& s) {
  if (s.g == s.h) return by_head(grad, s);
  return by_head(grad.view({s.b, s.t, s.g, s.h / s.g, s.padded}).sum(3), s);
}

std::optional<int64_t> window_of(int64_t window, const Shape& s) {
  return window < s.t ? std::optional(window) : std::nullopt;
}

}  // namespace

FTE_API char* fte_causal_attention_cuda(
    fte::Handle q, fte::Handle k, fte::Handle v, double scale, int64_t window, at::Tensor** out, at::Tensor** lse) {
  return fte::guarded([&] {
    Shape s = check_shapes(*q, *k, *v);
    at::NoGradGuard no_grad;
    if (flash_fits(*q, s)) {
      at::Tensor cumulative = starts(*q, s);
      int64_t left = left_of(window, s);
      auto result = at::_flash_attention_forward(
          tokens(*q, s), tokens(*k, s), tokens(*v, s), cumulative, cumulative, s.t, s.t, /*dropout_p=*/0.0,
          /*is_causal=*/left < 0, /*return_debug_mask=*/false, scale, left, /*window_size_right=*/0);
      *out = fte::give(heads(std::get<0>(result), s));
      *lse = fte::give(std::get<1>(result));  // [H, N]
    } else {
      auto result = at::_efficient_attention_forward(
          by_position(*q, s), repeated(*k, s), repeated(*v, s), /*bias=*/{}, /*cu_seqlens_q=*/{}, /*cu_seqlens_k=*/{},
          /*max_seqlen_q=*/std::nullopt, /*max_seqlen_k=*/std::nullopt, /*dropout_p=*/0.0, kCausalFromTopLeft,
          /*compute_log_sumexp=*/true, scale, /*seqlen_k=*/{}, window_of(window, s));
      *out = fte::give(by_head(std::get<0>(result), s));
      *lse = fte::give(std::get<1>(result));  // [B, H, T up to a multiple of 32]
    }
  });
}

FTE_API char* fte_causal_attention_cuda_backward(
    fte::Handle grad_out, fte::Handle q, fte::Handle k, fte::Handle v, fte::Handle out, fte::Handle lse, double scale,
    int64_t window, at::Tensor** grad_q, at::Tensor** grad_k, at::Tensor** grad_v) {
  return fte::guarded([&] {
    Shape s = check_shapes(*q, *k, *v);
    for (auto [t, name] : {std::pair(grad_out, "grad_out"), std::pair(out, "out")}) {
      TORCH_CHECK(
          t->defined() && t->sizes() == q->sizes() && t->scalar_type() == q->scalar_type(), name,
          ": expected the shape and dtype of q, ", q->scalar_type(), " ", q->sizes(), ", got ", t->scalar_type(), " ",
          t->sizes());
    }
    at::NoGradGuard no_grad;
    // Dropout's state, which is read only where there is dropout.
    auto unused = [&](at::IntArrayRef size, at::ScalarType dtype) {
      return at::empty(size, q->options().dtype(dtype));
    };
    if (flash_fits(*q, s)) {
      TORCH_CHECK(
          lse->sizes() == at::IntArrayRef({s.h, s.b * s.t}), "lse: expected [", s.h, ", ", s.b * s.t, "], got ",
          lse->sizes());
      at::Tensor cumulative = starts(*q, s);
      int64_t left = left_of(window, s);
      auto [dq, dk, dv] = at::_flash_attention_backward(
          tokens(*grad_out, s), tokens(*q, s), tokens(*k, s), tokens(*v, s), tokens(*out, s), *lse, cumulative,
          cumulative, s.t, s.t, /*dropout_p=*/0.0, /*is_causal=*/left < 0, unused({2}, at::kUInt64),
          unused({}, at::kUInt64), scale, left, /*window_size_right=*/0);
      *grad_q = fte::give(heads(dq, s));
      *grad_k = fte::give(heads(dk, s));
      *grad_v = fte::give(heads(dv, s));
    } else {
      TORCH_CHECK(
          lse->dim() == 3 && lse->size(0) == s.b && lse->size(1) == s.h && lse->size(2) >= s.t, "lse: expected [", s.b,
          ", ", s.h, ", at least ", s.t, "], got ", lse->sizes());
      auto [dq, dk, dv, dbias] = at::_efficient_attention_backward(
          by_position(*grad_out, s), by_position(*q, s), repeated(*k, s), repeated(*v, s), /*bias=*/{},
          by_position(*out, s), /*cu_seqlens_q=*/{}, /*cu_seqlens_k=*/{}, s.t, s.t, *lse, /*dropout_p=*/0.0,
          unused({}, at::kLong), unused({}, at::kLong), kCausalFromTopLeft, /*bias_requires_grad=*/false, scale,
          /*num_splits_key=*/std::nullopt, window_of(window, s));
      *grad_q = fte::give(by_head(dq, s));
      *grad_k = fte::give(summed(dk, s));
      *grad_v = fte::give(summed(dv, s));
    }
  });
}
