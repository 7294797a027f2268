// From a call to the kernels that serve it.
#pragma once

#include "call.h"
#include "channels_last.cuh"
#include "linear.cuh"

namespace canny {

// `launch(kernel, grid, cluster, params)` with each kernel in turn; true unless one could not be launched.
template <typename T, typename Launch>
bool run(const Params& p, dim3 grid, Launch&& launch) {
    const Plan& plan = p.plan;
    bool each = plan.per_channel != 0;
    constexpr int kMost = sizeof(T) == 2 ? kBatchesHalf : kBatchesFloat;
    switch (plan.path) {
        case Path::kOneLaunch:
            if (each) return launch(one_launch<T, kMost, 8>, grid, plan.slices, p);
            if (plan.batches == 1) return launch(one_launch<T, 1, 2>, grid, plan.slices, p);
            if (plan.batches == 2) return launch(one_launch<T, 2, 2>, grid, plan.slices, p);
            if (plan.batches <= 4) return launch(one_launch<T, 4, 2>, grid, plan.slices, p);
            return launch(one_launch<T, kMost, 2>, grid, plan.slices, p);
        case Path::kTwoLaunches:
            if (each) return launch(statistics<T, 2, 8>, grid, 1, p) && launch(apply<T, 4, 8>, grid, 1, p);
            return launch(statistics<T, 2, 2>, grid, 1, p) && launch(apply<T, 4, 2>, grid, 1, p);
        case Path::kLinear:
            return launch(linear<T>, grid, 1, p);
        default:
            return false;
    }
}

// Do a call; false where its plan has no path or a launch failed.
template <typename Launch>
bool run(const CannyGroupNorm& call, Launch&& launch) {
    Params p{call.x,        call.gamma,
             call.beta,     call.row_batch ? call.row : nullptr,
             call.y,        static_cast<float*>(call.workspace),
             call.channels, call.positions,
             call.groups,   call.row_batch > 1 ? call.channels : 0,
             call.silu,     call.epsilon,
             plan_of(call)};
    dim3 grid(p.plan.slices, p.plan.tiles, call.batch);
    return call.half ? run<__half>(p, grid, launch) : run<float>(p, grid, launch);
}

}  // namespace canny
