// What lies between convolutions and matrix products: one call each, over tokens in rows of half precision.
#pragma once

#include <cstdint>

// y = (x - mean) / sqrt(variance + epsilon) · gamma + beta over the channels of each token (Ba et al. 2016).
struct CannyLayerNorm {
    const void* x;  // (tokens, channels), channels a multiple of 8
    const float* gamma;
    const float* beta;
    void* y;  // as x
    int32_t tokens, channels;
    float epsilon;
};

// y = a · GELU(b) of x = (a, b) side by side (Shazeer 2020).
struct CannyGeglu {
    const void* x;  // (tokens, 2·channels), channels a multiple of 8
    void* y;        // (tokens, channels)
    int32_t tokens, channels;
};

// y = a + b, a multiple of 8 halves each.
struct CannyAdd {
    const void* a;
    const void* b;
    void* y;
    int64_t count;
};

// y = (x, skip + scale·residual) side by side, where each row of the batch has a scale; x may have a residual, too.
struct CannyJoin {
    const void* x;           // (batch, positions, first), first a multiple of 8
    const void* skip;        // (batch, positions, second), second a multiple of 8
    const void* residual;    // as skip
    const float* scales;     // (batch), of the residual
    const void* x_residual;  // as x, or null
    const float* x_scales;   // (batch), of x_residual
    void* y;                 // (batch, positions, first + second)
    int32_t batch, positions, first, second;
};
