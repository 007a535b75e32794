#include "rows.h"

namespace fte {

extern const RowKernels rows_base;
#ifdef __x86_64__
extern const RowKernels rows_v3, rows_v4;
#endif

const RowKernels& rows() {
#ifdef __x86_64__
  static const RowKernels& best = __builtin_cpu_supports("x86-64-v4") ? rows_v4
      : __builtin_cpu_supports("x86-64-v3")                           ? rows_v3
                                                                      : rows_base;
  return best;
#else
  return rows_base;
#endif
}

}  // namespace fte
