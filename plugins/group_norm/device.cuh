// What the kernels need of the GPU beyond plain CUDA: clusters, 16-byte vectors, fast exponentials.
//
// tests/kernel_emulator.hpp has the same names for a CPU, so that the kernels run there as they are written.
#pragma once

#ifdef EMULATE_CUDA
#include "kernel_emulator.hpp"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace canny {

__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// Every thread of the cluster arrives, then waits; what was written before the one is seen after the other.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// The same without the wait for what was written, which takes long: for those who only have read.
__device__ __forceinline__ void cluster_arrive_read() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address of `mine` in the shared memory of the block number `rank` of the cluster.
__device__ __forceinline__ unsigned cluster_address(const float* mine, int rank) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mine)), theirs = address;
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(address), "r"(rank));
#endif
    return theirs;
}

// What lies there: three numbers. A block that is no part of a cluster is number 0.
__device__ __forceinline__ float3 cluster_read_3(const float* mine, int rank) {
#if __CUDA_ARCH__ >= 900
    float3 is;
    asm volatile("ld.shared::cluster.f32 %0, [%3];\n\tld.shared::cluster.f32 %1, [%3 + 4];\n\t"
                 "ld.shared::cluster.f32 %2, [%3 + 8];"
                 : "=f"(is.x), "=f"(is.y), "=f"(is.z)
                 : "r"(cluster_address(mine, rank))
                 : "memory");
    return is;
#else
    return {mine[0], mine[1], mine[2]};
#endif
}

// Wait for the kernel before this one in the stream, where this one was allowed to start before its end.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same, once `known` has been worked out, which is anything but -1: nothing else keeps the compiler from putting
// arithmetic behind the wait that could be done before.
__device__ __forceinline__ void wait_for_previous(int known) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred is;\n\tsetp.ne.s32 is, %0, -1;\n\t@is griddepcontrol.wait;\n\t}" ::"r"(known)
                 : "memory");
#endif
}

// The next kernel, if it was launched to begin early, may be set up as soon as every block has called this or ended.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rsqrt_fast(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }

}  // namespace canny
#endif

namespace canny {

// n / d for n, d below 8192, `by` being inverse(d): (2n + 1) / 2d is never near the next integer.
__device__ __forceinline__ int32_t divide(int32_t n, uint32_t by) { return int32_t(__umulhi(2u * n + 1u, by)); }

// x·Φ(x), 1.1e-5 off at most of what it is, where that is more than 6e-5: Φ(-|x|) is two to the power of a polynomial.
__device__ __forceinline__ float gelu(float x) {
    float u = fminf(fabsf(x), 10.f), power = 3.0359728e-5f;  // beyond 10 nothing is left, and the polynomial is none
    power = fmaf(power, u, -7.2232564e-4f);
    power = fmaf(power, u, 7.8221812e-3f);
    power = fmaf(power, u, -5.280618e-2f);
    power = fmaf(power, u, -4.5937839e-1f);
    power = fmaf(power, u, -1.1509935f);
    power = fmaf(power, u, -1.f);
    return fmaf(-u, exp2_fast(power), x < 0.f ? 0.f : x);  // NaN stays that
}

constexpr int kWidth = 8;  // channels (or positions) of one vector: 16 bytes in half precision, twice that in single

// kWidth elements, moved 16 bytes at a time.
template <typename T>
struct alignas(16) Vector {
    T value[kWidth];

    __device__ __forceinline__ void load(const T* from) {
        constexpr int kWords = sizeof(Vector) / sizeof(uint4);
#pragma unroll
        for (int i = 0; i < kWords; i++) reinterpret_cast<uint4*>(this)[i] = reinterpret_cast<const uint4*>(from)[i];
    }

    __device__ __forceinline__ void store(T* to) const {
        constexpr int kWords = sizeof(Vector) / sizeof(uint4);
#pragma unroll
        for (int i = 0; i < kWords; i++) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(this)[i];
    }

    __device__ __forceinline__ void clear(int from) {
#pragma unroll
        for (int i = 0; i < kWidth; i++)
            if (i >= from) from_float(0.f, value[i]);
    }
};

// y + scale · x in y, rounded once.
__device__ __forceinline__ void add_scaled(Vector<__half>& y, float scale, const Vector<__half>& x) {
#pragma unroll
    for (int i = 0; i < kWidth; i++)
        from_float(to_float(y.value[i]) + scale * to_float(x.value[i]), y.value[i]);
}

}  // namespace canny
