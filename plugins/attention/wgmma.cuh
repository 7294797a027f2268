// What attention needs of a GPU of compute capability 9.0 beyond what convolutions do: copies of one head's keys, and
// products of a warpgroup by keys and by values as they lie.
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

#define CANNY_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define CANNY_8(i) CANNY_4(i), CANNY_4(i + 4)
#define CANNY_16(i) CANNY_8(i), CANNY_8(i + 8)

#define CANNY_FROM_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
#define CANNY_FROM_16 "%16, %17, %18, %19, %20, %21, %22, %23, "
#define CANNY_FROM_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define CANNY_FROM_32 ", %32, %33, %34, %35, %36, %37, %38, %39"

// c (64×N, float) = a (64×16, half) · b (16×N, half) by the four warps of a warpgroup, added to c where `add`;
// kTransposed: b lies row after row of N, else column after column. What may be read and changed when: as in
// multiply_group.
#define CANNY_MULTIPLY(name, count, wide, sums, a_and_b, adds, transposed, ...)                                        \
    __device__ __forceinline__ void name(float (&c)[count], const uint32_t (&a)[4], uint64_t b, bool add) {            \
        asm volatile(                                                                                                  \
            "{\n.reg .pred add;\nsetp.ne.u32 add, " adds ", 0;\n"                                                      \
            "wgmma.mma_async.sync.aligned.m64n" wide "k16.f32.f16.f16 {" sums "}, " a_and_b ", add, 1, 1, " transposed \
            ";\n}"                                                                                                     \
            : __VA_ARGS__                                                                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(add))                                   \
        );                                                                                                             \
    }

#ifdef CANNY_HOPPER
CANNY_MULTIPLY(multiply_keys, 24, "48", CANNY_FROM_0 "%16, %17, %18, %19, %20, %21, %22, %23",
               "{%24, %25, %26, %27}, %28", "%29", "0", CANNY_16(0), CANNY_8(16))
CANNY_MULTIPLY(multiply_keys, 32, "64", CANNY_FROM_0 CANNY_FROM_16 CANNY_FROM_24, "{%32, %33, %34, %35}, %36", "%37",
               "0", CANNY_16(0), CANNY_16(16))
CANNY_MULTIPLY(multiply_values, 20, "40", CANNY_FROM_0 "%16, %17, %18, %19", "{%20, %21, %22, %23}, %24", "%25", "1",
               CANNY_16(0), CANNY_4(16))
CANNY_MULTIPLY(multiply_values, 40, "80", CANNY_FROM_0 CANNY_FROM_16 CANNY_FROM_24 CANNY_FROM_32,
               "{%40, %41, %42, %43}, %44", "%45", "1", CANNY_16(0), CANNY_16(16), CANNY_8(32))
#else
template <int kCount>
__device__ __forceinline__ void multiply_keys(float (&)[kCount], const uint32_t (&)[4], uint64_t, bool) {}
template <int kCount>
__device__ __forceinline__ void multiply_values(float (&)[kCount], const uint32_t (&)[4], uint64_t, bool) {}
#endif

#undef CANNY_4
#undef CANNY_8
#undef CANNY_16
#undef CANNY_FROM_0
#undef CANNY_FROM_16
#undef CANNY_FROM_24
#undef CANNY_FROM_32
#undef CANNY_MULTIPLY

}  // namespace canny
#endif

namespace canny {

// The same rows as those of matrix_at, but multiplied along: 16 rows further is 128 more. `box`: bytes from one 64
// columns to the next.
__device__ __forceinline__ uint64_t rows_at(uint32_t address, uint32_t box) {
    constexpr uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(box / 16) << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

}  // namespace canny
