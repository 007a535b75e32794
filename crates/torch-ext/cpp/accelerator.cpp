#include "shim.h"

#include <ATen/DeviceAccelerator.h>

namespace {

// Mirrors RawMemoryStats in src/accelerator.rs.
struct RawMemoryStats {
  int64_t allocated_bytes;
  int64_t peak_allocated_bytes;
  int64_t reserved_bytes;
  int64_t peak_reserved_bytes;
  int64_t num_alloc_retries;
  int64_t num_ooms;
};

c10::DeviceIndex index_of(int32_t index) { return static_cast<c10::DeviceIndex>(index); }

}  // namespace

FTE_API char* fte_accelerator_count(int32_t* count) {
  return fte::guarded([&] { *count = at::accelerator::deviceCount(); });
}

FTE_API char* fte_accelerator_set_current(int32_t index) {
  return fte::guarded([&] { at::accelerator::setDeviceIndex(index_of(index)); });
}

FTE_API char* fte_accelerator_synchronize(int32_t index) {
  return fte::guarded([&] { at::accelerator::synchronizeDevice(index_of(index)); });
}

FTE_API char* fte_accelerator_memory_stats(int32_t index, RawMemoryStats* stats) {
  return fte::guarded([&] {
    auto s = at::accelerator::getDeviceStats(index_of(index));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *stats = {s.allocated_bytes[all].current, s.allocated_bytes[all].peak, s.reserved_bytes[all].current,
              s.reserved_bytes[all].peak, s.num_alloc_retries, s.num_ooms};
  });
}

FTE_API char* fte_accelerator_reset_peak_memory(int32_t index) {
  return fte::guarded([&] { at::accelerator::resetPeakStats(index_of(index)); });
}
