// LayerNorm, the gate of GEGLU, sums and skips, over tokens, 16 bytes at a time; arithmetic in float.
#pragma once

#include "call.h"

#include "../group_norm/device.cuh"

namespace canny {

constexpr int kNormWarps = 4;  // of a block; each has a token
constexpr int kGateThreads = 256;

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// A warp has a token, a thread of it up to kHeld vectors. The variance is that of the differences from the mean, as
// they are at hand.
template <int kHeld>
__global__ void __launch_bounds__(32 * kNormWarps) layer_norm(const CannyLayerNorm p) {
    int32_t token = blockIdx.x * kNormWarps + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.channels / kWidth;
    if (token >= p.tokens) return;
    wait_for_previous();
    const __half* x = static_cast<const __half*>(p.x) + int64_t(token) * p.channels;
    Vector<__half> held[kHeld];
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int v = 0; v < kHeld; v++) {
        held[v].clear(0);
        if (v * 32 + lane < vectors) held[v].load(x + (v * 32 + lane) * kWidth);
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum += to_float(held[v].value[i]);
    }
    float mean = sum_of_warp(sum) / p.channels;
#pragma unroll
    for (int v = 0; v < kHeld; v++)
#pragma unroll
        for (int i = 0; i < kWidth; i++) {
            float off = v * 32 + lane < vectors ? to_float(held[v].value[i]) - mean : 0.f;
            squares += off * off;
        }
    float by = rsqrtf(sum_of_warp(squares) / p.channels + p.epsilon);
    __half* y = static_cast<__half*>(p.y) + int64_t(token) * p.channels;
#pragma unroll
    for (int v = 0; v < kHeld; v++) {
        int32_t at = (v * 32 + lane) * kWidth;
        if (at >= p.channels) break;
        Vector<float> gamma, beta;
        gamma.load(p.gamma + at);
        beta.load(p.beta + at);
#pragma unroll
        for (int i = 0; i < kWidth; i++)
            from_float(
                (to_float(held[v].value[i]) - mean) * by * gamma.value[i] + beta.value[i], held[v].value[i]
            );
        held[v].store(y + at);
    }
}

// A thread has a vector.
__global__ void __launch_bounds__(kGateThreads) geglu(const CannyGeglu p) {
    int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
    int32_t vectors = p.channels / kWidth;
    if (i >= int64_t(p.tokens) * vectors) return;
    wait_for_previous();
    int64_t token = i / vectors, at = i % vectors * kWidth;
    const __half* x = static_cast<const __half*>(p.x) + token * 2 * p.channels + at;
    Vector<__half> a, b;
    a.load(x);
    b.load(x + p.channels);
#pragma unroll
    for (int k = 0; k < kWidth; k++) {
        float gate = to_float(b.value[k]);
        from_float(to_float(a.value[k]) * gelu(gate), a.value[k]);
    }
    a.store(static_cast<__half*>(p.y) + token * p.channels + at);
}

// A thread has a vector.
__global__ void __launch_bounds__(kGateThreads) add(const CannyAdd p) {
    int64_t at = (int64_t(blockIdx.x) * kGateThreads + threadIdx.x) * kWidth;
    if (at >= p.count) return;
    wait_for_previous();
    Vector<__half> a, b;
    a.load(static_cast<const __half*>(p.a) + at);
    b.load(static_cast<const __half*>(p.b) + at);
#pragma unroll
    for (int i = 0; i < kWidth; i++) from_float(to_float(a.value[i]) + to_float(b.value[i]), a.value[i]);
    a.store(static_cast<__half*>(p.y) + at);
}

// A thread has a vector.
__global__ void __launch_bounds__(kGateThreads) join(const CannyJoin p) {
    int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
    int32_t both = p.first + p.second, vectors = both / kWidth;
    if (i >= int64_t(p.batch) * p.positions * vectors) return;
    wait_for_previous();
    int64_t position = i / vectors;
    int32_t at = int32_t(i - position * vectors) * kWidth;
    bool of_x = at < p.first;
    const void *base = of_x ? p.x : p.skip, *added = of_x ? p.x_residual : p.residual;
    int64_t from = of_x ? position * p.first + at : position * p.second + at - p.first;
    Vector<__half> y, residual;
    y.load(static_cast<const __half*>(base) + from);
    if (added != nullptr) {
        residual.load(static_cast<const __half*>(added) + from);
        add_scaled(y, (of_x ? p.x_scales : p.scales)[position / p.positions], residual);
    }
    y.store(static_cast<__half*>(p.y) + position * both + at);
}

// Do a call with `launch(kernel, blocks, threads, bytes, call)`; false where its shape has no kernel.
template <typename Launch>
bool run_layer_norm(const CannyLayerNorm& call, Launch&& launch) {
    if (call.tokens < 1 || call.channels < 1 || call.channels % kWidth) return false;
    dim3 grid((call.tokens + kNormWarps - 1) / kNormWarps);
    int32_t held = (call.channels / kWidth + 31) / 32;
    if (held <= 2) return launch(layer_norm<2>, grid, 32 * kNormWarps, 0, call);
    if (held <= 3) return launch(layer_norm<3>, grid, 32 * kNormWarps, 0, call);
    if (held <= 5) return launch(layer_norm<5>, grid, 32 * kNormWarps, 0, call);
    return held <= 8 && launch(layer_norm<8>, grid, 32 * kNormWarps, 0, call);
}

// A kernel with this many threads, whose threads have a vector each.
template <typename Call, typename Launch>
bool run_vectors(void (*kernel)(const Call), int64_t threads, const Call& call, Launch&& launch) {
    int64_t blocks = (threads + kGateThreads - 1) / kGateThreads;
    return blocks <= INT32_MAX && launch(kernel, dim3(uint32_t(blocks)), kGateThreads, 0, call);
}

template <typename Launch>
bool run_geglu(const CannyGeglu& call, Launch&& launch) {
    if (call.tokens < 1 || call.channels < 1 || call.channels % kWidth) return false;
    return run_vectors(geglu, int64_t(call.tokens) * (call.channels / kWidth), call, launch);
}

template <typename Launch>
bool run_add(const CannyAdd& call, Launch&& launch) {
    if (call.count < 1 || call.count % kWidth) return false;
    return run_vectors(add, call.count / kWidth, call, launch);
}

template <typename Launch>
bool run_join(const CannyJoin& call, Launch&& launch) {
    bool sizes = call.batch > 0 && call.positions > 0 && call.first > 0 && call.second > 0;
    if (!sizes || call.first % kWidth || call.second % kWidth) return false;
    int64_t vectors = int64_t(call.batch) * call.positions * ((call.first + call.second) / kWidth);
    return run_vectors(join, vectors, call, launch);
}

}  // namespace canny
