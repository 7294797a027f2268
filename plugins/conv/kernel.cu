// Convolutions of small maps on a GPU, behind a C function.
#include "kernel.cuh"

#include "kernel.h"

int32_t canny_conv(const CannyConv* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_conv(*call, [&](auto kernel, dim3 grid, int32_t cluster, int32_t bytes, const canny::ConvParams& p) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return false;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(canny::kConvThreads);
        config.dynamicSmemBytes = bytes;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = cluster > 1 ? 1 : 0;
        error = cudaLaunchKernelEx(&config, kernel, p);
        return error == cudaSuccess;
    });
    return error;
}
