// What attention needs of a GPU beyond plain CUDA: matrix products of a warp, and copies that run in the background.
//
// tests/mma_emulator.hpp has the same names for a CPU.
#pragma once

#include "../group_norm/device.cuh"

#ifdef EMULATE_CUDA
#include "mma_emulator.hpp"
#else
namespace canny {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8×8 matrices of halves; thread i names row i % 8 of matrix i / 8 and gets elements 2 (i % 4), + 1 of each row i
// / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const __half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const __half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two of them, whose rows the first 16 threads name.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[2], const __half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16×8, float) += a (16×16, half) · b (16×8, half), in the fragments of mma.m16n8k16: four of a, two of b.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}

// The same with a (16×8) and b (8×8), in those of mma.m16n8k8: two of a, one of b.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t* a, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// A barrier for the `threads` threads of group number `group` of at most kGroups. Were its number not known when this
// is compiled, the block would take all 16 barriers, and a processor would have room for few blocks.
template <int kGroups>
__device__ __forceinline__ void group_sync(int32_t group, int32_t threads) {
    if (group == kGroups - 1)
        asm volatile("bar.sync %0, %1;" ::"n"(kGroups), "r"(threads) : "memory");
    else if constexpr (kGroups > 1)
        group_sync<kGroups - 1>(group, threads);
}

// Begin to copy 16 bytes to shared memory, or zeros where they are not `there`.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// What was begun since the last commit is one group; wait until at most kLeft groups are under way.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kLeft>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
}

}  // namespace canny
#endif

namespace canny {

constexpr float kFar = -1e30f;  // below every score, and finite: infinity less infinity is no number

}  // namespace canny
