// LayerNorm, GEGLU and sums on a GPU: the functions that a caller in C, or the TensorRT plugins, use.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"

// Enqueue one call on a stream; returns a cudaError_t, cudaErrorNotSupported where its shape has no kernel.
extern "C" __attribute__((visibility("default"))) int32_t
canny_layer_norm(const CannyLayerNorm* call, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) int32_t canny_geglu(const CannyGeglu* call, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) int32_t canny_add(const CannyAdd* call, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) int32_t canny_join(const CannyJoin* call, cudaStream_t stream);
