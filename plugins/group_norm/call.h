// One GroupNorm, as callers without TensorRT state it too, and how it is cut.
#pragma once

#include "../tokens/call.h"
#include "plan.h"

// Pointers are to the GPU's memory, at multiples of 16.
struct CannyGroupNorm {
    const void* x;  // (B, C, h, w) of half or float; channels-last in half precision C is padded to a multiple of 8
    const float* gamma;  // (C)
    const float* beta;   // (C)
    const void* row;     // (row_batch, C) of the type of x, added before the statistics
    void* y;             // as x
    void* workspace;     // of canny_group_norm_workspace bytes
    int32_t batch, channels, positions, groups;
    int32_t row_batch;  // 0 without a row, 1 or B
    int32_t half, channels_last, silu;
    float epsilon;
    int32_t max_cluster;  // 8 from compute capability 9.0 on, 1 before
    int32_t force;        // as `make_plan` takes it; 0
    int32_t overlap;      // whether it may start while the kernel before it ends, from compute capability 9.0 on
};

// A join and the GroupNorm of what it makes, in half precision, channels-last.
struct CannyJoinNorm {
    const void *x, *skip, *residual;  // to x_scales: as CannyJoin has them
    const float* scales;
    const void* x_residual;
    const float* x_scales;
    void* joined;  // (batch, positions, first + second)
    const float* gamma;
    const float* beta;
    void* y;          // GroupNorm of what is joined, as it
    void* workspace;  // of canny_join_norm_workspace bytes
    int32_t batch, positions, first, second, groups, silu;
    float epsilon;
    int32_t max_cluster;  // as in CannyGroupNorm
};

namespace canny {

inline CannyJoin join_of(const CannyJoinNorm& call) {
    return {call.x,        call.skip,   call.residual, call.scales,    call.x_residual, call.x_scales,
            call.joined,   call.batch,  call.positions, call.first,    call.second};
}

inline CannyGroupNorm norm_of(const CannyJoinNorm& call) {
    CannyGroupNorm norm{call.joined, call.gamma, call.beta, nullptr, call.y, call.workspace};
    norm.batch = call.batch;
    norm.channels = call.first + call.second;
    norm.positions = call.positions;
    norm.groups = call.groups;
    norm.half = norm.channels_last = 1;
    norm.silu = call.silu;
    norm.epsilon = call.epsilon;
    norm.max_cluster = call.max_cluster;
    norm.overlap = 1;
    return norm;
}

inline Plan plan_of(const CannyGroupNorm& call) {
    if (call.row_batch != 0 && call.row_batch != 1 && call.row_batch != call.batch) return Plan();
    Shape shape{call.batch, call.channels, call.positions, call.groups, call.half != 0, call.channels_last != 0};
    return make_plan(shape, call.max_cluster, call.force);
}

inline void plan_facts(const CannyGroupNorm& call, int32_t out[7]) {
    Plan plan = plan_of(call);
    int32_t facts[] = {int32_t(plan.path), plan.threads, plan.slices,         plan.tiles,
                       call.batch,         plan.batches, int32_t(plan.shared)};
    for (int i = 0; i < 7; i++) out[i] = facts[i];
}

}  // namespace canny
