// The attention kernels for compute capability 9.0 on a GPU. CANNY_CONV: this was compiled for 9.0a.
#include "hopper.cuh"

#include "../launch.cuh"
#include "hopper.h"

namespace canny {

cudaError_t hopper_attention_of(const CannyAttention& call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
#ifdef CANNY_CONV
    static const bool hopper = is_hopper();
    if (!hopper) return error;
    run_hopper_attention(
        call,
        [&](auto kernel, dim3 grid, int32_t cluster, int32_t threads, int32_t bytes, const HopperWork& work) {
            error = launch_early(kernel, grid, threads, bytes, stream, work, cluster);
            return error == cudaSuccess;
        }
    );
#endif
    return error;
}

}  // namespace canny
