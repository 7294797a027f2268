// One convolution of a small map.
#pragma once

#include <cstdint>

// y = x * weight + bias (+ residual), 1×1 or 3×3 with a border of zeros, channels-last in half precision.
//
// With second_channels, stride 1 only, the products of a second map by a 1×1 weight are added, in the same sums: its
// units come behind those of the weight, for each 64 filters.
//
// With weight_sums, 1×1 only, x is normalised first: each position less its mean, over its deviation (LayerNorm without
// scale and bias, which plugins.load.fold_norm puts into weight and bias).
//
// With cross, 1×1 only, the weights are a text's, for each row of the batch its own: `weight` is a map (batch, words,
// text_pitch) with 2·heads·C numbers in each line and one more for each head, C being the cross-attention's channels.
// cross 1: x, of a batch of x_batch that is taken in turn, goes through a LayerNorm without scale and bias (the mean falls
// out where a word's numbers add up to 0) and is multiplied by each head's first C numbers of each word; y is the softmax,
// base 2, of that plus the head's last number, in 80 columns for each head, which are the filters. cross 2: x is that, and
// y the sum over heads and words of x times the head's second C numbers, with bias and residual.
//
// With up, 3×3 of stride 1 without residual and second map only, it is of x with every position doubled along both axes
// (nearest neighbours): y has four phases, of even and odd lines and columns, each a 2×2 convolution of x itself by the sums
// of the filters' taps that fall on the same position (plugins.load.up_phases): 4/9 of the products, and no map between.
//
// With gate, 1×1 without a residual only, y is a · GELU(b) and half as wide: filters are 8 of a, 8 of b, 8 of a, …
struct CannyConv {
    const void* x;         // (B, height, width, channels), channels a multiple of 64
    const void* weight;    // (filters / 64, channels / 64 · size·size + second_channels / 64, 64, 64), see conv_blocks;
                           // with up (4·filters / 64, channels / 64 · 4, 64, 64), one phase after the other
    const float* bias;     // (filters), a multiple of 64
    const void* residual;  // (residual_batch, height / stride, width / stride, filters), taken in turn; or null
    const float* weight_sums;  // (filters), each the sum of a filter's weights; or null
    const void* second;        // (B, height, width, second_channels); or null
    void* y;               // (B, height / stride, width / stride, filters), quotients rounded up; (B, 2·height, …) with up
    int32_t batch, height, width, channels, filters, size, stride, residual_batch;
    int32_t second_channels;      // a multiple of 64; 0 without a second map
    int32_t cluster, high, wide;  // blocks that share a tile, rows and filters of a tile; 0: chosen from the shape
    float epsilon;                // added to the variance, with weight_sums
    int32_t gate;                 // 0 or 1
    int32_t beside;               // 1: kernels of another stream are to run beside it
    int32_t cross;                // 0; 1 for a cross-attention's scores, 2 for its values
    int32_t x_batch, words, text_pitch;  // with cross
    int32_t up;                          // 0 or 1
};
