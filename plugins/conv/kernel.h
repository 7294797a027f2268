// Convolutions of small maps on a GPU: the functions that a caller in C, or the TensorRT plugins, use.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"

// Enqueue one convolution on a stream; returns a cudaError_t, cudaErrorNotSupported where its shape has no kernel or
// the GPU is not of compute capability 9.0. Its weights may be read before the kernels that are under way have ended.
extern "C" __attribute__((visibility("default"))) int32_t canny_conv(const CannyConv* call, cudaStream_t stream);

// How a call is cut: 64s of rows of a tile (0: not at all), filters of a tile, cluster, blocks, places of x, of
// weights, bytes of shared memory, predicted ns on an H200.
extern "C" __attribute__((visibility("default"))) void canny_conv_plan(const CannyConv* call, int32_t out[8]);
