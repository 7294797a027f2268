// One convolution of a small map.
#pragma once

#include <cstdint>

// y = x * weight + bias (+ residual), 1×1 or 3×3 with a border of zeros, channels-last in half precision.
struct CannyConv {
    const void* x;         // (B, height, width, channels), channels a multiple of 64
    const void* weight;    // (filters, size, size, channels), filters a multiple of 64
    const float* bias;     // (filters)
    const void* residual;  // (residual_batch, height / stride, width / stride, filters), taken in turn; or null
    void* y;               // (B, height / stride, width / stride, filters), halves rounded up
    int32_t batch, height, width, channels, filters, size, stride, residual_batch;
    int32_t max_cluster;  // blocks that may share one tile: 1, or 8 where the GPU has clusters
};
