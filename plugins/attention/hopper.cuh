// Attention over many keys on compute capability 9.0, by products of warpgroups (FlashAttention-3, Shah et al. 2024).
//
// A block has up to three warpgroups of 64 queries each, and a warp that has their keys and values copied, tile after
// tile into a ring in shared memory. Each warpgroup asks for the scores of its next tile before it takes the
// exponentials of this one, and for the products with the values of the tile before, so that the tensor cores run
// meanwhile.
//
// Where that leaves processors idle, the blocks of a cluster have the same queries and a part of the keys each. At the
// end they merge (maximum, sum, values) through each other's shared memory, in the order of the blocks: the same bits
// every time.
#pragma once

#include "tiles.cuh"

namespace canny {

constexpr int32_t kHopperMostHeads = 8191, kHopperMostTokens = 1 << 22;  // that `divide` and a grid take
constexpr int32_t kHopperThreads = (kHopperMostGroups + 1) * kHopperGroup;
constexpr int32_t kHopperRegisters = 160, kHopperFewRegisters = 32;  // of a thread that multiplies, or copies; of 128

// One warpgroup, and the block's shared memory: behind the tiles there are the sums that are merged.
template <int D, int kKeys>
struct HopperBlock : HopperTiles<D, kKeys> {
    using Tiles = HopperTiles<D, kKeys>;
    using Tiles::work, Tiles::p, Tiles::memory, Tiles::rank, Tiles::first, Tiles::turns, Tiles::batch, Tiles::head;
    using Tiles::first_query, Tiles::kBox, Tiles::parity, Tiles::keys_of, Tiles::values_of, Tiles::keys_full;
    using Tiles::values_full, Tiles::release;

    static constexpr int kSteps = (D + 15) / 16, kWide = D / 8, kPitch = row_pitch(D);
    using Queries = uint32_t[kSteps][4];      // in fragments of products, zeros beyond the head
    using Scores = float[kKeys / 2];          // of rows `row` and `row + 8` by turns, two columns of each eight
    using Weights = uint32_t[kKeys / 16][4];  // their exponentials, as queries are
    using Sums = float[D / 2];                // of values times weights, as scores are

    int32_t lane, row, pair;
    float scale;

    __device__ __forceinline__ explicit HopperBlock(const HopperWork& given) : Tiles(given) {
        lane = threadIdx.x % 32;
        row = threadIdx.x / 32 * 16 + lane / 4;
        pair = lane % 4 * 2;
        scale = p.scale * 1.4426950408889634f;
    }

    static int32_t shared_bytes(const HopperWork& work) {
        int32_t merged = work.splits > 1 ? work.groups * 64 * (kPitch + 2) * int32_t(sizeof(float)) : 0;
        return kHopperAlign + Tiles::kBytes + merged;
    }

    __device__ __forceinline__ void load_queries(Queries& q) const {
        int32_t of = batch < p.query_batch ? batch : batch % p.query_batch;
        const __half* from = static_cast<const __half*>(p.q) + int64_t(of) * p.tokens * p.q_stride + head * D + pair;
#pragma unroll
        for (int i = 0; i < 4 * kSteps; i++) {
            int32_t token = first_query + row + i % 2 * 8, column = i / 2 * 8;
            bool there = token < p.tokens && column < D;
            const __half* at = from + int64_t(token) * p.q_stride + column;
            q[i / 4][i % 4] = there ? *reinterpret_cast<const uint32_t*>(at) : 0u;
        }
    }

    // Ask for the scores of the queries with the keys of a tile.
    __device__ __forceinline__ void ask_scores(Scores& s, const Queries& q, int32_t turn) const {
        barrier_wait(keys_full(turn), parity(turn));
        uint64_t b = matrix_at(keys_of(turn));
        products_begin();
#pragma unroll
        for (int i = 0; i < kSteps; i++) multiply_group(s, q[i], b + i / 4 * (kBox * 2 / 16) + i % 4 * 2, i > 0);
    }

    // Those of keys that do not exist are far below the others.
    __device__ __forceinline__ void mask(Scores& s, int32_t turn) const {
        int32_t left = p.keys - (first + turn) * kKeys;
        if (left >= kKeys) return;
#pragma unroll
        for (int i = 0; i < kKeys / 2; i++)
            if (i / 4 * 8 + pair + i % 2 >= left) s[i] = kFar;
    }

    // The exponentials of a tile's scores, rounded to half, and their sums.
    __device__ __forceinline__ void
    weigh(Weights& w, float (&total)[2], const float (&most)[2], const Scores& s) const {
#pragma unroll
        for (int i = 0; i < kKeys / 4; i++) {
            float two[2];
#pragma unroll
            for (int j = 0; j < 2; j++) two[j] = exp2_fast(fmaf(s[2 * i + j], scale, -most[i % 2]));
            total[i % 2] += two[0] + two[1];
            w[i / 4][i % 4] = pack(two[0], two[1]);
        }
    }

    // What a warpgroup has of the keys so far: values, sums of this lane's weights, and the maximum that exponentials
    // are over, which may be too low by kHeadroom. `shrink`: what the values are still to be multiplied by.
    struct State {
        Sums y;
        float total[2] = {}, most[2] = {kFar, kFar}, shrink[2] = {1.f, 1.f};
        bool raised = false;
    };

    // Raise the maximum of rows with scores far above it. What a query gets does not depend on the others of its warp.
    __device__ __forceinline__ void raise(State& state, const Scores& s) const {
        float high[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
            for (int i = 4; i < kKeys / 2; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            high[half] = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * scale;
        }
        bool above = high[0] - state.most[0] > kHeadroom || high[1] - state.most[1] > kHeadroom;
        state.raised = __any_sync(0xffffffffu, above);
        if (!state.raised) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = high[half] - state.most[half] > kHeadroom ? high[half] : state.most[half];
            state.shrink[half] = exp2_fast(state.most[half] - top);
            state.most[half] = top;
            state.total[half] *= state.shrink[half];
        }
    }

    // A tile whose scores are there. kMore: those of the next one are made meanwhile. Sums are changed only while no
    // product is under way: else the compiler would let each product wait for the one before.
    template <bool kMore>
    __device__ __forceinline__ void
    step(State& state, Scores& scores, Scores& next, Weights& weights, const Queries& q, int32_t turn) const {
        if constexpr (kMore) ask_scores(next, q, turn + 1), products_commit();
        if constexpr (!kMore) mask(scores, turn);
        raise(state, scores);
        products_wait<kMore>();  // the values of the tile before are added
        products_hold(weights);
        if (turn) release(values_full(turn - 1));
        weigh(weights, state.total, state.most, scores);
        products_hold(weights);
        barrier_wait(values_full(turn), parity(turn));
        products_wait<0>();  // the next scores are there
        products_done(state.y);
        if constexpr (kMore) products_done(next), release(keys_full(turn + 1));
        if (state.raised) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) state.y[i] *= state.shrink[i / 2 % 2];
        }
        uint64_t b = rows_at(values_of(turn), kBox * 2);
        products_begin();
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++) multiply_rows(state.y, weights[i], b + i * 128, i > 0 || turn > 0);
        products_commit();
    }

    __device__ __forceinline__ void attend(State& state, const Queries& q) const {
        Scores scores[2];
        Weights weights = {};
        ask_scores(scores[0], q, 0);
        products_commit();
        products_wait<0>();
        products_done(scores[0]);
        release(keys_full(0));
        int32_t turn = 0;
        for (; turn + 2 < turns; turn += 2) {
            step<true>(state, scores[0], scores[1], weights, q, turn);
            step<true>(state, scores[1], scores[0], weights, q, turn + 1);
        }
        if (turn + 1 < turns) {
            step<true>(state, scores[0], scores[1], weights, q, turn);
            step<false>(state, scores[1], scores[0], weights, q, turn + 1);
        } else {
            step<false>(state, scores[0], scores[1], weights, q, turn);
        }
        products_wait<0>();
        products_done(state.y);
#pragma unroll
        for (int half = 0; half < 2; half++)
            for (int mask = 1; mask <= 2; mask *= 2)
                state.total[half] += __shfl_xor_sync(0xffffffffu, state.total[half], mask);
    }

    __device__ __forceinline__ __half* result(int32_t token) const {
        return static_cast<__half*>(p.y) + (int64_t(batch) * p.tokens + token) * p.y_stride + head * D;
    }

    // The result of a block that had all keys.
    __device__ __forceinline__ void store(const State& state) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t token = first_query + row + 8 * half;
            if (token >= p.tokens) continue;
            float by = reciprocal_fast(state.total[half]);
#pragma unroll
            for (int i = 2 * half; i < D / 2; i += 4)
                *reinterpret_cast<uint32_t*>(result(token) + i / 4 * 8 + pair) =
                    pack(state.y[i] * by, state.y[i + 1] * by);
        }
    }

    // Sums of each row, then (maximum, sum of weights) of all rows.
    __device__ __forceinline__ float* sums_of(int32_t at) const {
        return reinterpret_cast<float*>(memory + Tiles::kBytes) + at * kPitch;
    }
    __device__ __forceinline__ float* head_of(int32_t at) const { return sums_of(work.groups * 64) + 2 * at; }

    // Where other blocks have the other keys: leave sums and maxima to them.
    __device__ __forceinline__ void lay_out(const State& state) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t at = row + 8 * half;
#pragma unroll
            for (int i = 2 * half; i < D / 2; i += 4)
                *reinterpret_cast<float2*>(sums_of(at) + i / 4 * 8 + pair) =
                    make_float2(state.y[i], state.y[i + 1]);
            if (pair == 0)
                *reinterpret_cast<float2*>(head_of(at)) = make_float2(state.most[half], state.total[half]);
        }
    }

    // And add up a part of the result, 16 bytes of it at a time.
    __device__ __forceinline__ void merge() const {
        int32_t threads = work.groups * kHopperGroup, pieces = work.groups * 64 * kWide;
        for (int32_t i = rank * threads + threadIdx.x; i < pieces; i += work.splits * threads) {
            int32_t query = i / kWide, column = i % kWide * 8, token = first_query + query;
            if (token >= p.tokens) break;
            float high = kFar, total = 0.f, sum[kWidth] = {};
            for (int32_t other = 0; other < work.splits; other++)
                high = fmaxf(high, cluster_read_2(head_of(query), other).x);
#pragma unroll 2
            for (int32_t other = 0; other < work.splits; other++) {
                float2 head = cluster_read_2(head_of(query), other);
                float by = exp2_fast(head.x - high);
                total += by * head.y;
                const float* mine = sums_of(query) + column;
                float4 low = cluster_read_4(mine, other), up = cluster_read_4(mine + 4, other);
                sum[0] += by * low.x, sum[1] += by * low.y, sum[2] += by * low.z, sum[3] += by * low.w;
                sum[4] += by * up.x, sum[5] += by * up.y, sum[6] += by * up.z, sum[7] += by * up.w;
            }
            Vector<__half> all;
            for (int j = 0; j < kWidth; j++) from_float(sum[j] * reciprocal_fast(total), all.value[j]);
            all.store(result(token) + column);
        }
    }
};

// Grid: blocks of a cluster, of 64 queries a warpgroup, heads of all of B.
template <int D, int kKeys>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_attention(const __grid_constant__ HopperWork work) {
    using Block = HopperBlock<D, kKeys>;
    Block block(work);
    int32_t thread = threadIdx.x, multiply = work.groups * kHopperGroup;
    bool copies = thread == multiply, multiplies = thread < multiply;
    if (copies) {
        expect_rows(work.k);
        expect_rows(work.v);
        block.begin_barriers();
    }
    __syncwarp();
    __syncthreads();  // the barriers are there
    wait_for_previous();
    if (multiplies) {
        registers_more<kHopperRegisters>();
        typename Block::Queries queries;
        block.load_queries(queries);
        typename Block::State state;
        block.attend(state, queries);
        let_next_begin();
        if (work.splits == 1) return block.store(state);
        block.lay_out(state);
        __syncwarp();
        cluster_arrive(), cluster_wait();  // every block's sums are there
        block.merge();
    } else {
        registers_less<kHopperFewRegisters>();
        if (copies) block.copy_all();
        if (work.splits == 1) return;
        __syncwarp();
        cluster_arrive_read(), cluster_wait();
    }
    __syncwarp();
    cluster_arrive_read(), cluster_wait();  // nobody reads this block's memory any more
}

// What `divide` wants to know of the heads.
constexpr uint32_t by_heads(uint32_t heads) { return uint32_t(((uint64_t(1) << 32) + 2 * heads - 1) / (2 * heads)); }

// Choose warpgroups and blocks of a cluster, where they are 0, so that no processor has much more to do than another:
// the time is that of the tiles that come after one another, plus that to merge.
inline void cut_hopper(HopperWork& work, int32_t groups, int32_t splits) {
    int64_t least = INT64_MAX;
    for (int32_t g = groups ? groups : kHopperMostGroups; g >= (groups ? groups : 1); g--)
        for (int32_t s = splits ? splits : 1; s <= (splits ? splits : min(kHopperMostSplits, work.tiles)); s++) {
            int64_t heads = int64_t(work.call.heads) * work.call.batch;
            int64_t blocks = ceil_div(work.call.tokens, 64 * int64_t(g)) * heads * s;
            int64_t turns = (blocks + kProcessors - 1) / kProcessors * ceil_div(work.tiles, s) * (g + 3);
            int64_t takes = 4 * turns + (s > 1 ? 40 + 40 * s : 0);
            if (takes < least) least = takes, work.groups = g, work.splits = s;
        }
}

template <int D, int kKeys, typename Launch>
bool run_hopper(const CannyAttention& call, Launch&& launch) {
    HopperWork work{{}, {}, call, 0, 0, ceil_div(call.keys, kKeys), 0, 0, by_heads(call.heads)};
    if (call.groups > min(kHopperMostSplits, work.tiles)) return false;
    cut_hopper(work, -call.warps, call.groups);
    work.share = work.tiles / work.splits, work.rest = work.tiles % work.splits;
    auto described = [&](HeadMap& map, const void* x) {
        return describe_heads(map, x, call.batch, call.keys, call.heads, D, call.kv_stride, kKeys);
    };
    if (!described(work.k, call.k) || !described(work.v, call.v)) return false;
    dim3 grid(work.splits, ceil_div(call.tokens, 64 * work.groups), call.batch * call.heads);
    int32_t threads = (work.groups + 1) * kHopperGroup, bytes = HopperBlock<D, kKeys>::shared_bytes(work);
    return launch(hopper_attention<D, kKeys>, grid, work.splits, threads, bytes, work);
}

// Do a call with `launch(kernel, grid, cluster, threads, bytes of shared memory, work)`; false where its shape has no
// kernel or that of attention/kernel.cuh is faster. `warps` -1 to -3: whether or not, with so many warpgroups a block,
// and `groups` blocks of a cluster.
template <typename Launch>
bool run_hopper_attention(const CannyAttention& call, Launch&& launch) {
    bool forced = call.warps < 0 && call.warps >= -kHopperMostGroups && call.groups >= 0;
    bool many = call.width == 40 ? call.keys >= 1024 : call.keys >= 256;
    if (call.causal || (!forced && (call.warps || call.groups || !many))) return false;
    bool sizes = call.batch > 0 && call.query_batch > 0 && call.heads > 0 && call.tokens > 0 && call.keys > 0;
    if (!sizes || int64_t(call.batch) * call.heads > kHopperMostHeads || call.tokens > kHopperMostTokens) return false;
    if (call.q_stride % 8 || call.kv_stride % 8 || call.y_stride % 8) return false;
    if (call.width == 40) return run_hopper<40, 64>(call, launch);
    return call.width == 80 && run_hopper<80, 48>(call, launch);
}

}  // namespace canny
