// From a call to the kernels that serve it.
#pragma once

#include "call.h"
#include "channels_last.cuh"
#include "linear.cuh"

namespace canny {

// The kernel of one launch whose threads hold as much as the plan says.
template <typename T, int kSegments, int kMore, typename P, typename Launch>
bool run_one_launch(const P& p, dim3 grid, Launch&& launch) {
    constexpr int kMost = sizeof(T) == 2 ? kBatchesHalf : kBatchesFloat;
    int32_t batches = p.plan.batches, cluster = p.plan.slices;
    if (batches == 1) return launch(one_launch<T, 1, kSegments, kMore, P>, grid, cluster, p);
    if (batches == 2) return launch(one_launch<T, 2, kSegments, kMore, P>, grid, cluster, p);
    if (batches <= 4) return launch(one_launch<T, 4, kSegments, kMore, P>, grid, cluster, p);
    return launch(one_launch<T, kMost, kSegments, kMore, P>, grid, cluster, p);
}

template <typename T, int kMore, typename P, typename Launch>
bool run_one_launch(const P& p, dim3 grid, Launch&& launch) {
    if (p.per_group % kWidth == 0) return run_one_launch<T, 1, kMore>(p, grid, launch);
    return run_one_launch<T, 2, kMore>(p, grid, launch);
}

// `launch(kernel, grid, cluster, params)` with each kernel in turn; true unless one could not be launched.
template <typename T, typename Launch>
bool run(const Params& p, dim3 grid, Launch&& launch) {
    const Plan& plan = p.plan;
    bool each = plan.per_channel != 0;
    constexpr int kMost = sizeof(T) == 2 ? kBatchesHalf : kBatchesFloat;
    switch (plan.path) {
        case Path::kOneLaunch:
            if (each) return launch(one_launch<T, kMost, 8>, grid, plan.slices, p);
            if constexpr (sizeof(T) == 2) {
                if (p.channels % kWidth) return run_one_launch<T, 2>(p, grid, launch);
                if (p.row == nullptr) return run_one_launch<T, 0>(p, grid, launch);
            }
            return run_one_launch<T, 1>(p, grid, launch);  // in single precision there is no padding
        case Path::kTwoLaunches:
            if (each) return launch(statistics<T, 2, 8>, grid, 1, p) && launch(apply<T, 4, 8>, grid, 1, p);
            return launch(statistics<T, 2, 2>, grid, 1, p) && launch(apply<T, 4, 2>, grid, 1, p);
        case Path::kLinear:
            return launch(linear<T>, grid, 1, p);
        default:
            return false;
    }
}

inline Params params_of(const CannyGroupNorm& call) {
    Params p{call.x,        call.gamma,
             call.beta,     call.row_batch ? call.row : nullptr,
             call.y,        static_cast<float*>(call.workspace),
             call.channels, call.positions,
             call.groups,   call.row_batch > 1 ? call.channels : 0,
             call.silu,     call.epsilon};
    p.plan = plan_of(call);
    if (p.plan.path == Path::kNone) return p;
    p.per_group = p.channels / p.groups;
    p.each_value = 1.f / (float(p.per_group) * float(p.positions));
    return p;
}

// Do a call; false where its plan has no path or a launch failed.
template <typename Launch>
bool run(const CannyGroupNorm& call, Launch&& launch) {
    Params p = params_of(call);
    dim3 grid(p.plan.slices, p.plan.tiles, call.batch);
    return call.half ? run<__half>(p, grid, launch) : run<float>(p, grid, launch);
}

// The same where GroupNorm takes one launch; elsewhere `join(call)` and `norm(call)` of what it consists of, in turn.
template <typename Launch, typename Join, typename Norm>
bool run(const CannyJoinNorm& call, Launch&& launch, Join&& join, Norm&& norm) {
    CannyGroupNorm of_joined = norm_of(call);
    JoinParams p{params_of(of_joined), join_of(call)};
    if (p.plan.path == Path::kNone) return false;
    bool vectors = call.first > 0 && call.second > 0 && call.first % kWidth == 0 && call.second % kWidth == 0;
    if (!vectors || p.plan.path != Path::kOneLaunch || p.plan.per_channel) return join(p.join) && norm(of_joined);
    return run_one_launch<__half, 0>(p, dim3(p.plan.slices, p.plan.tiles, call.batch), launch);
}

}  // namespace canny
