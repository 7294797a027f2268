// GroupNorm on a GPU: the functions that a caller in C, or the TensorRT plugins, use.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "call.h"

#define CANNY_EXPORT extern "C" __attribute__((visibility("default")))

// Enqueue one GroupNorm on a stream; returns a cudaError_t, cudaErrorNotSupported where the shape cannot be done.
CANNY_EXPORT int32_t canny_group_norm(const CannyGroupNorm* call, cudaStream_t stream);

// The same of a join and a GroupNorm, in one launch where GroupNorm takes one.
CANNY_EXPORT int32_t canny_join_norm(const CannyJoinNorm* call, cudaStream_t stream);
CANNY_EXPORT uint64_t canny_join_norm_workspace(const CannyJoinNorm* call);

// Bytes of workspace that a call needs.
CANNY_EXPORT uint64_t canny_group_norm_workspace(const CannyGroupNorm* call);

// How a call is cut: path (0: not at all), threads, grid (x, y, z), positions a thread holds, bytes of shared memory.
CANNY_EXPORT void canny_group_norm_plan(const CannyGroupNorm* call, int32_t out[7]);

// The largest cluster for `CannyGroupNorm::max_cluster` on the current GPU. Loads the kernels, which a capture forbids.
CANNY_EXPORT int32_t canny_max_cluster();
