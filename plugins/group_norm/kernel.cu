// The kernels on a GPU, behind C functions.
#include "kernel.cuh"

#include "kernel.h"

int32_t canny_group_norm(const CannyGroupNorm* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run(*call, [&](auto kernel, dim3 grid, int32_t cluster, const canny::Params& p) {
        cudaLaunchAttribute attributes[2] = {};
        int32_t used = 0;
        if (cluster > 1) {
            attributes[used].id = cudaLaunchAttributeClusterDimension;
            attributes[used].val.clusterDim.x = cluster;
            attributes[used].val.clusterDim.y = attributes[used].val.clusterDim.z = 1;
            used++;
        }
        if (call->overlap && call->max_cluster > 1) {
            attributes[used].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[used].val.programmaticStreamSerializationAllowed = 1;
            used++;
        }
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(p.plan.threads);
        config.dynamicSmemBytes = p.plan.shared;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = used;
        error = cudaLaunchKernelEx(&config, kernel, p);
        return error == cudaSuccess;
    });
    return error;
}

uint64_t canny_group_norm_workspace(const CannyGroupNorm* call) { return canny::plan_of(*call).workspace; }

void canny_group_norm_plan(const CannyGroupNorm* call, int32_t out[7]) { canny::plan_facts(*call, out); }

int32_t canny_max_cluster() {
    // Code for an older GPU that this one compiles anew knows no clusters either.
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, canny::one_launch<__half, 1, 2>) != cudaSuccess) {
        cudaGetLastError();
        return 1;
    }
    return attributes.ptxVersion >= 90 ? 8 : 1;
}
