// The C boundary: every exported function returns nullptr, or a message to be freed with fte_free_error.
// Outputs are written only on success.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#define FTE_API extern "C" __attribute__((visibility("default")))

namespace fte {

// Tensors cross the boundary as tch's handles, which are at::Tensor on the heap; a null one is an absent tensor.
using Handle = const at::Tensor*;

// A copy of the first line of `text` on the C heap.
char* first_line(const char* text) noexcept;

template <class F>
char* guarded(F&& body) noexcept {
  try {
    std::forward<F>(body)();
    return nullptr;
  } catch (const c10::Error& e) {
    return first_line(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return first_line(e.what());
  } catch (...) {
    return first_line("unknown C++ exception");
  }
}

inline std::vector<at::Tensor> list(const Handle* handles, size_t n) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(n);
  for (size_t i = 0; i < n; i++) tensors.push_back(*handles[i]);
  return tensors;
}

inline std::optional<at::Tensor> maybe(Handle handle) {
  return handle ? std::optional<at::Tensor>(*handle) : std::nullopt;
}

inline std::optional<double> maybe(const double* value) {
  return value ? std::optional<double>(*value) : std::nullopt;
}

inline at::Tensor* give(at::Tensor tensor) { return new at::Tensor(std::move(tensor)); }

}  // namespace fte
