#include "shim.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>

FTE_API char* fte_fused_adamw(
    const fte::Handle* params, const fte::Handle* grads, const fte::Handle* exp_avgs, const fte::Handle* exp_avg_sqs,
    const fte::Handle* steps, size_t n, double lr, double beta1, double beta2, double weight_decay, double eps,
    fte::Handle grad_scale, fte::Handle found_inf) {
  return fte::guarded([&] {
    at::_fused_adamw_(
        fte::list(params, n), fte::list(grads, n), fte::list(exp_avgs, n), fte::list(exp_avg_sqs, n),
        /*max_exp_avg_sqs=*/{}, fte::list(steps, n), lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false,
        /*maximize=*/false, fte::maybe(grad_scale), *found_inf);
  });
}

FTE_API char* fte_foreach_norm(const fte::Handle* tensors, size_t n, at::Tensor** norms) {
  return fte::guarded([&] {
    auto result = at::_foreach_norm(fte::list(tensors, n), 2);
    for (size_t i = 0; i < n; i++) norms[i] = fte::give(result[i]);
  });
}
