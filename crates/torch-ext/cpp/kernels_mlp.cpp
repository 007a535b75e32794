#include "kernels.h"

#include <ATen/ops/empty_like.h>

FTE_API char* fte_silu_mul(fte::Handle gate, fte::Handle up, at::Tensor** h) {
  return fte::guarded([&] {
    fte::Matrix gs = fte::matrix(*gate, "gate"), us = fte::matrix_like(*up, *gate, "up", "gate");
    at::Tensor h_new = at::empty_like(*gate, at::MemoryFormat::Contiguous);
    fte::Matrix hs = fte::matrix(h_new, "h");
    fte::parallel_rows(fte::num_rows(*gate), gs.width, [&](int64_t begin, int64_t end) {
      fte::rows().silu_mul(gs, us, hs, begin, end);
    });
    *h = fte::give(h_new);
  });
}

FTE_API char* fte_silu_mul_backward(
    fte::Handle dh, fte::Handle gate, fte::Handle up, at::Tensor** dgate, at::Tensor** dup) {
  return fte::guarded([&] {
    fte::Matrix gs = fte::matrix(*gate, "gate"), us = fte::matrix_like(*up, *gate, "up", "gate");
    fte::Matrix dhs = fte::matrix_like(*dh, *gate, "dh", "gate");
    at::Tensor dgate_new = at::empty_like(*gate, at::MemoryFormat::Contiguous);
    at::Tensor dup_new = at::empty_like(dgate_new);
    fte::Matrix dgs = fte::matrix(dgate_new, "dgate"), dus = fte::matrix(dup_new, "dup");
    fte::parallel_rows(fte::num_rows(*gate), gs.width, [&](int64_t begin, int64_t end) {
      fte::rows().silu_mul_backward(dhs, gs, us, dgs, dus, begin, end);
    });
    *dgate = fte::give(dgate_new);
    *dup = fte::give(dup_new);
  });
}
