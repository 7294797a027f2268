// The ends of a step on a GPU, behind C functions.
#include "first.cuh"
#include "last.cuh"

#include "../launch.cuh"
#include "kernel.h"

namespace {

// What launches a kernel on a stream and keeps the error.
auto launcher(cudaStream_t stream, cudaError_t& error) {
    return [stream, &error](auto kernel, dim3 grid, int32_t threads, int32_t bytes, const auto& call) {
        error = canny::launch_early(kernel, grid, threads, bytes, stream, call);
        return error == cudaSuccess;
    };
}

}  // namespace

int32_t canny_first(const CannyFirst* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_first(*call, launcher(stream, error));
    return error;
}

int32_t canny_last(const CannyLast* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_last(*call, launcher(stream, error));
    return error;
}
