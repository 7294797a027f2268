// One convolution of a small map.
#pragma once

#include <cstdint>

// y = x * weight + bias (+ residual), 1×1 or 3×3 with a border of zeros, channels-last in half precision.
//
// With weight_sums, 1×1 only, x is normalised first: each position less its mean, over its deviation (LayerNorm without
// scale and bias, which plugins.load.fold_norm puts into weight and bias).
//
// With gate, 1×1 without a residual only, y is a · GELU(b) and half as wide: filters are 8 of a, 8 of b, 8 of a, …
struct CannyConv {
    const void* x;         // (B, height, width, channels), channels a multiple of 64
    const void* weight;    // (filters / 64, channels / 64 · size·size, 64, 64) as plugins.load.conv_blocks makes it
    const float* bias;     // (filters), a multiple of 64
    const void* residual;  // (residual_batch, height / stride, width / stride, filters), taken in turn; or null
    const float* weight_sums;  // (filters), each the sum of a filter's weights; or null
    void* y;               // (B, height / stride, width / stride, filters), quotients rounded up
    int32_t batch, height, width, channels, filters, size, stride, residual_batch;
    int32_t cluster, high, wide;  // blocks that share a tile, rows and filters of a tile; 0: chosen from the shape
    float epsilon;                // added to the variance, with weight_sums
    int32_t gate;                 // 0 or 1
};
