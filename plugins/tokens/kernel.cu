// LayerNorm, GEGLU, sums and skips on a GPU, behind C functions.
#include "kernel.cuh"

#include "../launch.cuh"
#include "kernel.h"

int32_t canny_layer_norm(const CannyLayerNorm* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_layer_norm(*call, canny::launcher(stream, error));
    return error;
}

int32_t canny_geglu(const CannyGeglu* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_geglu(*call, canny::launcher(stream, error));
    return error;
}

int32_t canny_add(const CannyAdd* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_add(*call, canny::launcher(stream, error));
    return error;
}

int32_t canny_join(const CannyJoin* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_join(*call, canny::launcher(stream, error));
    return error;
}
