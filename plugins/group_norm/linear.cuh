// GroupNorm (Wu & He 2018) of maps (B, C, h, w) in that order, with a row added before it and SiLU after it or not.
#pragma once

#include "records.cuh"

namespace canny {

// (B, C, h, w) in memory: a block goes twice over the values of one group, which lie together.
template <typename T>
__global__ void __launch_bounds__(kLinearThreads) linear(const Params p) {
    const Plan& plan = p.plan;
    Shared shared(plan);
    int32_t per_group = p.per_group, size = per_group * p.positions;
    int32_t first_channel = blockIdx.y * per_group, step = blockDim.x * kWidth;
    int64_t start = int64_t(blockIdx.z) * p.channels * p.positions + int64_t(first_channel) * p.positions;
    const T *x = static_cast<const T*>(p.x) + start, *row = static_cast<const T*>(p.row);
    T* y = static_cast<T*>(p.y) + start;
    if (row != nullptr) row += int64_t(blockIdx.z) * p.row_stride + first_channel;
    bool whole = p.positions % kWidth == 0;  // a vector has one channel, and a multiple of 16 for an address
    auto load = [&](Vector<T>& data, float (&added)[kWidth], int32_t at) {
        int32_t there = min(kWidth, size - at);
        if (whole) data.load(x + at);
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            if (!whole) data.value[e] = x[at + min(e, there - 1)];
            added[e] = row == nullptr ? 0.f : to_float(row[(at + min(e, there - 1)) / p.positions]);
        }
        return there;
    };
    wait_for_previous();
    Record record = {};
    for (int32_t at = threadIdx.x * kWidth; at < size; at += step) {
        Vector<T> data;
        float added[kWidth];
        Record found = {};
        int32_t there = load(data, added, at);
        found.count = float(there);
#pragma unroll
        for (int e = 0; e < kWidth; e++) found.mean += e < there ? to_float(data.value[e]) + added[e] : 0.f;
        found.mean *= reciprocal_fast(found.count);
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            float d = e < there ? to_float(data.value[e]) + added[e] - found.mean : 0.f;
            found.squares += d * d;
        }
        record = merge(record, found);
    }
    shared.slots[threadIdx.x] = record;
    __syncthreads();
    auto used = [&](int32_t) { return plan.slots; };
    merge_slots(plan, shared, Turn(plan, 1, used), used);
    __syncthreads();
    auto get = [&](int32_t, int32_t i) { return shared.warps[i]; };
    merge_norms(shared, 1, plan.warps_a_group, shared.warps, 0, p, get);
    __syncthreads();
    float2 norm = shared.norms[0];
    for (int32_t at = threadIdx.x * kWidth; at < size; at += step) {
        Vector<T> data;
        float scale[kWidth], shift[kWidth];
        int32_t there = load(data, shift, at);
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            int32_t channel = first_channel + (at + min(e, there - 1)) / p.positions;
            scale[e] = p.gamma[channel] * norm.y;
            shift[e] = (shift[e] - norm.x) * scale[e] + p.beta[channel];
        }
        finish(data, scale, shift, p.silu);
        if (whole) data.store(y + at);
#pragma unroll
        for (int e = 0; e < kWidth; e++)
            if (!whole && e < there) y[at + e] = data.value[e];
    }
}

}  // namespace canny
