#include "shim.h"

#include <ATen/ops/empty.h>

FTE_API char* fte_empty_pinned(const int64_t* size, size_t dims, fte::Handle dtype_of, at::Tensor** tensor) {
  return fte::guarded([&] {
    auto options = at::TensorOptions().dtype(dtype_of->scalar_type()).pinned_memory(true);
    *tensor = fte::give(at::empty(at::IntArrayRef(size, dims), options));
  });
}

FTE_API char* fte_copy(fte::Handle dst, fte::Handle src, bool non_blocking) {
  return fte::guarded([&] { dst->copy_(*src, non_blocking); });
}
