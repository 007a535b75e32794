#include "shim.h"

#include <torch/csrc/autograd/autograd.h>

FTE_API char* fte_grad(
    const fte::Handle* outputs, size_t num_outputs, const fte::Handle* inputs, size_t num_inputs,
    const fte::Handle* grad_outputs, size_t num_grad_outputs, bool retain_graph, bool allow_unused,
    at::Tensor** grads) {
  return fte::guarded([&] {
    auto result = torch::autograd::grad(
        fte::list(outputs, num_outputs), fte::list(inputs, num_inputs), fte::list(grad_outputs, num_grad_outputs),
        retain_graph, /*create_graph=*/false, allow_unused);
    for (size_t i = 0; i < num_inputs; i++) grads[i] = result[i].defined() ? fte::give(result[i]) : nullptr;
  });
}
