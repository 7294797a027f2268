// The attention kernels on a GPU, behind a C function.
#include "kernel.cuh"

#include "../launch.cuh"
#include "hopper.h"
#include "kernel.h"

int32_t canny_attention(const CannyAttention* call, cudaStream_t stream) {
    CannyAttention other = *call;
    cudaError_t error = canny::hopper_attention_of(other, stream);
    if (error != cudaErrorNotSupported) return error;
    if (other.groups < 0) other.groups = 0;
    canny::run_attention(other, canny::launcher(stream, error));
    return error;
}
