// What an H200 and an H100 have room for: calls are cut for these, others only take longer.
#pragma once

#include <cstdint>

namespace canny {

constexpr int32_t kProcessors = 132;

// So many clusters of 1, 2, … blocks at once that fill a processor each, of blocks half as large twice as many.
constexpr int32_t kClustersAtOnce[] = {132, 66, 39, 30, 22, 18, 16, 15};

}  // namespace canny
