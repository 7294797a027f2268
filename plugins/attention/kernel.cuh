// Multi-head attention (Vaswani et al. 2017) in one pass over the keys (FlashAttention-2, Dao 2023), in half precision.
//
// A warp has 16 queries. For each tile of keys it takes their scores, the maximum so far, the exponentials, and adds
// the values, all in registers; keys and values of the next tile are copied to shared memory meanwhile. Sums and
// products are in float, the exponentials that the values are multiplied with in half.
#pragma once

#include "call.h"
#include "mma.cuh"

namespace canny {

constexpr float kFar = -1e30f;  // below every score, and finite: infinity less infinity is no number

constexpr int32_t padded_width(int32_t width) { return (width + 15) / 16 * 16; }
constexpr int32_t row_pitch(int32_t width) { return padded_width(width) + 8; }  // no bank conflicts in load_matrices

// Bytes of shared memory: keys and values of a tile, and of the next one where there is one.
template <int D, int kKeys>
constexpr int32_t shared_bytes(int32_t keys) {
    return (keys > kKeys ? 2 : 1) * 2 * kKeys * row_pitch(D) * int32_t(sizeof(__half));
}

template <int D, int kKeys>
struct AttentionBlock {
    static constexpr int kPitch = row_pitch(D), kSteps = padded_width(D) / 16, kTiles = kKeys / 8, kWide = D / 8;
    const CannyAttention& p;
    __half* stages;  // of keys, then values; tiles take them in turn
    const __half *k, *v;
    int32_t lane, row, pair;

    __device__ __forceinline__ explicit AttentionBlock(const CannyAttention& call) : p(call) {
        stages = reinterpret_cast<__half*>(shared_memory());
        int64_t start = int64_t(blockIdx.z) * p.keys * p.kv_stride + int64_t(blockIdx.y) * D;
        k = static_cast<const __half*>(p.k) + start;
        v = static_cast<const __half*>(p.v) + start;
        lane = threadIdx.x % 32;
        row = lane / 4;  // this thread has rows `row` and `row + 8` of the warp's queries, and of each 8 columns two
        pair = lane % 4 * 2;
    }

    __device__ __forceinline__ __half* keys_of(int32_t tile) const { return stages + tile % 2 * 2 * kKeys * kPitch; }
    __device__ __forceinline__ __half* values_of(int32_t tile) const { return keys_of(tile) + kKeys * kPitch; }

    // Begin to copy tile number `tile`.
    __device__ __forceinline__ void begin(int32_t tile) const {
        for (int32_t i = threadIdx.x; i < kKeys * kWide; i += blockDim.x) {
            int32_t key = i / kWide, column = i % kWide * 8, at = tile * kKeys + key;
            bool there = at < p.keys;
            int64_t from = int64_t(there ? at : 0) * p.kv_stride + column;
            copy_16(keys_of(tile) + key * kPitch + column, k + from, there);
            copy_16(values_of(tile) + key * kPitch + column, v + from, there);
        }
        copies_commit();
    }

    // The columns of keys beyond the head's width are zero once and for all.
    __device__ __forceinline__ void clear_padding() const {
        int32_t rows = p.keys > kKeys ? 4 * kKeys : 2 * kKeys;
        for (int32_t i = threadIdx.x; D % 16 && i < rows; i += blockDim.x)
            for (int32_t c = D; c < kPitch; c++) from_float(0.f, stages[i * kPitch + c]);
    }

    __device__ __forceinline__ void load_queries(uint32_t (&a)[kSteps][4], int32_t first) const {
        int64_t start = int64_t(blockIdx.z % p.query_batch) * p.tokens * p.q_stride + int64_t(blockIdx.y) * D;
        const __half* q = static_cast<const __half*>(p.q) + start;
#pragma unroll
        for (int s = 0; s < kSteps; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t token = first + row + i % 2 * 8, column = s * 16 + i / 2 * 8 + pair;
                bool there = token < p.tokens && column < D;
                a[s][i] = there ? *reinterpret_cast<const uint32_t*>(q + int64_t(token) * p.q_stride + column) : 0u;
            }
    }

    // Scores of the warp's queries with the keys of a tile, those that do not exist far below the others.
    __device__ __forceinline__ void score(float (&s)[kTiles][4], const uint32_t (&a)[kSteps][4], int32_t tile) const {
        const __half* stage = keys_of(tile);
#pragma unroll
        for (int n = 0; n < kTiles; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
        for (int step = 0; step < kSteps; step++)
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                uint32_t b[4];
                int32_t key = n * 8 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
                load_matrices(b, stage + key * kPitch + column);
                multiply(s[n], a[step], b[0], b[1]);
                multiply(s[n + 1], a[step], b[2], b[3]);
            }
        int32_t left = p.keys - tile * kKeys;
        if (left >= kKeys) return;
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (n * 8 + pair + i % 2 >= left) s[n][i] = kFar;
    }

    // Scores become exponentials over the new maximum; `most` and `sum` are of rows `row` and `row + 8`, `sum` of this
    // thread's columns only; returns by what the sums so far shrink.
    __device__ __forceinline__ float2 exponentials(float (&s)[kTiles][4], float (&most)[2], float (&sum)[2]) const {
        const float scale = p.scale * 1.4426950408889634f;
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float high = most[half];
#pragma unroll
            for (int n = 0; n < kTiles; n++) high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
            shrink[half] = exp2_fast((most[half] - high) * scale);
            most[half] = high;
            float total = 0.f;
#pragma unroll
            for (int n = 0; n < kTiles; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = exp2_fast(s[n][i] * scale - high * scale);
                    total += s[n][i];
                }
            sum[half] = sum[half] * shrink[half] + total;
        }
        return make_float2(shrink[0], shrink[1]);
    }

    __device__ __forceinline__ void add_values(float (&y)[kWide][4], const float (&s)[kTiles][4], int32_t tile) const {
        const __half* stage = values_of(tile);
#pragma unroll
        for (int t = 0; t < kTiles; t += 2) {
            uint32_t a[4] = {
                pack(s[t][0], s[t][1]), pack(s[t][2], s[t][3]), pack(s[t + 1][0], s[t + 1][1]),
                pack(s[t + 1][2], s[t + 1][3])
            };
#pragma unroll
            for (int n = 0; n < kWide; n += 2) {
                uint32_t b[4];
                int32_t key = t * 8 + lane / 8 % 2 * 8 + lane % 8, column = n * 8 + lane / 16 * 8;
                load_transposed(b, stage + key * kPitch + column);
                multiply(y[n], a, b[0], b[1]);
                if (n + 1 < kWide) multiply(y[n + 1], a, b[2], b[3]);
            }
        }
    }

    __device__ __forceinline__ void store(const float (&y)[kWide][4], const float (&sum)[2], int32_t first) const {
        __half* to = static_cast<__half*>(p.y) + int64_t(blockIdx.z) * p.tokens * p.y_stride + blockIdx.y * D;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            float by = 1.f / total;
            int32_t token = first + row + 8 * half;
            if (token >= p.tokens) continue;
#pragma unroll
            for (int n = 0; n < kWide; n++)
                *reinterpret_cast<uint32_t*>(to + int64_t(token) * p.y_stride + n * 8 + pair) =
                    pack(y[n][2 * half] * by, y[n][2 * half + 1] * by);
        }
    }
};

// Grid: blocks of 16 queries a warp, heads, B.
template <int D, int kKeys>
__global__ void __launch_bounds__(128) attention(const CannyAttention p) {
    using Block = AttentionBlock<D, kKeys>;
    Block block(p);
    int32_t first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 16;
    int32_t tiles = (p.keys + kKeys - 1) / kKeys;
    block.clear_padding();
    wait_for_previous();
    block.begin(0);
    uint32_t queries[Block::kSteps][4];
    block.load_queries(queries, first);
    float y[Block::kWide][4] = {}, most[2] = {kFar, kFar}, sum[2] = {};
    for (int32_t tile = 0; tile < tiles; tile++) {
        copies_wait<0>();
        __syncthreads();  // this tile is there, and every warp is done with the one before
        if (tile + 1 < tiles) block.begin(tile + 1);
        float scores[Block::kTiles][4];
        block.score(scores, queries, tile);
        float2 shrink = block.exponentials(scores, most, sum);
#pragma unroll
        for (int n = 0; n < Block::kWide; n++) {
            y[n][0] *= shrink.x, y[n][1] *= shrink.x;
            y[n][2] *= shrink.y, y[n][3] *= shrink.y;
        }
        block.add_values(y, scores, tile);
    }
    block.store(y, sum, first);
}

// Warps of a block: fewer where there would be fewer blocks than a GPU has processors.
inline int32_t attention_warps(const CannyAttention& call) {
    int32_t warps = 4;
    while (warps > 1 && (call.tokens + 16 * warps - 1) / (16 * warps) * call.heads * call.batch < 96) warps /= 2;
    return warps;
}

template <int D, typename Launch>
bool run_attention(const CannyAttention& call, Launch&& launch) {
    int32_t warps = attention_warps(call);
    dim3 grid((call.tokens + 16 * warps - 1) / (16 * warps), call.heads, call.batch);
    if (call.keys <= 80) return launch(attention<D, 80>, grid, 32 * warps, shared_bytes<D, 80>(call.keys), call);
    return launch(attention<D, 64>, grid, 32 * warps, shared_bytes<D, 64>(call.keys), call);
}

// Do a call with `launch(kernel, grid, threads, bytes of shared memory, call)`; false where its shape has no kernel.
template <typename Launch>
bool run_attention(const CannyAttention& call, Launch&& launch) {
    bool sizes = call.batch > 0 && call.query_batch > 0 && call.heads > 0 && call.tokens > 0 && call.keys > 0;
    if (!sizes || call.batch > 65535 || call.heads > 65535) return false;
    if (call.q_stride % 8 || call.kv_stride % 8 || call.y_stride % 2) return false;
    if (call.width == 40) return run_attention<40>(call, launch);
    if (call.width == 64) return run_attention<64>(call, launch);
    if (call.width == 80) return run_attention<80>(call, launch);
    if (call.width == 160) return run_attention<160>(call, launch);
    return false;
}

}  // namespace canny
