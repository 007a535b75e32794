#include "shim.h"

#include <cstdlib>
#include <cstring>

namespace fte {

char* first_line(const char* text) noexcept {
  size_t length = std::strcspn(text, "\n");
  auto* copy = static_cast<char*>(std::malloc(length + 1));
  if (!copy) std::abort();
  std::memcpy(copy, text, length);
  copy[length] = '\0';
  return copy;
}

}  // namespace fte

FTE_API void fte_free_error(char* message) { std::free(message); }
