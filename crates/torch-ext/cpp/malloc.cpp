#include "shim.h"

#include <c10/core/CPUAllocator.h>

#include <malloc.h>

#include <cstdlib>

namespace {

constexpr size_t kAlignBytes = 64;

// Aligned blocks on malloc. libtorch's own allocator uses posix_memalign, whose leftovers before and behind a block
// keep glibc from joining it with its neighbours when it is freed, so that a tensor of the same size finds no place.
struct HeapAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &release, at::kCPU};
    void* base = n <= SIZE_MAX - kAlignBytes ? std::malloc(n + kAlignBytes) : nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, base != nullptr, "out of host memory: cannot allocate ", n, " bytes");
    // malloc aligns to 16 bytes: there is room for the base before the data.
    auto data = (reinterpret_cast<uintptr_t>(base) + kAlignBytes) / kAlignBytes * kAlignBytes;
    reinterpret_cast<void**>(data)[-1] = base;
    auto* block = reinterpret_cast<void*>(data);
    return {block, block, &release, at::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }

  static void release(void* block) {
    if (block) std::free(static_cast<void**>(block)[-1]);
  }
};

HeapAllocator heap;

}  // namespace

// Returns whether all settings were taken.
FTE_API bool fte_tune_malloc() {
#ifdef __GLIBC__
  constexpr int kHeapBelowBytes = 1 << 30;
  constexpr int kGrowBytes = 64 << 20;
  // Heaps of further arenas end at 64 MiB and are unmapped when empty: one arena for all threads.
  bool taken = mallopt(M_ARENA_MAX, 1) && mallopt(M_MMAP_THRESHOLD, kHeapBelowBytes) &&
      mallopt(M_TRIM_THRESHOLD, kHeapBelowBytes) && mallopt(M_TOP_PAD, kGrowBytes);
  if (taken) c10::SetCPUAllocator(&heap, /*priority=*/100);
  return taken;
#else
  return false;
#endif
}
