// The first convolution: few channels in float to many filters in half precision, channels-last.
//
// A lane keeps the weights of two filters in registers, all of them, and goes over positions. Their numbers lie in
// shared memory, 36 or 72 in a row, and all lanes read the same: 16 bytes for eight products of a lane. A warp writes
// the 64 filters of a position as one line of 128 bytes.
#pragma once

#include "call.h"

#include "../attention/mma.cuh"

namespace canny {

constexpr int kFirstWarps = 4, kFirstHeld = 8;  // of a block; positions that a warp has
constexpr int kFirstPositions = 32, kFirstFilters = 64;  // of a block; a lane gathers the numbers of one position
static_assert(kFirstPositions == kFirstWarps * kFirstHeld);

// Two halves, moved at once.
struct alignas(4) Pair {
    __half value[2];

    __device__ __forceinline__ void load(const __half* from) {
        *reinterpret_cast<uint32_t*>(this) = *reinterpret_cast<const uint32_t*>(from);
    }
    __device__ __forceinline__ void store(__half* to) const {
        *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(this);
    }
};

// What the 3×3 around a block's positions has of x, (kFirstPositions, kChannels, 9): zeros beyond the border and beyond
// the channels of x.
template <int kChannels>
__device__ __forceinline__ void gather(const CannyFirst& p, float* gathered) {
    int32_t lane = threadIdx.x % 32, position = blockIdx.x * kFirstPositions + lane, area = p.height * p.width;
    int32_t sample = position / area, at = position - sample * area, line = at / p.width, column = at - line * p.width;
    for (int32_t channel = threadIdx.x / 32; channel < kChannels; channel += kFirstWarps) {
        bool there = sample < p.samples && channel < p.channels;
        const float* x = p.x + (int64_t(sample) * p.channels + channel) * area + at;
        float* to = gathered + (lane * kChannels + channel) * 9;
#pragma unroll
        for (int32_t tap = 0; tap < 9; tap++) {
            int32_t down = tap / 3 - 1, right = tap % 3 - 1;
            bool high = uint32_t(line + down) < uint32_t(p.height), wide = uint32_t(column + right) < uint32_t(p.width);
            to[tap] = there && high && wide ? x[down * p.width + right] : 0.f;
        }
    }
}

template <int kChannels>
__global__ void __launch_bounds__(32 * kFirstWarps) first(const CannyFirst p) {
    constexpr int kTaps = 9 * kChannels;
    float* gathered = reinterpret_cast<float*>(shared_memory());
    int32_t lane = threadIdx.x % 32, filter = blockIdx.y * kFirstFilters + 2 * lane;
    // Constants come before the kernel before this one has ended. Four weights: two taps of two filters.
    const float4* weight = reinterpret_cast<const float4*>(p.weight) + blockIdx.y * (kTaps / 2 * 32) + lane;
    float4 by[kTaps / 2];
#pragma unroll
    for (int i = 0; i < kTaps / 2; i++) by[i] = weight[i * 32];
    bool mine = filter < p.filters;
    float2 bias = mine ? *reinterpret_cast<const float2*>(p.bias + filter) : make_float2(0.f, 0.f);
    wait_for_previous();
    gather<kChannels>(p, gathered);
    __syncthreads();

    int32_t area = p.height * p.width, count = p.samples * area, begin = threadIdx.x / 32 * kFirstHeld;
    const __half* hints = static_cast<const __half*>(p.hint);
    // Two positions at a time: more would be more code, which each launch fetches anew.
#pragma unroll 1
    for (int32_t held = begin; held < begin + kFirstHeld; held += 2) {
        int32_t position = blockIdx.x * kFirstPositions + held;
        Pair hint[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (p.hint_batch && mine && position + i < count) {
                int32_t of_hint = p.hint_batch == p.samples ? position + i : (position + i) % area;
                hint[i].load(hints + int64_t(of_hint) * p.filters + filter);
            }
        float sums[2][2] = {{bias.x, bias.y}, {bias.x, bias.y}};
#pragma unroll
        for (int tap = 0; tap < kTaps; tap += 4)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 x = *reinterpret_cast<const float4*>(gathered + (held + i) * kTaps + tap);
                float4 low = by[tap / 2], high = by[tap / 2 + 1];
                sums[i][0] = fmaf(x.w, high.z, fmaf(x.z, high.x, fmaf(x.y, low.z, fmaf(x.x, low.x, sums[i][0]))));
                sums[i][1] = fmaf(x.w, high.w, fmaf(x.z, high.y, fmaf(x.y, low.w, fmaf(x.x, low.y, sums[i][1]))));
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!mine || position + i >= count) break;
            Pair y;
            for (int k = 0; k < 2; k++) from_float(sums[i][k] + to_float(hint[i].value[k]), y.value[k]);
            int64_t at = int64_t(position + i) * p.filters + filter;
            y.store(static_cast<__half*>(p.y) + at);
#pragma unroll 1
            for (int32_t k = 0; k < p.repeat; k++)
                y.store(static_cast<__half*>(p.repeated) + int64_t(k) * count * p.filters + at);
        }
    }
}

// Do a call with `launch(kernel, blocks, threads, bytes, call)`; false where its shape has no kernel.
template <typename Launch>
bool run_first(const CannyFirst& call, Launch&& launch) {
    bool sizes = call.samples > 0 && call.channels > 0 && call.height > 0 && call.width > 0 && call.filters > 0;
    bool hint = call.hint_batch == 0 || call.hint_batch == 1 || call.hint_batch == call.samples;
    int64_t count = int64_t(call.samples) * call.height * call.width;
    int32_t slices = (call.filters + kFirstFilters - 1) / kFirstFilters;
    if (!sizes || !hint || call.repeat < 0 || call.channels > 8 || call.filters % kWidth) return false;
    if (count > INT32_MAX - kFirstPositions || slices > UINT16_MAX) return false;
    dim3 grid(uint32_t((count + kFirstPositions - 1) / kFirstPositions), slices);
    auto with = [&](auto kernel, int32_t channels) {
        return launch(kernel, grid, 32 * kFirstWarps, kFirstPositions * 9 * channels * int32_t(sizeof(float)), call);
    };
    return call.channels <= 4 ? with(first<4>, 4) : with(first<8>, 8);
}

}  // namespace canny
