#include "kernels.h"

FTE_API char* fte_accumulate(fte::Handle dst, fte::Handle src, bool overwrite) {
  return fte::guarded([&] {
    fte::check_plain(*dst, "dst");
    fte::check_plain(*src, "src");
    TORCH_CHECK(dst->scalar_type() == at::kFloat, "dst: expected float32, got ", dst->scalar_type());
    TORCH_CHECK(
        dst->is_contiguous() && src->is_contiguous() && dst->numel() == src->numel(),
        "dst and src: expected contiguous tensors with the same number of elements, got sizes ", dst->sizes(), " and ",
        src->sizes(), ", strides ", dst->strides(), " and ", src->strides());
    auto* to = dst->mutable_data_ptr<float>();
    const void* from = src->const_data_ptr();
    fte::Dtype dtype = fte::dtype_of(*src, "src");
    fte::parallel_rows(dst->numel(), 1, [&](int64_t begin, int64_t end) {
      fte::rows().accumulate(to, from, dtype, overwrite, begin, end);
    });
    dst->unsafeGetTensorImpl()->bump_version();
  });
}
