// Convolutions of small maps on a GPU, behind C functions. CANNY_CONV: this was compiled for compute capability 9.0a.
#include "kernel.cuh"

#include "../launch.cuh"
#include "kernel.h"

int32_t canny_conv(const CannyConv* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
#ifdef CANNY_CONV
    static const bool hopper = canny::is_hopper();
    if (!hopper) return error;
    canny::run_conv(
        *call,
        [&](auto kernel, dim3 grid, int32_t cluster, int32_t threads, int32_t bytes, const canny::ConvWork& work) {
            error = canny::launch_early(kernel, grid, threads, bytes, stream, work, cluster);
            return error == cudaSuccess;
        }
    );
#endif
    return error;
}

void canny_conv_plan(const CannyConv* call, int32_t out[8]) { canny::conv_facts(*call, out); }
