// LayerNorm, GEGLU, sums and skips on a GPU, behind C functions.
#include "kernel.cuh"

#include "../launch.cuh"
#include "kernel.h"

namespace {

// What launches a kernel on a stream and keeps the error.
auto launcher(cudaStream_t stream, cudaError_t& error) {
    return [stream, &error](auto kernel, dim3 grid, int32_t threads, const auto& call) {
        error = canny::launch_early(kernel, grid, threads, 0, stream, call);
        return error == cudaSuccess;
    };
}

}  // namespace

int32_t canny_layer_norm(const CannyLayerNorm* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_layer_norm(*call, launcher(stream, error));
    return error;
}

int32_t canny_geglu(const CannyGeglu* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_geglu(*call, launcher(stream, error));
    return error;
}

int32_t canny_add(const CannyAdd* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_add(*call, launcher(stream, error));
    return error;
}

int32_t canny_join(const CannyJoin* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_join(*call, launcher(stream, error));
    return error;
}
