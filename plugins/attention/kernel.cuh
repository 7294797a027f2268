// Multi-head attention (Vaswani et al. 2017) in one pass over the keys (FlashAttention-2, Dao 2023), in half precision.
//
// A warp has 16·kRows queries. For each tile of keys it takes their scores, the maximum so far, the exponentials, and
// adds the values, all in registers; keys and values of its next tile are copied to shared memory meanwhile. Sums and
// products are in float, the exponentials that the values are multiplied with in half.
//
// A block has `groups` groups of `warps` warps with the same queries; the groups take the tiles of keys in turn, each
// in shared memory of its own and at its own pace, and merge what they found at the end, always in the same order.
//
// Under a causal mask query i has keys 0 to i alone. Then a block has no tile beyond its last query, and a warp leaves out
// those beyond its own; a group of warps may so be without any, which the merge weighs by 0.
#pragma once

#include "../clusters.cuh"
#include "call.h"
#include "mma.cuh"

namespace canny {

constexpr float kHeadroom = 8.f;         // exponentials are at most 2 to this power: far from what half can hold
constexpr uint32_t kOnes = 0x3c003c00u;  // two halves

// Elements from one row to the next in shared memory, with which neither halves in load_matrices nor floats in merge
// conflict for banks.
constexpr int32_t row_pitch(int32_t width) { return width % 16 ? width : width + 8; }
constexpr int32_t ceil_div(int64_t n, int64_t d) { return int32_t((n + d - 1) / d); }
// Of a block: no more than leave each thread the registers that it takes, up to 255 and, of 384, 168.
constexpr int32_t most_threads(int32_t width, int32_t keys) { return keys == 80 ? 192 : width == 160 ? 256 : 384; }
__host__ __device__ constexpr int32_t most_groups(int32_t width, int32_t keys) {
    return keys == 80 ? 1 : width == 160 ? 6 : 4;
}

// One warp and its group's shared memory.
template <int D, int kKeys, int kRows, bool kCausal = false>
struct AttentionBlock {
    // So that a tile which begins no later than a warp's first query has a key for each of them.
    static_assert(!kCausal || (kRows == 1 && kKeys % 16 == 0));
    static constexpr int kPitch = row_pitch(D), kTiles = kKeys / 8, kWide = D / 8, kStage = 2 * kKeys * kPitch;
    using Queries = uint32_t[kRows][D / 4];
    using Scores = float[kRows][kTiles][4];
    using Sums = float[kRows][kWide + 1][4];  // of values, and in the last 8 columns of the weights themselves
    using Most = float[kRows][2];             // scores times `scale`, of rows `row` and `row + 8`
    const CannyAttention& p;
    __half* stages;  // of keys, then values; a group's tiles take them in turn
    int32_t group, thread, threads, lane, row, pair;
    float scale;

    __device__ __forceinline__ explicit AttentionBlock(const CannyAttention& call) : p(call) {
        threads = 32 * p.warps;
        group = threadIdx.x / threads;
        thread = threadIdx.x % threads;
        stages = reinterpret_cast<__half*>(shared_memory()) + group * stages_of(p) * kStage;
        lane = thread % 32;
        row = lane / 4;  // this thread has rows `row` and `row + 8` of each 16 queries, and of each 8 columns two
        pair = lane % 4 * 2;
        scale = p.scale * 1.4426950408889634f;
    }

    static __host__ __device__ int32_t stages_of(const CannyAttention& p) { return p.keys > kKeys * p.groups ? 2 : 1; }

    // Bytes of shared memory: the stages of all groups, and later in their place what the groups merge.
    static int64_t shared_bytes(const CannyAttention& p) {
        int64_t copied = int64_t(stages_of(p)) * p.groups * kStage * int64_t(sizeof(__half));
        int64_t merged = int64_t(p.groups) * p.warps * 16 * kRows * (kPitch + 2) * int64_t(sizeof(float));
        return p.groups > 1 && merged > copied ? merged : copied;
    }

    __device__ __forceinline__ __half* keys_of(int32_t turn) const { return stages + turn % 2 * kStage; }
    __device__ __forceinline__ __half* values_of(int32_t turn) const { return keys_of(turn) + kKeys * kPitch; }

    // The first query of this warp, counted from the block's first.
    __device__ __forceinline__ int32_t first() const { return thread / 32 * 16 * kRows; }
    __device__ __forceinline__ int32_t queries_before() const { return blockIdx.x * p.warps * 16 * kRows; }

    // Keys that any query of this block has.
    __device__ __forceinline__ int32_t keys() const {
        return kCausal ? min(p.keys, queries_before() + p.warps * 16 * kRows) : p.keys;
    }

    // Under a causal mask: how many keys of a tile the first query of this warp has; each after it has one more.
    __device__ __forceinline__ int32_t seen(int32_t tile) const {
        return queries_before() + first() + 1 - tile * kKeys;
    }

    // Begin to copy a tile, the group's number `turn`.
    __device__ __forceinline__ void begin(int32_t tile, int32_t turn) const {
        int32_t start = tile * kKeys, left = keys() - start;
        uint32_t first = (blockIdx.z * p.keys + start) * p.kv_stride + blockIdx.y * D;
        for (int32_t i = thread; i < kKeys * kWide; i += threads) {
            int32_t key = i / kWide, column = i % kWide * 8, to = key * kPitch + column;
            uint32_t from = first + key * p.kv_stride + column;
            copy_16(keys_of(turn) + to, static_cast<const __half*>(p.k) + from, int32_t(key) < left);
            copy_16(values_of(turn) + to, static_cast<const __half*>(p.v) + from, int32_t(key) < left);
        }
        copies_commit();
    }

    __device__ __forceinline__ void load_queries(Queries& q) const {
        int64_t start = int64_t(blockIdx.z % p.query_batch) * p.tokens * p.q_stride + int64_t(blockIdx.y) * D;
        const __half* from = static_cast<const __half*>(p.q) + start;
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int i = 0; i < D / 4; i++) {
                int32_t token = queries_before() + first() + r * 16 + row + i % 2 * 8;
                const __half* at = from + int64_t(token) * p.q_stride + i / 2 * 8 + pair;
                q[r][i] = token < p.tokens ? *reinterpret_cast<const uint32_t*>(at) : 0u;
            }
    }

    // Scores of the warp's queries with the keys of a tile, those that a query does not have far below the others.
    __device__ __forceinline__ void score(Scores& s, const Queries& q, int32_t tile, int32_t turn) const {
        const __half* stage = keys_of(turn);
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int n = 0; n < kTiles; n++) s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = 0.f;
        uint32_t b[4];
#pragma unroll
        for (int step = 0; step < D / 16; step++)
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                int32_t key = n * 8 + lane / 16 * 8 + lane % 8, column = step * 16 + lane / 8 % 2 * 8;
                load_matrices(b, stage + key * kPitch + column);
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    multiply(s[r][n], q[r] + 4 * step, b[0], b[1]);
                    multiply(s[r][n + 1], q[r] + 4 * step, b[2], b[3]);
                }
            }
        // The last 8 columns of a width like 40. Rows beyond the keys, which `values_of` has, are loaded for nothing.
#pragma unroll
        for (int n = 0; D % 16 && n < kTiles; n += 4) {
            load_matrices(b, stage + (n * 8 + lane) * kPitch + D - 8);
#pragma unroll
            for (int i = 0; i < 4 * kRows; i++)
                if (n + i / kRows < kTiles)
                    multiply(s[i % kRows][n + i / kRows], q[i % kRows] + D / 16 * 4, b[i / kRows]);
        }
        int32_t left = keys() - tile * kKeys;
        if (left >= kKeys && (!kCausal || seen(tile) >= kKeys)) return;
#pragma unroll
        for (int i = 0; i < kRows * kTiles * 4; i++) {
            int32_t most = kCausal ? min(left, seen(tile) + row + i % 4 / 2 * 8) : left;
            if (i / 4 % kTiles * 8 + pair + i % 2 >= most) s[i / 4 / kTiles][i / 4 % kTiles][i % 4] = kFar;
        }
    }

    // Exponentials are over a maximum that may be too low by kHeadroom, so that few tiles raise it and shrink the sums.
    // What a query gets does not depend on the others of its warp.
    __device__ __forceinline__ void raise(Sums& y, Most& most, const Scores& s) const {
        float high[kRows][2];
        bool above = false;
#pragma unroll
        for (int i = 0; i < 2 * kRows; i++) {
            int r = i / 2, half = i % 2;
            float top = fmaxf(s[r][0][2 * half], s[r][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < kTiles; n++) top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            high[r][half] = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * scale;
            above |= high[r][half] - most[r][half] > kHeadroom;
        }
        if (!__any_sync(0xffffffffu, above)) return;
#pragma unroll
        for (int i = 0; i < 2 * kRows; i++) {
            int r = i / 2, half = i % 2;
            float top = high[r][half] - most[r][half] > kHeadroom ? high[r][half] : most[r][half];
            float shrink = exp2_fast(most[r][half] - top);
            most[r][half] = top;
#pragma unroll
            for (int n = 0; n <= kWide; n++) y[r][n][2 * half] *= shrink, y[r][n][2 * half + 1] *= shrink;
        }
    }

    // Add the values of a tile, each times the exponential of its score; these are taken 16 keys at a time, so that one
    // step's run beside the products of the step before.
    __device__ __forceinline__ void add_values(Sums& y, const Most& most, const Scores& s, int32_t turn) const {
        const __half* stage = values_of(turn);
#pragma unroll
        for (int t = 0; t < kTiles; t += 2) {
            uint32_t a[kRows][4];
#pragma unroll
            for (int i = 0; i < 4 * kRows; i++) {
                int r = i / 4, half = i % 2;
                const float* two = &s[r][t + i % 4 / 2][2 * half];
                float top = most[r][half];
                a[r][i % 4] = pack(exp2_fast(fmaf(two[0], scale, -top)), exp2_fast(fmaf(two[1], scale, -top)));
            }
            const __half* rows = stage + (t * 8 + lane / 8 % 2 * 8 + lane % 8) * kPitch;
#pragma unroll
            for (int n = 0; n + 1 < kWide; n += 2) {
                uint32_t b[4];
                load_transposed(b, rows + n * 8 + lane / 16 * 8);
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    multiply(y[r][n], a[r], b[0], b[1]);
                    multiply(y[r][n + 1], a[r], b[2], b[3]);
                }
            }
            uint32_t b[2];
            if (kWide % 2) load_transposed(b, rows + D - 8);
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                if (kWide % 2) multiply(y[r][kWide - 1], a[r], b[0], b[1]);
                multiply(y[r][kWide], a[r], kOnes, kOnes);
            }
        }
    }

    __device__ __forceinline__ __half* result(int32_t token) const {
        return static_cast<__half*>(p.y) + (int64_t(blockIdx.z) * p.tokens + token) * p.y_stride + blockIdx.y * D;
    }

    // The result of a block of one group.
    __device__ __forceinline__ void store(const Sums& y) const {
#pragma unroll
        for (int i = 0; i < 2 * kRows; i++) {
            int r = i / 2, half = i % 2;
            int32_t token = queries_before() + first() + r * 16 + row + 8 * half;
            if (token >= p.tokens) continue;
            float by = reciprocal_fast(y[r][kWide][2 * half]);
#pragma unroll
            for (int n = 0; n < kWide; n++)
                *reinterpret_cast<uint32_t*>(result(token) + n * 8 + pair) =
                    pack(y[r][n][2 * half] * by, y[r][n][2 * half + 1] * by);
        }
    }

    // The result of several groups: each leaves its sums and maxima in shared memory, then all threads add them up.
    __device__ __forceinline__ void merge(const Sums& y, const Most& most) const {
        const int32_t queries = p.warps * 16 * kRows;
        float* sums = reinterpret_cast<float*>(shared_memory());
        float2* heads = reinterpret_cast<float2*>(sums + p.groups * queries * kPitch);
        __syncthreads();  // no group reads keys and values any more
#pragma unroll
        for (int i = 0; i < 2 * kRows; i++) {
            int r = i / 2, half = i % 2;
            int32_t at = group * queries + first() + r * 16 + row + 8 * half;
#pragma unroll
            for (int n = 0; n < kWide; n++)
                *reinterpret_cast<float2*>(sums + at * kPitch + n * 8 + pair) =
                    make_float2(y[r][n][2 * half], y[r][n][2 * half + 1]);
            if (pair == 0) heads[at] = make_float2(most[r][half], y[r][kWide][2 * half]);
        }
        __syncthreads();  // every group's sums are there
        for (int32_t i = threadIdx.x; i < queries * kWide; i += blockDim.x) {
            int32_t query = i / kWide, column = i % kWide * 8, token = queries_before() + query;
            if (token >= p.tokens) break;
            float high = kFar, total = 0.f, sum[kWidth] = {};
#pragma unroll 2
            for (int32_t g = 0; g < p.groups; g++) high = fmaxf(high, heads[g * queries + query].x);
#pragma unroll 2
            for (int32_t g = 0; g < p.groups; g++) {
                float2 head = heads[g * queries + query];
                float by = exp2_fast(head.x - high);  // 0 for a group without keys
                total += by * head.y;
                Vector<float> part;
                part.load(sums + (g * queries + query) * kPitch + column);
                for (int j = 0; j < kWidth; j++) sum[j] += by * part.value[j];
            }
            Vector<__half> all;
            for (int j = 0; j < kWidth; j++) from_float(sum[j] * reciprocal_fast(total), all.value[j]);
            all.store(result(token) + column);
        }
    }
};

// Grid: blocks of 16·kRows queries a warp, heads, B.
template <int D, int kKeys, int kRows, bool kCausal>
__global__ void __launch_bounds__(most_threads(D, kKeys)) attention(const CannyAttention p) {
    using Block = AttentionBlock<D, kKeys, kRows, kCausal>;
    Block block(p);
    int32_t tiles = (block.keys() + kKeys - 1) / kKeys, turn = 0;
    wait_for_previous();
    if (block.group < tiles) block.begin(block.group, 0);
    typename Block::Queries queries;
    block.load_queries(queries);
    typename Block::Sums y = {};
    typename Block::Most most;
    for (int r = 0; r < kRows; r++) most[r][0] = most[r][1] = kFar;
    for (int32_t tile = block.group; tile < tiles; tile += p.groups, turn++) {
        copies_wait<0>();
        group_sync<most_groups(D, kKeys)>(block.group, block.threads);  // the tile is there, the one before done with
        if (tile + p.groups < tiles) block.begin(tile + p.groups, turn + 1);
        if (kCausal && block.seen(tile) < 1) continue;
        typename Block::Scores scores;
        block.score(scores, queries, tile, turn);
        block.raise(y, most, scores);
        block.add_values(y, most, scores, turn);
    }
    let_next_begin();
    if (p.groups > 1)
        block.merge(y, most);
    else
        block.store(y);
}

constexpr int32_t kWarps = 12;             // that a processor shall have, and has registers for
constexpr int32_t kSharedBytes = 99 << 10;  // of a block: what every GPU from compute capability 8.6 on has

// Whether there is a kernel for a call that is cut.
template <int D, int kKeys, int kRows>
bool fits(const CannyAttention& call) {
    return call.warps >= 1 && call.groups >= 1 && call.groups <= most_groups(D, kKeys) &&
           32 * call.warps * call.groups <= most_threads(D, kKeys) &&
           AttentionBlock<D, kKeys, kRows>::shared_bytes(call) <= kSharedBytes;
}

// Choose `warps` and `groups` where they are 0: as many queries a block as leave no processor with over an eighth more
// to do than fewer would, then groups until each has kWarps warps, as far as tiles, threads and shared memory go.
template <int D, int kKeys, int kRows>
CannyAttention cut(CannyAttention call) {
    int64_t most = INT64_MAX / 9;
    int32_t forced = call.warps, tiles = ceil_div(call.keys, kKeys);
    for (int32_t warps = forced ? forced : 6; warps >= (forced ? forced : 1); warps--) {
        int64_t blocks = int64_t(ceil_div(call.tokens, 16 * kRows * int64_t(warps))) * call.heads * call.batch;
        int64_t work = (blocks + kProcessors - 1) / kProcessors * warps;
        if (work * 9 < most * 8) most = work, call.warps = warps;
    }
    if (call.groups) return call;
    call.groups = max(1, int32_t(min(int64_t(tiles), kWarps / most)));
    while (call.groups > 1 && !fits<D, kKeys, kRows>(call)) call.groups--;
    call.groups = ceil_div(tiles, ceil_div(tiles, call.groups));  // no more than take as many turns
    return call;
}

template <int D, int kKeys, int kRows, bool kCausal = false, typename Launch>
bool run_attention(const CannyAttention& given, Launch&& launch) {
    if (given.warps < 0 || given.warps > 12) return false;
    CannyAttention call = cut<D, kKeys, kRows>(given);
    if (!fits<D, kKeys, kRows>(call)) return false;
    dim3 grid(ceil_div(call.tokens, 16 * kRows * call.warps), call.heads, call.batch);
    auto bytes = int32_t(AttentionBlock<D, kKeys, kRows>::shared_bytes(call));
    return launch(attention<D, kKeys, kRows, kCausal>, grid, 32 * call.warps * call.groups, bytes, call);
}

// Do a call with `launch(kernel, grid, threads, bytes of shared memory, call)`; false where its shape has no kernel.
template <typename Launch>
bool run_attention(const CannyAttention& call, Launch&& launch) {
    bool sizes = call.batch > 0 && call.query_batch > 0 && call.heads > 0 && call.tokens > 0 && call.keys > 0;
    if (!sizes || call.batch > 65535 || call.heads > 65535) return false;
    if (int64_t(call.batch) * call.keys * call.kv_stride > INT32_MAX) return false;
    if (call.q_stride % 8 || call.kv_stride % 8 || call.y_stride % 8) return false;
    if (call.causal && (call.width != 64 || call.tokens != call.keys)) return false;
    // One tile for the 77 words; of wide heads, whose tokens are few, many small tiles and so groups.
    bool one = call.keys <= 80;
    if (call.width == 40) return one ? run_attention<40, 80, 1>(call, launch) : run_attention<40, 48, 2>(call, launch);
    if (call.causal)
        return one ? run_attention<64, 80, 1, true>(call, launch) : run_attention<64, 32, 1, true>(call, launch);
    if (call.width == 64) return one ? run_attention<64, 80, 1>(call, launch) : run_attention<64, 32, 1>(call, launch);
    if (call.width == 80) return one ? run_attention<80, 80, 1>(call, launch) : run_attention<80, 32, 1>(call, launch);
    if (call.width != 160) return false;
    return call.keys <= 128 ? run_attention<160, 16, 1>(call, launch) : run_attention<160, 32, 1>(call, launch);
}

}  // namespace canny
