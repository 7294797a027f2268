// LayerNorm and GEGLU on a GPU, behind C functions.
#include "kernel.cuh"

#include "kernel.h"

namespace {

// What launches a kernel on a stream and keeps the error.
auto launcher(cudaStream_t stream, cudaError_t& error) {
    return [stream, &error](auto kernel, dim3 grid, int32_t threads, const auto& call) {
        kernel<<<grid, threads, 0, stream>>>(call);
        error = cudaGetLastError();
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
