// The attention kernels on a GPU, behind a C function.
#include "kernel.cuh"

// Enqueue one attention on a stream; returns a cudaError_t, cudaErrorNotSupported where its shape has no kernel.
extern "C" __attribute__((visibility("default"))) int32_t
canny_attention(const CannyAttention* call, cudaStream_t stream) {
    cudaError_t error = cudaErrorNotSupported;
    canny::run_attention(*call, [&](auto kernel, dim3 grid, int32_t threads, int32_t bytes, const CannyAttention& p) {
        // More than 48 KiB of shared memory must be asked for.
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return false;
        kernel<<<grid, threads, bytes, stream>>>(p);
        error = cudaGetLastError();
        return error == cudaSuccess;
    });
    return error;
}
