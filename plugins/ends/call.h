// The ends of a step: the first convolution of ControlNet and of the UNet, and the last one, with guidance and update.
#pragma once

#include <cstdint>

// y = x * weight + bias, and a hint: 3×3, a border of zeros, sums in float, rounded once.
struct CannyFirst {
    const float* x;       // (samples, channels, height, width), channels up to 8
    const float* weight;  // as plugins.load.first_blocks makes it
    const float* bias;    // (filters), filters a multiple of 8
    const void* hint;     // null, or (hint_batch, height, width, filters), which all samples have in common or one each
    void* y;              // (samples, height, width, filters)
    void* repeated;       // (repeat·samples, height, width, filters): y so often, one after the other
    int32_t samples, channels, height, width, filters;
    int32_t hint_batch, repeat;  // repeat 0: there is no second result
};

// What the UNet makes of its last map, h * weight + bias, 3×3, and of that at once, in float:
//   difference = cond - uncond, e = uncond + guidance·difference, x_next = a·x + b0·e + b1·e1 + b2·e2 + noise
// Of the prompt's half alone, with the difference of before: e = cond + (guidance - 1)·difference.
// Each thread reads its numbers before it writes any, so that results may lie where x, e1, e2, noise or kept was read.
struct CannyLast {
    const void* h;              // (2·samples, height, width, channels), cond before uncond, or cond alone
    const void* weight;         // (9, filters, channels), filters up to 8, channels a multiple of 8
    const float* bias;          // (filters)
    const float* x;             // (samples, filters, height, width)
    const float* guidance;      // (1)
    const float *e1, *e2;       // as x: e of one and of two evaluations before
    const float* noise;         // as x
    const float* coefficients;  // a, b0, b1, b2
    const float* kept;          // null, or the difference, as x, where there is cond alone
    float *e, *difference, *x_next;
    int32_t samples, channels, height, width, filters;
};
