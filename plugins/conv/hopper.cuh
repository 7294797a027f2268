// What convolutions need of a GPU of compute capability 9.0: products of a warpgroup, barriers in shared memory that
// count arrivals and bytes, and copies that report to them.
//
// tests/hopper_emulator.hpp has the same names for a CPU.
#pragma once

#include <cstdint>

#include "../attention/mma.cuh"

#ifdef EMULATE_CUDA
#include "hopper_emulator.hpp"
#else
#include <cuda.h>
#include <cuda_runtime_api.h>

namespace canny {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CANNY_HOPPER 1
#endif

// -- barriers: a phase ends when `count` have arrived and every byte that is expected came ----------------------------

__device__ __forceinline__ void barrier_begin(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Let the copies of the asynchronous proxy see the barriers that this thread has begun.
__device__ __forceinline__ void barriers_begun() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Without a branch.
__device__ __forceinline__ void barrier_arrive_if(bool does, uint32_t barrier) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
                 "r"(uint32_t(does))
                 : "memory");
}

// Arrive, and let the phase wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait for the end of the phase of this parity: 0 for the first, 1 for the second, …
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory"
        );
}

// Whether that phase has ended.
__device__ __forceinline__ bool barrier_ended(uint32_t barrier, uint32_t parity) {
    uint32_t ended;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory"
    );
    return ended;
}

// load_matrices of rows in shared memory by address.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// The number that all lanes of a warp have: the compiler then knows that they do, and what is made of it is not made for each
// lane and brought together for every product.
__device__ __forceinline__ uint32_t uniform(uint32_t number) { return __reduce_or_sync(0xffffffffu, number); }

// Have a number reckoned here, not where it is used.
__device__ __forceinline__ void hold(uint32_t& number) { asm volatile("" : "+r"(number)); }

// Begin to copy bytes that lie side by side, a multiple of 16, to shared memory; they count for the barrier.
__device__ __forceinline__ void copy_block(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory"
    );
}

// A map of channels-last halves, as copies of a part of it want it described.
using ConvMap = CUtensorMap;

using TensorMapEncode = decltype(&cuTensorMapEncodeTiled);

// The driver's function that describes maps; null where it has none.
inline TensorMapEncode tensor_map_encode() {
    static const TensorMapEncode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        return reinterpret_cast<TensorMapEncode>(found);
    }();
    return encode;
}

// Describe a map (rows, channels) for copies of `high` rows of 64 channels, which arrive swizzled by 128 bytes. False
// where the driver does not.
inline bool describe(ConvMap& map, const void* x, int32_t rows, int32_t channels, int32_t high) {
    TensorMapEncode encode = tensor_map_encode();
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(rows)}, pitch[] = {2 * cuuint64_t(channels)};
    cuuint32_t box[] = {64, cuuint32_t(high)}, steps[] = {1, 1};
    return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(x), sizes, pitch, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Have the description of a map at hand before it is used.
__device__ __forceinline__ void expect_rows(const ConvMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Begin to copy the rows and 64 channels from these on, zeros where there is no row; their bytes count for the barrier.
// early: of what the kernel before has not written.
__device__ __forceinline__ void
copy_rows_early(uint32_t to, const ConvMap& map, int32_t row, int32_t channel, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to
        ),
        "l"(&map), "r"(channel), "r"(row), "r"(barrier)
        : "memory"
    );
}

__device__ __forceinline__ void
copy_rows(uint32_t to, const ConvMap& map, int32_t row, int32_t channel, uint32_t barrier) {
    copy_rows_early(to, map, row, channel, barrier);
}

// -- products ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void products_begin() {
#ifdef CANNY_HOPPER
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// What was asked for since the last commit is one group; wait until at most kLeft groups are under way.
__device__ __forceinline__ void products_commit() {
#ifdef CANNY_HOPPER
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kLeft>
__device__ __forceinline__ void products_wait() {
#ifdef CANNY_HOPPER
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// The compiler is not to have used the sums before this.
template <int kCount>
__device__ __forceinline__ void products_done(float (&c)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define CANNY_SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define CANNY_SUMS_8(i) CANNY_SUMS_4(i), CANNY_SUMS_4(i + 4)
#define CANNY_SUMS_16(i) CANNY_SUMS_8(i), CANNY_SUMS_8(i + 8)
#define CANNY_SUMS_32(i) CANNY_SUMS_16(i), CANNY_SUMS_16(i + 16)
#define CANNY_SUMS_64(i) CANNY_SUMS_32(i), CANNY_SUMS_32(i + 32)

// Operands of a product: 16 sums from this number on, or all up to it.
#define CANNY_FROM_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, " \
    "%8, %9, %10, %11, %12, %13, %14, %15"
#define CANNY_FROM_16 \
    "%16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define CANNY_FROM_32 \
    "%32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47"
#define CANNY_FROM_48 \
    "%48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define CANNY_FROM_64 \
    "%64, %65, %66, %67, %68, %69, %70, %71, " \
    "%72, %73, %74, %75, %76, %77, %78, %79"
#define CANNY_FROM_80 \
    "%80, %81, %82, %83, %84, %85, %86, %87, " \
    "%88, %89, %90, %91, %92, %93, %94, %95"
#define CANNY_FROM_96 \
    "%96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111"
#define CANNY_FROM_112 \
    "%112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define CANNY_TO_32 CANNY_FROM_0 ", " CANNY_FROM_16
#define CANNY_TO_64 CANNY_TO_32 ", " CANNY_FROM_32 ", " CANNY_FROM_48
#define CANNY_TO_96 CANNY_TO_64 ", " CANNY_FROM_64 ", " CANNY_FROM_80

// c (64×n, float) = a (64×16, half) · b, by the four warps of a warpgroup, n being twice the sums of a thread; added to c
// where `add`. multiply_group: b (n×16) transposed; multiply_rows: b (16×n), row after row. Each warp has 16 rows of a and
// c, in the fragments of mma.m16n8k16; b is in shared memory. c is only to be read after products_wait, and a only to be
// changed then.
#ifdef CANNY_HOPPER
#define CANNY_PRODUCT(name, rows, n, count, list, a_and_b, adds, ...)                                                   \
    __device__ __forceinline__ void name(                                                                              \
        float (&c)[count], const uint32_t (&a)[4], uint64_t b, bool add = true                                         \
    ) {                                                                                                                \
        asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" n          \
                     "k16.f32.f16.f16 {" list "}, " a_and_b ", add, 1, 1, " rows ";\n}"                                \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(add)));                        \
    }
#else
#define CANNY_PRODUCT(name, rows, n, count, list, a_and_b, adds, ...) \
    __device__ __forceinline__ void name(float (&)[count], const uint32_t (&)[4], uint64_t, bool = true) {}
#endif

CANNY_PRODUCT(multiply_group, "0", "48", 24, CANNY_FROM_0 ", %16, %17, %18, %19, %20, %21, %22, %23",
              "{%24, %25, %26, %27}, %28", "%29", CANNY_SUMS_16(0), CANNY_SUMS_8(16))
CANNY_PRODUCT(multiply_group, "0", "64", 32, CANNY_TO_32, "{%32, %33, %34, %35}, %36", "%37", CANNY_SUMS_32(0))
CANNY_PRODUCT(multiply_group, "0", "80", 40, CANNY_TO_32 ", %32, %33, %34, %35, %36, %37, %38, %39",
              "{%40, %41, %42, %43}, %44", "%45", CANNY_SUMS_32(0), CANNY_SUMS_8(32))
CANNY_PRODUCT(multiply_group, "0", "128", 64, CANNY_TO_64, "{%64, %65, %66, %67}, %68", "%69", CANNY_SUMS_64(0))
CANNY_PRODUCT(multiply_group, "0", "160", 80, CANNY_TO_64 ", " CANNY_FROM_64,
              "{%80, %81, %82, %83}, %84", "%85", CANNY_SUMS_64(0), CANNY_SUMS_16(64))
CANNY_PRODUCT(multiply_group, "0", "192", 96, CANNY_TO_96,
              "{%96, %97, %98, %99}, %100", "%101", CANNY_SUMS_64(0), CANNY_SUMS_32(64))
CANNY_PRODUCT(multiply_group, "0", "256", 128, CANNY_TO_96 ", " CANNY_FROM_96 ", " CANNY_FROM_112,
              "{%128, %129, %130, %131}, %132", "%133", CANNY_SUMS_64(0), CANNY_SUMS_64(64))
CANNY_PRODUCT(multiply_rows, "1", "40", 20, CANNY_FROM_0 ", %16, %17, %18, %19",
              "{%20, %21, %22, %23}, %24", "%25", CANNY_SUMS_16(0), CANNY_SUMS_4(16))
CANNY_PRODUCT(multiply_rows, "1", "64", 32, CANNY_TO_32, "{%32, %33, %34, %35}, %36", "%37", CANNY_SUMS_32(0))
CANNY_PRODUCT(multiply_rows, "1", "80", 40, CANNY_TO_32 ", %32, %33, %34, %35, %36, %37, %38, %39",
              "{%40, %41, %42, %43}, %44", "%45", CANNY_SUMS_32(0), CANNY_SUMS_8(32))
CANNY_PRODUCT(multiply_rows, "1", "128", 64, CANNY_TO_64, "{%64, %65, %66, %67}, %68", "%69", CANNY_SUMS_64(0))

#undef CANNY_PRODUCT
#undef CANNY_SUMS_4
#undef CANNY_SUMS_8
#undef CANNY_SUMS_16
#undef CANNY_SUMS_32
#undef CANNY_SUMS_64
#undef CANNY_FROM_0
#undef CANNY_FROM_16
#undef CANNY_FROM_32
#undef CANNY_FROM_48
#undef CANNY_FROM_64
#undef CANNY_FROM_80
#undef CANNY_FROM_96
#undef CANNY_FROM_112
#undef CANNY_TO_32
#undef CANNY_TO_64
#undef CANNY_TO_96

// A warpgroup gives registers of its threads to the others of its block, or waits for some; a multiple of 8.
template <int kCount>
__device__ __forceinline__ void registers_less() {
#ifdef CANNY_HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void registers_more() {
#ifdef CANNY_HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// -- clusters --------------------------------------------------------------------------------------------------------

// Four floats that lie at the address of `mine` in the shared memory of the block number `rank` of the cluster.
__device__ __forceinline__ float4 cluster_read_4(const float* mine, int rank) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(cluster_address(mine, rank))
                 : "memory");
    return v;
}

// Two of them.
__device__ __forceinline__ float2 cluster_read_2(const float* mine, int rank) {
    float2 v;
    uint32_t theirs = cluster_address(mine, rank);
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(theirs) : "memory");
    return v;
}

// Write four floats to an address that `cluster_address` has given, or beyond it.
__device__ __forceinline__ void cluster_write_4(uint32_t theirs, float x, float y, float z, float w) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(theirs), "f"(x), "f"(y), "f"(z), "f"(w)
                 : "memory");
}

}  // namespace canny
#endif

namespace canny {

// Where a matrix of rows of 64 halves lies: the 16 bytes number c of row r at 128 r + 16 (c xor r mod 8), from an
// address that is a multiple of 1024 on. 16 columns further is 2 more.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
    constexpr uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// The same rows as those of matrix_at, but multiplied along: 16 rows further is 128 more. `box`: bytes from one 64
// columns to the next.
__device__ __forceinline__ uint64_t rows_at(uint32_t address, uint32_t box) {
    constexpr uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(box / 16) << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

}  // namespace canny
