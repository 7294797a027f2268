// How the plugins launch their kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "group_norm/kernel.h"

namespace canny {

// Launch a kernel whose first deed is to wait for the kernel before it: from compute capability 9.0 on its blocks may
// then be set up while that one still runs.
template <typename Params>
cudaError_t launch_early(
    void (*kernel)(const Params), dim3 grid, int32_t threads, int32_t bytes, cudaStream_t stream, const Params& params
) {
    static const bool can = canny_max_cluster() > 1;
    if (bytes > 48 << 10) {  // as much must be asked for
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = can ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace canny
