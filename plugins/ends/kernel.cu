// The ends of a step on a GPU, behind C functions.
#include "first.cuh"
#include "last.cuh"

#include "../launch.cuh"
#include "kernel.h"

int32_t canny_first(const CannyFirst* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_first(*call, canny::launcher(stream, error));
    return error;
}

int32_t canny_last(const CannyLast* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_last(*call, canny::launcher(stream, error));
    return error;
}
