// Convolutions of small maps on a GPU, behind C functions. CANNY_CONV: this was compiled for compute capability 9.0a.
#include "kernel.cuh"

#include "kernel.h"

namespace {

// Whether the first GPU that was asked about, and so each of this process, is of compute capability 9.0.
bool is_hopper() {
    int device = 0, major = 0, minor = 0;
    bool known = cudaGetDevice(&device) == cudaSuccess &&
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                 cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    return known && major == 9 && minor == 0;
}

}  // namespace

int32_t canny_conv(const CannyConv* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
#ifdef CANNY_CONV
    static const bool hopper = is_hopper();
    if (!hopper) return error;
    canny::run_conv(
        *call,
        [&](auto kernel, dim3 grid, int32_t cluster, int32_t threads, int32_t bytes, const canny::ConvParams& p) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
            if (error != cudaSuccess) return false;
            cudaLaunchAttribute attributes[2] = {};
            attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[0].val.programmaticStreamSerializationAllowed = 1;
            attributes[1].id = cudaLaunchAttributeClusterDimension;
            attributes[1].val.clusterDim.x = cluster;
            attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = grid;
            config.blockDim = dim3(threads);
            config.dynamicSmemBytes = bytes;
            config.stream = stream;
            config.attrs = attributes;
            config.numAttrs = cluster > 1 ? 2 : 1;
            error = cudaLaunchKernelEx(&config, kernel, p);
            return error == cudaSuccess;
        }
    );
#endif
    return error;
}

void canny_conv_plan(const CannyConv* call, int32_t out[8]) { canny::conv_facts(*call, out); }
