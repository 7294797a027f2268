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

// The end of a step, in float: guidance and the update of x.
//   difference = cond - uncond, e = uncond + guidance·difference, x_next = a·x + b0·e + b1·e1 + b2·e2 + noise
// Of the prompt's half alone, with the difference of before: e = cond + (guidance - 1)·difference.
// Each thread reads its numbers before it writes any, so that results may lie where something was read.
struct CannyUpdate {
    const float* x;             // (samples, channels, positions)
    const void* both;           // (2·samples, channels, positions), cond before uncond, of half or float; cond alone
    const float* guidance;      // (1)
    const float *e1, *e2;       // as x: e of one and of two evaluations before
    const float* noise;         // as x
    const float* coefficients;  // a, b0, b1, b2
    const float* kept;          // null, or the difference, as x, where there is cond alone
    float *e, *difference, *x_next;
    int32_t samples, channels, positions;
    int32_t half;   // whether `both` is
    int32_t pitch;  // 0, or that of `both` where it is channels-last: (rows, positions, pitch)
};
