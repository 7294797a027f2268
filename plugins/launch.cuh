// How the plugins launch their kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "group_norm/kernel.h"

namespace canny {

// Launch a kernel in clusters of this many blocks along x. `early`, from compute capability 9.0 on only: its blocks may be
// set up while the kernel before it still runs, so that its first deed must be to wait for that one.
template <typename Params>
cudaError_t launch_kernel(
    void (*kernel)(const Params), dim3 grid, int32_t threads, int32_t bytes, cudaStream_t stream, const Params& params,
    int32_t cluster, bool early
) {
    if (bytes > 48 << 10) {  // as much must be asked for
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attributes[2] = {};
    uint32_t used = 0;
    if (cluster > 1) {
        attributes[used].id = cudaLaunchAttributeClusterDimension;
        attributes[used].val.clusterDim.x = cluster;
        attributes[used].val.clusterDim.y = attributes[used].val.clusterDim.z = 1;
        used++;
    }
    if (early) {
        attributes[used].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[used].val.programmaticStreamSerializationAllowed = 1;
        used++;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = used;
    return cudaLaunchKernelEx(&config, kernel, params);
}

// The same, early wherever the GPU can.
template <typename Params>
cudaError_t launch_early(
    void (*kernel)(const Params), dim3 grid, int32_t threads, int32_t bytes, cudaStream_t stream, const Params& params,
    int32_t cluster = 1
) {
    static const bool can = canny_max_cluster() > 1;
    return launch_kernel(kernel, grid, threads, bytes, stream, params, cluster, can);
}

// What launches a call's kernels early on a stream, and keeps the error.
inline auto launcher(cudaStream_t stream, cudaError_t& error) {
    return [stream, &error](auto kernel, dim3 grid, int32_t threads, int32_t bytes, const auto& call) {
        error = launch_early(kernel, grid, threads, bytes, stream, call);
        return error == cudaSuccess;
    };
}

// Whether the first GPU that was asked about, and so each of this process, is of compute capability 9.0.
inline bool is_hopper() {
    int device = 0, major = 0, minor = 0;
    bool known = cudaGetDevice(&device) == cudaSuccess &&
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                 cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    return known && major == 9 && minor == 0;
}

}  // namespace canny
