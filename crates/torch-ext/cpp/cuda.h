#pragma once

#include <utility>

namespace fte {

// Major and minor, as the driver says; asked once for each device. Throws where there is no driver.
std::pair<int, int> compute_capability(int index);

}  // namespace fte
