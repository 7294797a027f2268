// Convolutions of small maps on a GPU: the functions that a caller in C, or the TensorRT plugins, use.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"

// Enqueue one convolution on a stream; returns a cudaError_t, cudaErrorNotSupported where its shape has no kernel.
extern "C" __attribute__((visibility("default"))) int32_t canny_conv(const CannyConv* call, cudaStream_t stream);
