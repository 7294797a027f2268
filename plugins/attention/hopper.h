// Attention by the kernels that are for compute capability 9.0 alone.
#pragma once

#include <cuda_runtime_api.h>

#include "call.h"

namespace canny {

// As canny_attention; cudaErrorNotSupported where the shape has no such kernel, or is faster without, or the GPU is
// another.
cudaError_t hopper_attention_of(const CannyAttention& call, cudaStream_t stream);

}  // namespace canny
