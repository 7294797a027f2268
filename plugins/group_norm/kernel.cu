// The kernels on a GPU, behind C functions.
#include "kernel.cuh"

#include "../launch.cuh"
#include "../tokens/kernel.h"
#include "kernel.h"

int32_t canny_group_norm(const CannyGroupNorm* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run(*call, [&](auto kernel, dim3 grid, int32_t cluster, const canny::Params& p) {
        bool early = call->overlap && call->max_cluster > 1;
        error = canny::launch_kernel(kernel, grid, p.plan.threads, p.plan.shared, stream, p, cluster, early);
        return error == cudaSuccess;
    });
    return error;
}

int32_t canny_join_norm(const CannyJoinNorm* call, cudaStream_t stream) {
    int32_t error = cudaErrorNotSupported;
    auto launch = [&](auto kernel, dim3 grid, int32_t cluster, const canny::JoinParams& p) {
        error = canny::launch_early(kernel, grid, p.plan.threads, p.plan.shared, stream, p, cluster);
        return error == cudaSuccess;
    };
    auto join = [&](const CannyJoin& part) { return (error = canny_join(&part, stream)) == cudaSuccess; };
    auto norm = [&](const CannyGroupNorm& part) { return (error = canny_group_norm(&part, stream)) == cudaSuccess; };
    canny::run(*call, launch, join, norm);
    return error;
}

uint64_t canny_join_norm_workspace(const CannyJoinNorm* call) {
    return canny::plan_of(canny::norm_of(*call)).workspace;
}

uint64_t canny_group_norm_workspace(const CannyGroupNorm* call) { return canny::plan_of(*call).workspace; }

void canny_group_norm_plan(const CannyGroupNorm* call, int32_t out[7]) { canny::plan_facts(*call, out); }

namespace {

// Load the kernels of every plan for elements of type T; the version of the code that they were compiled to, as 90.
template <typename T>
int32_t load_kernels() {
    int32_t oldest = INT32_MAX;
    auto load = [&](auto kernel, dim3, int32_t, const canny::Params&) {
        cudaFuncAttributes attributes{};
        bool loaded = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
        int32_t version = loaded ? attributes.ptxVersion : 0;
        oldest = version < oldest ? version : oldest;
        return true;
    };
    for (canny::Path path : {canny::Path::kOneLaunch, canny::Path::kTwoLaunches, canny::Path::kLinear})
        for (int32_t batches : {1, 2, 4, canny::kBatchesHalf})
            for (int32_t per_group : {1, canny::kWidth, canny::kWidth + 2})
                for (int32_t more : {0, 1, 2}) {
                    canny::Params p{};
                    p.row = more ? &oldest : nullptr;
                    p.channels = more < 2 ? canny::kWidth : 1;
                    p.per_group = per_group;
                    p.plan.path = path;
                    p.plan.batches = batches;
                    p.plan.per_channel = per_group == 1;
                    canny::run<T>(p, dim3(), load);
                }
    return oldest;
}

}  // namespace

int32_t canny_max_cluster() {
    int32_t half = load_kernels<__half>(), single = load_kernels<float>();
    cudaGetLastError();  // without a GPU nothing was loaded, and the next caller need not hear of it
    // Code for an older GPU that this one compiles anew knows no clusters either.
    return half >= 90 && single >= 90 ? 8 : 1;
}
