// What both kernels are made of: records of statistics, their merging in a fixed order, the arithmetic of the output.
//
// Statistics are in float: each thread takes mean and squares about that mean of the few values that it holds in
// registers, and such records (count, mean, squares) are merged, always in the same order: pairwise where a thread goes
// over many values (Chan, Golub & LeVeque 1983), else as sums about the mean of one of them. Little cancels, and the
// same input gives the same bits.
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
    int32_t per_group;  // channels of a group
    float each_value;   // 1 / values of a group
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

// Records about a number near their means, so that additions merge them, which are few instructions. The number is the
// mean of one of them, of m values. Its distance d from the mean of all n is in their squares then: m·d² is no more than
// these are, and what cancels, n·d², no more than n / m times what is left. A float has digits for that.
struct Sums {
    float near, count = 0.f, deviation = 0.f, squares = 0.f;

    __device__ __forceinline__ void add(const Record& a) {
        float delta = a.mean - near, sum = a.count * delta;
        count += a.count;
        deviation += sum;
        squares += a.squares + sum * delta;
    }

    // As one record, `each` being 1 / count.
    __device__ __forceinline__ Record record(float each) const {
        float delta = deviation * each;
        return {count, near + delta, fmaxf(squares - deviation * delta, 0.f)};
    }
};

// The sum of a warp's numbers, for each of its threads.
__device__ __forceinline__ float sum_warp(float a) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
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

// The slots of a group that a warp merges at a time; `used(j)` are those of group j that hold records.
struct Turn {
    int32_t turn, turns, group, first, end;  // the group's first slot, the lane's first one, the end of the group's

    template <typename Used>
    __device__ __forceinline__ Turn(const Plan& plan, int32_t groups, Used used) {
        turn = threadIdx.x / 32;
        turns = groups * plan.warps_a_group;
        place(plan, used);
    }

    template <typename Used>
    __device__ __forceinline__ void place(const Plan& plan, Used used) {
        int32_t j = divide(turn, plan.by_warps);
        group = j * plan.slots;
        first = group + (turn - j * plan.warps_a_group) * 32 + threadIdx.x % 32;
        end = group + used(j);
    }

    __device__ __forceinline__ int32_t known() const { return turns & group & first & end; }
};

// Warps merge the slots of their groups.
template <typename Used>
__device__ __forceinline__ void merge_slots(const Plan& plan, const Shared& shared, Turn at, Used used) {
    while (at.turn < at.turns) {
        Sums a{shared.slots[at.group].mean};
#pragma unroll 1
        for (int32_t i = at.first; i < at.end; i += 32 * plan.warps_a_group) a.add(shared.slots[i]);
        a.count = sum_warp(a.count);
        a.deviation = sum_warp(a.deviation);
        a.squares = sum_warp(a.squares);
        Record merged = a.record(reciprocal_fast(fmaxf(a.count, 1.f)));
        if (threadIdx.x % 32 == 0) shared.warps[at.turn] = merged;
        at.turn += blockDim.x / 32;
        if (at.turn >= at.turns) break;
        at.place(plan, used);
    }
}

// Warps merge `count` records of each group, which `get(j, i)` reads, into its norm; near[j * step] is one of them, or
// like them.
template <typename Get>
__device__ __forceinline__ void merge_norms(
    const Shared& shared, int32_t groups, int32_t count, const Record* near, int32_t step, const Params& p, Get get
) {
    int32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int32_t j = threadIdx.x / 32; j < groups; j += warps) {
        Sums a{near[j * step].mean};
#pragma unroll 1
        for (int32_t i = lane; i < count; i += 32) a.add(get(j, i));  // seldom more than once
        a.deviation = sum_warp(a.deviation);
        a.squares = sum_warp(a.squares);
        Record merged = a.record(p.each_value);
        float scale = rsqrt_fast(merged.squares * p.each_value + p.epsilon);
        if (lane == 0) shared.norms[j] = make_float2(merged.mean, scale);
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
