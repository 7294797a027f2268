// The last convolution of a step, many channels in half precision to few filters, and guidance and update of what it
// makes, which is never rounded to half.
//
// A block has 8 positions in a row of one sample and nine warps, one for each tap of the 3×3. In the fragments of
// mma.m16n8k16 cond has rows 0 to 7 and uncond rows 8 to 15, the filters are the 8 columns. Which channel a column of a
// stands for is free as long as b has the same: so a lane reads 8 channels of its row at once, and gives them to two
// products.
#pragma once

#include "call.h"

#include "../attention/mma.cuh"

namespace canny {

constexpr int kLastTaps = 9, kLastPositions = 8, kLastFilters = 8;
constexpr int kLastChannels = 32, kLastHeld = 5;  // of two products; of which so many are read before any is done

// 16 bytes, zeros where they are not `there`.
__device__ __forceinline__ uint4 load_16(const __half* from, bool there) {
    uint4 is = {0, 0, 0, 0};
    if (there) is = *reinterpret_cast<const uint4*>(from);
    return is;
}

// Of kLastHeld times 32 channels of a row those that this lane has, 8 each; zeros where there are none.
__device__ __forceinline__ void load_row(
    uint4 (&held)[kLastHeld], const __half* row, int32_t first, int32_t channels, bool there
) {
#pragma unroll
    for (int i = 0; i < kLastHeld; i++) {
        int32_t channel = first + i * kLastChannels;
        held[i] = load_16(row + channel, there && channel < channels);
    }
}

__global__ void __launch_bounds__(32 * kLastTaps, 2) last(const CannyLast p) {
    float* sums = reinterpret_cast<float*>(shared_memory());  // (kLastTaps, 16, kLastFilters)
    int32_t tap = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, mine = lane % 4 * kWidth;
    int32_t area = p.height * p.width, tiles = (area + kLastPositions - 1) / kLastPositions;
    int32_t sample = blockIdx.x / tiles, begin = (blockIdx.x - sample * tiles) * kLastPositions;
    int32_t at = begin + row, line = at / p.width, column = at - line * p.width;
    line += tap / 3 - 1;
    column += tap % 3 - 1;
    bool both = p.kept == nullptr;
    bool inside = at < area && uint32_t(line) < uint32_t(p.height) && uint32_t(column) < uint32_t(p.width);
    const __half* cond = static_cast<const __half*>(p.h);
    cond += (int64_t(sample) * area + (inside ? line * p.width + column : 0)) * p.channels;
    const __half* uncond = cond + (both ? int64_t(p.samples) * area * p.channels : 0);
    bool is_filter = row < p.filters;
    const __half* weight = static_cast<const __half*>(p.weight);
    weight += int64_t(tap * p.filters + (is_filter ? row : 0)) * p.channels;

    // Constants, which are there before the kernel before this one has ended.
    uint4 a[kLastHeld], a_other[kLastHeld], b[kLastHeld];
    load_row(b, weight, mine, p.channels, is_filter);
    int32_t filter = threadIdx.x / kLastPositions, position = threadIdx.x % kLastPositions;
    bool ends = filter < p.filters && begin + position < area;  // whether this thread makes a number of e
    float bias = ends ? p.bias[filter] : 0.f;
    wait_for_previous();

    // What the update needs comes while products are made.
    int64_t i = (int64_t(sample) * p.filters + filter) * area + begin + position;
    float x = 0.f, e1 = 0.f, e2 = 0.f, noise = 0.f, kept = 0.f, guidance = 0.f;
    float4 c = {0.f, 0.f, 0.f, 0.f};
    if (ends) {
        x = p.x[i], e1 = p.e1[i], e2 = p.e2[i], noise = p.noise[i], guidance = *p.guidance;
        c = {p.coefficients[0], p.coefficients[1], p.coefficients[2], p.coefficients[3]};
        if (!both) kept = p.kept[i];
    }
    float made[2][4] = {};  // of the two products of each read, so that neither waits for the other
#pragma unroll 1
    for (int32_t first = 0; first < p.channels; first += kLastHeld * kLastChannels) {
        load_row(a, cond, first + mine, p.channels, inside);
        load_row(a_other, uncond, first + mine, p.channels, inside && both);
#pragma unroll
        for (int k = 0; k < kLastHeld; k++) {
            uint32_t low[4] = {a[k].x, a_other[k].x, a[k].y, a_other[k].y};
            uint32_t high[4] = {a[k].z, a_other[k].z, a[k].w, a_other[k].w};
            multiply(made[0], low, b[k].x, b[k].y);
            multiply(made[1], high, b[k].z, b[k].w);
        }
        load_row(b, weight, first + kLastHeld * kLastChannels + mine, p.channels, is_filter);
    }
    float* to = sums + (tap * 16 + row) * kLastFilters + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < 4; k++) to[k / 2 * 8 * kLastFilters + k % 2] = made[0][k] + made[1][k];
    __syncthreads();
    let_next_begin();

    if (!ends) return;
    float of_cond = bias, of_uncond = bias;
#pragma unroll
    for (int k = 0; k < kLastTaps; k++) {
        of_cond += sums[(k * 16 + position) * kLastFilters + filter];
        of_uncond += sums[(k * 16 + 8 + position) * kLastFilters + filter];
    }
    float difference = both ? of_cond - of_uncond : kept;
    float e = both ? of_uncond + guidance * difference : of_cond + (guidance - 1.f) * difference;
    float x_next = c.x * x + c.y * e + c.z * e1 + c.w * e2 + noise;
    if (both) p.difference[i] = difference;
    p.e[i] = e;
    p.x_next[i] = x_next;
}

// Do a call with `launch(kernel, blocks, threads, bytes, call)`; false where its shape has no kernel.
template <typename Launch>
bool run_last(const CannyLast& call, Launch&& launch) {
    bool sizes = call.samples > 0 && call.channels > 0 && call.height > 0 && call.width > 0 && call.filters > 0;
    if (!sizes || call.filters > kLastFilters || call.channels % kWidth) return false;
    int64_t area = int64_t(call.height) * call.width;
    int64_t blocks = call.samples * ((area + kLastPositions - 1) / kLastPositions);
    if (area > INT32_MAX - kLastPositions || blocks > INT32_MAX) return false;
    int32_t bytes = kLastTaps * 16 * kLastFilters * int32_t(sizeof(float));
    return launch(last, dim3(uint32_t(blocks)), 32 * kLastTaps, bytes, call);
}

}  // namespace canny
