// What attention needs of a GPU of compute capability 9.0 beyond what convolutions do: copies of one head's keys or values.
//
// tests/hopper_emulator.hpp has the same names for a CPU.
#pragma once

#include "../conv/hopper.cuh"

#ifndef EMULATE_CUDA
namespace canny {

// The heads of keys or values, as copies of a part of them want them described.
using HeadMap = CUtensorMap;

// Describe heads (batch, rows, heads, width), rows `stride` halves apart, for copies of `high` rows of 64 channels of
// one head, which arrive swizzled by 128 bytes. False where the driver does not.
inline bool describe_heads(
    HeadMap& map, const void* x, int32_t batch, int32_t rows, int32_t heads, int32_t width, int32_t stride, int32_t high
) {
    TensorMapEncode encode = tensor_map_encode();
    cuuint64_t sizes[] = {cuuint64_t(width), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
    cuuint64_t pitches[] = {2 * cuuint64_t(stride), 2 * cuuint64_t(width), 2 * cuuint64_t(rows) * stride};
    cuuint32_t box[] = {64, cuuint32_t(high), 1, 1}, steps[] = {1, 1, 1, 1};
    return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(x), sizes, pitches, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Begin to copy the rows and 64 channels from these on, zeros where the head has none; their bytes count for the
// barrier.
__device__ __forceinline__ void copy_head(
    uint32_t to, const HeadMap& map, int32_t batch, int32_t row, int32_t head, int32_t channel, uint32_t barrier
) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(channel), "r"(row), "r"(head), "r"(batch), "r"(barrier)
        : "memory"
    );
}

// The compiler is to have what products are to read in registers before this, and not to change it before then.
template <int kSteps>
__device__ __forceinline__ void products_hold(uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

}  // namespace canny
#endif
