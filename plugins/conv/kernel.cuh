// Convolutions of small maps as matrix products (B·h·w) × filters × (taps·channels), in half precision with sums in
// float. With few positions there are few tiles, and the time is that of reading the weights: the blocks of a cluster
// share a tile, each has a slice of the products' length, and they add up through each other's shared memory, always in
// the same order.
#pragma once

#include "call.h"

#include "../attention/mma.cuh"

namespace canny {

constexpr int kConvThreads = 256, kConvStages = 4;
constexpr int kConvWide = 64;   // filters of a tile
constexpr int kConvDeep = 64;   // channels of a stage
constexpr int kConvPitch = 72;  // of a row in shared memory: no bank conflicts in load_matrices, or of the float sums
constexpr int kEnoughBlocks = 132;  // the processors of an H200

struct ConvParams {
    CannyConv call;
    int32_t out_height, out_width, rows;  // rows: B·h·w of y
    int32_t per_tap, stages;              // stages of one tap, and of all
    int32_t cluster;
};

constexpr int32_t conv_bytes(int32_t rows) {
    return kConvStages * (rows + kConvWide) * kConvPitch * int32_t(sizeof(__half));
}

// Two groups of four warps multiply half the depth of every stage each, which makes their chains of instructions short.
// kRows: rows of a tile by 16; kRowWarps: how many of the four warps part the rows, the others part the filters.
template <int kRows, int kRowWarps>
struct ConvBlock {
    static constexpr int kHigh = 16 * kRows, kMine = kRows / kRowWarps, kColumns = 2 * kRowWarps;
    static constexpr int kStage = (kHigh + kConvWide) * kConvPitch;  // halves
    static constexpr int kCopied = kConvThreads / 8, kCopies = (kHigh + kCopied - 1) / kCopied;

    const ConvParams& p;
    __half* memory;
    int32_t lane, warp, group, first_row, first_filter, rank, mine;
    // This thread copies 8 channels of every kCopied-th row from `mine` on: where their positions lie in x, and which
    // taps of them exist.
    int32_t at[kCopies];
    uint32_t taps[kCopies];
    __half* to;
    const __half *x, *weight;
    int32_t tap, channel, shift;  // of the next stage; shift: of this tap in x

    __device__ __forceinline__ explicit ConvBlock(const ConvParams& params) : p(params) {
        const CannyConv& c = p.call;
        memory = reinterpret_cast<__half*>(shared_memory());
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32 % 4;
        group = threadIdx.x / 128;
        mine = threadIdx.x / 8;
        rank = blockIdx.x % p.cluster;
        first_filter = blockIdx.x / p.cluster * kConvWide;
        first_row = blockIdx.y * kHigh;
        int32_t column = threadIdx.x % 8 * 8, border = c.size / 2;
        to = memory + mine * kConvPitch + column;
        x = static_cast<const __half*>(c.x) + column;
        weight = static_cast<const __half*>(c.weight) + int64_t(first_filter + mine) * p.stages * kConvDeep + column;
        for (int i = 0; i < kCopies; i++) {
            int32_t row = first_row + mine + kCopied * i, line = row / p.out_width, b = line / p.out_height;
            int32_t top = (line - b * p.out_height) * c.stride, left = (row - line * p.out_width) * c.stride;
            at[i] = ((b * c.height + top) * c.width + left) * c.channels;
            taps[i] = 0;
            for (int32_t k = 0; k < c.size * c.size && row < p.rows; k++) {
                int32_t down = top + k / c.size - border, right = left + k % c.size - border;
                taps[i] |= uint32_t(down >= 0 && down < c.height && right >= 0 && right < c.width) << k;
            }
        }
    }

    // The next stage is number `stage`.
    __device__ __forceinline__ void seek(int32_t stage) {
        tap = stage / p.per_tap;
        channel = (stage - tap * p.per_tap) * kConvDeep;
        weight += int64_t(stage) * kConvDeep;
        to_tap();
    }

    __device__ __forceinline__ void to_tap() {
        int32_t size = p.call.size, line = size == 3 ? tap / 3 : 0, border = size / 2;
        shift = ((line - border) * p.call.width + tap - line * size - border) * p.call.channels;
    }

    // Begin to copy what the next stage multiplies to its place.
    __device__ __forceinline__ void begin(int32_t place) {
        __half* there = to + place * kStage;
#pragma unroll
        for (int i = 0; i < kCopies; i++) {
            if (kHigh % kCopied && mine + kCopied * i >= kHigh) continue;
            bool exists = taps[i] >> tap & 1;
            copy_16(there + kCopied * i * kConvPitch, x + (exists ? at[i] + shift + channel : 0), exists);
        }
        there += kHigh * kConvPitch;
#pragma unroll
        for (int i = 0; i < kConvWide / kCopied; i++)
            copy_16(there + kCopied * i * kConvPitch, weight + int64_t(kCopied * i) * p.stages * kConvDeep, true);
        weight += kConvDeep;
        channel += kConvDeep;
        if (channel == p.call.channels) {
            channel = 0;
            tap++;
            to_tap();
        }
    }

    __device__ __forceinline__ void multiply_stage(float (&sums)[kMine][kColumns][4], int32_t place) const {
        const __half* rows = memory + place * kStage + warp % kRowWarps * kMine * 16 * kConvPitch;
        const __half* filters =
            memory + place * kStage + (kHigh + warp / kRowWarps * kColumns * 8) * kConvPitch;
#pragma unroll
        for (int half = 0; half < kConvDeep / 2; half += 16) {
            int32_t step = group * (kConvDeep / 2) + half;
            uint32_t a[kMine][4], b[kColumns / 2][4];
#pragma unroll
            for (int m = 0; m < kMine; m++)
                load_matrices(a[m], rows + (m * 16 + lane % 16) * kConvPitch + step + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < kColumns / 2; n++)
                load_matrices(
                    b[n], filters + (n * 16 + lane / 16 * 8 + lane % 8) * kConvPitch + step + lane / 8 % 2 * 8
                );
#pragma unroll
            for (int m = 0; m < kMine; m++)
#pragma unroll
                for (int n = 0; n < kColumns; n++) multiply(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }

    // This block's part of the sums, where the cluster finds it: those of the second group, then both.
    __device__ __forceinline__ void lay_out(const float (&sums)[kMine][kColumns][4], bool both) const {
        float* all = reinterpret_cast<float*>(memory);
        int32_t row = warp % kRowWarps * kMine * 16 + lane / 4;
        int32_t column = warp / kRowWarps * kColumns * 8 + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < kMine; m++)
#pragma unroll
            for (int n = 0; n < kColumns; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& to = all[(row + m * 16 + i / 2 * 8) * kConvPitch + column + n * 8 + i % 2];
                    to = both ? to + sums[m][n][i] : sums[m][n][i];
                }
    }

    // Add up this block's share of the tile over the cluster, with bias and residual, and store it: two filters a time.
    __device__ __forceinline__ void store() const {
        const CannyConv& c = p.call;
        const float* all = reinterpret_cast<const float*>(memory);
        constexpr int32_t kPairs = kHigh * kConvWide / 2;
        int32_t residual_rows = c.residual_batch * p.out_height * p.out_width, share = kPairs / p.cluster;
        for (int32_t i = rank * share + threadIdx.x; i < (rank + 1) * share; i += kConvThreads) {
            int32_t at = i / (kConvWide / 2), column = i % (kConvWide / 2) * 2, row = first_row + at;
            if (row >= p.rows) break;
            const float* mine = all + at * kConvPitch + column;
            int32_t filter = first_filter + column;
            float low = c.bias[filter], high = c.bias[filter + 1];
            if (p.cluster == 1) {
                low += mine[0], high += mine[1];
            } else {
                for (int32_t other = 0; other < p.cluster; other++) {
                    low += cluster_read(mine, other);
                    high += cluster_read(mine + 1, other);
                }
            }
            if (c.residual) {
                const __half* from = static_cast<const __half*>(c.residual) +
                                     int64_t(row % residual_rows) * c.filters + filter;
                low += to_float(from[0]), high += to_float(from[1]);
            }
            *reinterpret_cast<uint32_t*>(static_cast<__half*>(c.y) + int64_t(row) * c.filters + filter) =
                pack(low, high);
        }
    }
};

// Grid: blocks of a cluster times tiles of filters, tiles of rows.
template <int kRows, int kRowWarps>
__global__ void __launch_bounds__(kConvThreads) conv(const ConvParams p) {
    using Block = ConvBlock<kRows, kRowWarps>;
    Block block(p);
    int32_t first = p.stages * block.rank / p.cluster, last = p.stages * (block.rank + 1) / p.cluster;
    block.seek(first);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < kConvStages - 1; i++) {
        if (first + i < last) block.begin(i);
        copies_commit();
    }
    float sums[Block::kMine][Block::kColumns][4] = {};
    for (int32_t stage = first; stage < last; stage++) {
        copies_wait<kConvStages - 2>();
        __syncthreads();  // this stage is there, and every warp is done with the one whose place is filled next
        int32_t next = stage + kConvStages - 1;
        if (next < last) block.begin((next - first) % kConvStages);
        copies_commit();
        block.multiply_stage(sums, (stage - first) % kConvStages);
    }
    copies_wait<0>();
    __syncthreads();  // the sums take the place of the stages
    if (block.group) block.lay_out(sums, false);
    __syncthreads();  // the second group's are there
    if (!block.group) block.lay_out(sums, true);
    __syncthreads();
    if (p.cluster > 1) cluster_arrive(), cluster_wait();
    block.store();
    if (p.cluster > 1) cluster_arrive(), cluster_wait();  // nobody reads this block's memory any more
}

// How many blocks share a tile: the whole cluster where there are few tiles, fewer where blocks would wait their turn.
inline int32_t conv_cluster(int32_t tiles, int32_t stages, int32_t most) {
    int32_t best = 1, least = INT32_MAX;
    for (int32_t cluster : {1, 2, 4, 6, 8}) {
        if (cluster > most || (cluster > 1 && 2 * cluster > stages)) break;
        int32_t turns = (tiles * cluster + kEnoughBlocks - 1) / kEnoughBlocks;
        int32_t length = (stages + cluster - 1) / cluster * turns + cluster;
        if (length < least) best = cluster, least = length;
    }
    return best;
}

// Do a call with `launch(kernel, grid, cluster, bytes of shared memory, params)`; false where its shape has no kernel.
template <typename Launch>
bool run_conv(const CannyConv& call, Launch&& launch) {
    bool sizes = call.batch > 0 && call.height > 0 && call.width > 0 && call.channels > 0 && call.filters > 0;
    if (!sizes || call.channels % kConvDeep || call.filters % kConvWide) return false;
    if ((call.size != 1 && call.size != 3) || (call.stride != 1 && call.stride != 2)) return false;
    if (call.residual && call.residual_batch < 1) return false;
    ConvParams p{call};
    p.out_height = (call.height + call.stride - 1) / call.stride;
    p.out_width = (call.width + call.stride - 1) / call.stride;
    p.rows = call.batch * p.out_height * p.out_width;
    p.per_tap = call.channels / kConvDeep;
    p.stages = call.size * call.size * p.per_tap;
    bool small = p.rows <= 48;
    int32_t high = small ? 48 : 96, tiles_down = (p.rows + high - 1) / high, tiles = call.filters / kConvWide;
    p.cluster = conv_cluster(tiles * tiles_down, p.stages, call.max_cluster);
    dim3 grid(tiles * p.cluster, tiles_down);
    return small ? launch(conv<3, 1>, grid, p.cluster, conv_bytes(high), p)
                 : launch(conv<6, 2>, grid, p.cluster, conv_bytes(high), p);
}

}  // namespace canny
