#include "kernels.h"

#include <ATen/ops/scalar_tensor.h>

namespace {

constexpr int64_t kIgnore = -100;  // mirrors IGNORE_INDEX in src/kernels.rs

}  // namespace

FTE_API char* fte_cross_entropy(
    fte::Handle logits, fte::Handle targets, fte::Handle scale, at::Tensor** loss_sum) {
  return fte::guarded([&] {
    fte::Matrix xs = fte::matrix(*logits, "logits");
    TORCH_CHECK(xs.width > 0, "logits: expected at least one class, got ", logits->sizes());
    int64_t n = fte::num_rows(*logits);
    fte::check_plain(*targets, "targets");
    TORCH_CHECK(
        targets->scalar_type() == at::kLong && targets->is_contiguous() && targets->numel() == n,
        "targets: expected ", n, " contiguous int64, one for each row of logits, got ", targets->scalar_type(), " ",
        targets->sizes());
    const int64_t* ids = targets->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; i++) {
      TORCH_CHECK(
          ids[i] == kIgnore || (ids[i] >= 0 && ids[i] < xs.width), "targets: expected ", kIgnore, " or 0 to ",
          xs.width - 1, ", got ", ids[i], " in row ", i);
    }
    auto factor = static_cast<float>(scale->item<double>());
    std::vector<double> losses(n);
    fte::parallel_rows(n, xs.width, [&](int64_t begin, int64_t end) {
      fte::rows().cross_entropy(xs, ids, factor, losses.data(), begin, end);
    });
    logits->unsafeGetTensorImpl()->bump_version();
    double sum = 0;
    for (double loss : losses) sum += loss;
    *loss_sum = fte::give(at::scalar_tensor(sum, at::kDouble));
  });
}
