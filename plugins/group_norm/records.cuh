// What both kernels are made of: records of statistics, their merging in a fixed order, the arithmetic of the output.
//
// Statistics are in float: each thread takes mean and squares about that mean of the few values that it holds in
// registers, and such records (count, mean, squares) are merged pairwise (Chan, Golub & LeVeque 1983), always in the
// same order. Nothing cancels, and the same input gives the same bits.
#pragma once

#include "../tokens/call.h"
#include "device.cuh"
#include "plan.h"

namespace canny {

struct Params {
    const void* x;
    const float* gamma;
    const float* beta;
    const void* row;  // (1 or B, C), of the type of x; null for none
    void* y;
    float* partials;  // (B, groups, slices) records, of two launches
    int32_t channels, positions, groups, row_stride, silu;
    float epsilon;
    Plan plan;
};

// With x, which is null, still to be joined.
struct JoinParams : Params {
    CannyJoin join;
};

struct Record {
    float count, mean, squares;
};

__device__ __forceinline__ Record merge(const Record& a, const Record& b) {
    Record c;
    c.count = a.count + b.count;
    float weight = c.count > 0.f ? b.count * reciprocal_fast(c.count) : 0.f, delta = b.mean - a.mean;
    c.mean = a.mean + delta * weight;
    c.squares = a.squares + b.squares + delta * delta * a.count * weight;
    return c;
}

// The records of a warp's threads as one, for its first thread.
__device__ __forceinline__ Record merge_warp(Record a) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Record b;
        b.count = __shfl_xor_sync(0xffffffffu, a.count, step);
        b.mean = __shfl_xor_sync(0xffffffffu, a.mean, step);
        b.squares = __shfl_xor_sync(0xffffffffu, a.squares, step);
        a = merge(a, b);
    }
    return a;
}

// A block's shared memory.
struct Shared {
    Record* slots;  // (tile_groups, slots): what the threads hold
    Record* warps;  // (tile_groups, warps_a_group): what the warps have merged
    float2* norms;  // (tile_groups): mean and 1 / standard deviation

    __device__ __forceinline__ explicit Shared(const Plan& plan) {
        norms = reinterpret_cast<float2*>(shared_memory());
        slots = reinterpret_cast<Record*>(norms + plan.tile_groups);
        warps = slots + plan.tile_groups * plan.slots;
    }
};

// Warps merge the slots of their groups; `used(j)` are the slots of group j that hold records.
template <typename Used>
__device__ __forceinline__ void merge_slots(const Plan& plan, const Shared& shared, int32_t groups, Used used) {
    int32_t lane = threadIdx.x % 32, warps = blockDim.x / 32, each = plan.warps_a_group;
    for (int32_t w = threadIdx.x / 32; w < groups * each; w += warps) {
        int32_t j = divide(w, plan.by_warps), count = used(j);
        Record a = {};
        for (int32_t i = (w - j * each) * 32 + lane; i < count; i += 32 * each)
            a = merge(a, shared.slots[j * plan.slots + i]);
        a = merge_warp(a);
        if (lane == 0) shared.warps[w] = a;
    }
}

// Warps merge `count` records of each group, which `get(j, i)` reads, into its norm.
template <typename Get>
__device__ __forceinline__ void merge_norms(
    const Shared& shared, int32_t groups, int32_t count, float epsilon, Get get
) {
    int32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int32_t j = threadIdx.x / 32; j < groups; j += warps) {
        Record a = {};
        for (int32_t i = lane; i < count; i += 32) a = merge(a, get(j, i));
        a = merge_warp(a);
        if (lane == 0) shared.norms[j] = make_float2(a.mean, rsqrtf(a.squares / a.count + epsilon));
    }
}

// x · sigmoid(x) of two numbers, with one division.
__device__ __forceinline__ void silu_pair(float& u, float& v) {
    constexpr float kLog2E = 1.4426950408889634f;
    float a = 1.f + exp2_fast(fminf(u * -kLog2E, 60.f)), b = 1.f + exp2_fast(fminf(v * -kLog2E, 60.f));
    float r = reciprocal_fast(a * b);  // below 2^121
    u *= r * b;
    v *= r * a;
}

template <typename T>
__device__ __forceinline__ void finish(Vector<T>& data, const float* scale, const float* shift, bool silu) {
    float y[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; c++) y[c] = to_float(data.value[c]) * scale[c] + shift[c];
    if (silu) {
#pragma unroll
        for (int c = 0; c < kWidth; c += 2) silu_pair(y[c], y[c + 1]);
    }
#pragma unroll
    for (int c = 0; c < kWidth; c++) from_float(y[c], data.value[c]);
}

}  // namespace canny
