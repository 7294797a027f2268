// Convolutions of small maps as matrix products (B·h·w) × (taps·channels) × filters, in half precision with sums in
// float. With few positions the time is that of reading the weights, once and all at the same time:
//
// - A tile is 64 or 128 positions × 64 or 128 filters, or 192 or 256 of a 1×1 convolution. The blocks of a cluster share it: each has a slice of the
//   products' length, and adds up a part of the tile through the others' shared memory, always in the same order.
// - One warp has the weights copied, a block of shared memory's own layout at a time, from before its turn on. Three
//   copy the positions' channels, 64 of them once for all nine taps. Barriers tell who waits for whom.
// - Each warpgroup multiplies 64 positions, which it picks for each tap by address, by the weights in shared memory.
//
// A LayerNorm before it is done to the sums: with mean m and deviation d of a position, u the sum of a filter's weights w,
// it is (x·w - m·u) / d. m and d come from sums of x and x² in float. Both differences lose digits where m is many times d:
// up to 30 times nothing shows beside what half precision rounds (3e-4 of the largest result), at 100 times 2e-3 does.
// The maps of transformers have m below d.
#pragma once

#include <type_traits>

#include "plan.h"

#include "hopper.cuh"

namespace canny {

// A ring of places in shared memory that one side fills and the other empties.
struct ConvRing {
    uint32_t full, empty;  // barriers, 8 bytes for each place
    int32_t places, place = 0;
    uint32_t turn = 0;

    __device__ __forceinline__ ConvRing(uint32_t barriers, int32_t places)
        : full(barriers), empty(barriers + 8 * places), places(places) {}

    __device__ __forceinline__ void begin(uint32_t fillers, uint32_t emptiers) const {
        for (int32_t i = 0; i < places; i++) {
            barrier_begin(full + 8 * i, fillers);
            barrier_begin(empty + 8 * i, emptiers);
        }
    }

    __device__ __forceinline__ void wait_full() const { barrier_wait(full + 8 * place, turn & 1); }

    __device__ __forceinline__ void wait_empty() const {
        if (turn) barrier_wait(empty + 8 * place, (turn - 1) & 1);
    }

    __device__ __forceinline__ void next() {
        if (++place == places) place = 0, turn++;
    }
};

// 16 bytes.
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const __half* from) {
    uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

__device__ __forceinline__ void store_words(const uint32_t (&words)[4], __half* to) {
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }

// Word j of lane i of four goes to word i of lane j.
__device__ __forceinline__ void swap_words(uint32_t (&words)[4]) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
        bool high = threadIdx.x & mask;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t &low = words[mask == 1 ? 2 * i : i], &up = words[mask == 1 ? 2 * i + 1 : i + 2];
            uint32_t theirs = __shfl_xor_sync(0xffffffffu, high ? low : up, mask);
            (high ? low : up) = theirs;
        }
    }
}

// kNorm: with a LayerNorm before it.
template <int kGroups, int kWide, bool kNorm>
struct ConvBlock {
    static constexpr int kHigh = 64 * kGroups, kSums = kWide / 2, kSumsPitch = kWide + 8;  // pitch: no bank conflicts
    static constexpr int kUnit = kWide * kConvDeep;                                        // weights of a unit
    static constexpr int kVectors = kWide / 8;                                             // pieces of a row
    static constexpr int kConsumers = kGroups * kConvWarpgroup, kLoaders = conv_loaders(kGroups, kWide);
    static constexpr bool kUneven = kGroups == 2 && kWide == 256;  // its sums need more registers than each thread can have
    static constexpr bool kGates = conv_gates(kGroups, kWide);
    static constexpr bool kDirect = kWide > kConvNarrow;  // without a cluster the sums are stored from registers

    const ConvParams& p;
    char* memory;
    __half *weights, *positions, *zeros;
    uint32_t barriers;
    int32_t first_row, first_filter, rank, first, last;  // units from first to before last are this block's
    ConvRange range;

    __device__ __forceinline__ explicit ConvBlock(const ConvParams& params) : p(params) {
        memory = shared_memory() + (0u - shared_address(shared_memory())) % kConvAlign;
        weights = reinterpret_cast<__half*>(memory);
        positions = weights + p.places * kUnit;
        zeros = positions + p.x_places * p.x_rows * kConvPitch;
        barriers = shared_address(zeros + kConvZeros * kConvPitch);
        rank = blockIdx.x;
        first_filter = blockIdx.y * kWide;
        first_row = blockIdx.z * kHigh;
        first = rank * p.share + min(rank, p.rest);
        last = first + p.share + (rank < p.rest);
        range = conv_range(p, first_row, kHigh);
    }

    // Which 64 channels a unit is of.
    __device__ __forceinline__ int32_t part_of(int32_t unit) const { return p.taps == 9 ? unit / 9 : unit; }

    __device__ __forceinline__ ConvRing weights_ring() const { return {barriers, p.places}; }
    __device__ __forceinline__ ConvRing positions_ring() const { return {barriers + 16 * p.places, p.x_places}; }

    __device__ __forceinline__ void begin_barriers() const {
        weights_ring().begin(1, kConsumers / 32);
        positions_ring().begin(kLoaders, kConsumers / 32);
        barriers_begun();
    }

    __device__ __forceinline__ void clear_zeros() const {
        for (int32_t i = threadIdx.x; i < kConvZeros * kConvPitch / 2; i += kConsumers)
            reinterpret_cast<uint32_t*>(zeros)[i] = 0;
    }

    // One thread: have the weights of units copied, from `unit` to before `end`.
    __device__ __forceinline__ void copy_weights(ConvRing& ring, int32_t unit, int32_t end) const {
        const __half* from = static_cast<const __half*>(p.call.weight) +
                             (int64_t(first_filter / 64) * p.units + unit) * kConvBlock;
        for (; unit < end; unit++, from += kConvBlock) {
            ring.wait_empty();
            uint32_t barrier = ring.full + 8 * ring.place;
            barrier_expect(barrier, kUnit * sizeof(__half));
#pragma unroll
            for (int32_t i = 0; i < kWide / 64; i++)
                copy_block(
                    shared_address(weights + ring.place * kUnit + i * kConvBlock),
                    from + int64_t(i) * p.units * kConvBlock, kConvBlock * sizeof(__half), barrier
                );
            ring.next();
        }
    }

    // The loaders, of which this is number `me`: copy 64 channels of all positions at a time.
    __device__ __forceinline__ void copy_positions(int32_t me) const {
        ConvRing ring = positions_ring();
        constexpr int32_t kStep = kLoaders / 8;
        int32_t column = me % 8 * 8, rows = range.last - range.first;
        const __half* x = static_cast<const __half*>(p.call.x) + int64_t(range.first) * p.call.channels + column;
        for (int32_t part = part_of(first), end = part_of(last - 1); part <= end; part++) {
            ring.wait_empty();
            __half* to = positions + ring.place * p.x_rows * kConvPitch + column;
            const __half* from = x + part * kConvDeep;
#pragma unroll 4
            for (int32_t row = me / 8; row < rows; row += kStep)
                copy_16(to + row * kConvPitch, from + int64_t(row) * p.call.channels, true);
            barrier_arrive_after_copies(ring.full + 8 * ring.place);
            ring.next();
        }
    }

    // The row of y whose x this lane names to its warp: where the middle tap lies in a place, which taps there are, a bit
    // each, and from which channel on.
    struct Row {
        int32_t at, channel;
        uint32_t exist;
    };

    __device__ __forceinline__ Row row() const {
        int32_t lane = threadIdx.x % 32, row = first_row + threadIdx.x / 32 * 16 + lane % 16, stride = p.call.stride;
        ConvPosition to = conv_position(p, row);
        uint32_t line = 2 | (to.x > 0) | uint32_t(to.x * stride + 1 < p.call.width) << 2, taps = line << 3;
        if (to.y > 0) taps |= line;
        if (to.y * stride + 1 < p.call.height) taps |= line << 6;
        if (p.taps == 1) taps = 1;
        return {to.at - range.first, lane / 16 * 8, row < p.rows ? taps : 0};
    }

    // Sums of x and x² of a thread's part of its two rows, lane / 4 and that plus 8 of its warp's.
    struct Moments {
        float x[2] = {}, squares[2] = {};

        __device__ __forceinline__ void add(const uint32_t (&a)[4][4]) {
#pragma unroll
            for (int i = 0; i < (kNorm ? 32 : 0); i++) {
                float value = to_float(reinterpret_cast<const __half*>(&a[i / 8][i / 2 % 4])[i % 2]);
                x[i / 2 % 2] += value, squares[i / 2 % 2] += value * value;
            }
        }

        // With those of the three other lanes that have the same rows.
        __device__ __forceinline__ void join() {
#pragma unroll
            for (int i = 0; i < (kNorm ? 4 : 0); i++) {
                float& sum = i < 2 ? x[i] : squares[i - 2];
                for (int mask = 1; mask <= 2; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            }
        }
    };

    // The warpgroups: multiply. A thread's sums are of the rows and filters of wgmma's fragments.
    __device__ __forceinline__ void multiply(float (&sums)[kSums], Moments& moments, const Row& row) const {
        int32_t lane = threadIdx.x % 32;
        ConvRing ring = weights_ring(), x_ring = positions_ring();
        int32_t tap = first - part_of(first) * p.taps, before = 0;
        uint32_t a[2][4][4];
        x_ring.wait_full();
        pick(a[0], row, x_ring.place, tap);
        moments.add(a[0]);
        auto step = [&](const uint32_t(&mine)[4][4], uint32_t(&after)[4][4], int32_t unit) {
            ring.wait_full();
            uint64_t b = matrix_at(shared_address(weights + ring.place * kUnit));
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_group(sums, mine[k], b + 2 * k);
            products_commit();
            products_wait<1>();  // the unit before is multiplied: its weights and registers are free
            if (lane == 0 && unit > first) barrier_arrive(ring.empty + 8 * before);
            before = ring.place;
            ring.next();
            if (++tap == p.taps) {
                if (lane == 0) barrier_arrive(x_ring.empty + 8 * x_ring.place);
                tap = 0, x_ring.next();
            }
            if (unit + 1 < last) {
                if (tap == 0) x_ring.wait_full();
                pick(after, row, x_ring.place, tap);
                moments.add(after);  // while the products run
            }
        };
        for (int32_t unit = first; unit < last; unit += 2) {
            step(a[0], a[1], unit);
            if (unit + 1 < last) step(a[1], a[0], unit + 1);
        }
        products_wait<0>();
        products_done(sums);
        moments.join();
    }

    // This warp's 16 positions × 64 channels of a tap.
    __device__ __forceinline__ void pick(uint32_t (&a)[4][4], const Row& row, int32_t place, int32_t tap) const {
        int32_t line = p.taps == 9 ? tap / 3 : 1, column = p.taps == 9 ? tap - 3 * line : 1;
        int32_t at = row.at + (line - 1) * p.call.width + column - 1;
        const __half* from = positions + (place * p.x_rows + at) * kConvPitch;
        if (!(row.exist >> tap & 1)) from = zeros + (at & (kConvZeros - 1)) * kConvPitch;
#pragma unroll
        for (int k = 0; k < 4; k++) load_matrices(a[k], from + row.channel + 16 * k);
    }

    // The moments go to where a row has no sums.
    __device__ __forceinline__ void lay_out(const float (&sums)[kSums], const Moments& moments) const {
        int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
        float* to = reinterpret_cast<float*>(memory) + row * kSumsPitch + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kSums; i += 2)
            *reinterpret_cast<float2*>(to + i / 2 % 2 * 8 * kSumsPitch + i / 4 * 8) = make_float2(sums[i], sums[i + 1]);
#pragma unroll
        for (int i = 0; i < (kNorm ? 2 : 0); i++) {
            to = reinterpret_cast<float*>(memory) + (row + 8 * i) * kSumsPitch + kWide;
            if (lane % 4 == 0) *reinterpret_cast<float2*>(to) = make_float2(moments.x[i], moments.squares[i]);
        }
    }

    // A LayerNorm of a row: by · (x·w - mean · the sum of w) is what its product by w should be.
    struct Norm {
        float mean = 0.f, by = 1.f;
    };

    __device__ __forceinline__ Norm norm_of(float x, float squares) const {
        float mean = x / p.call.channels, square = squares / p.call.channels;
        return {mean, rsqrtf(fmaxf(square - mean * mean, 0.f) + p.call.epsilon)};
    }

    // Which line of the residual a row has added.
    __device__ __forceinline__ int32_t residual_row(int32_t row) const {
        return row - conv_divide(row, p.by_residual) * p.call.residual_batch * p.out_height * p.out_width;
    }

    // Two sums of a thread, of those in `sums` from `at` on, with LayerNorm and bias; their filter is the first of both.
    __device__ __forceinline__ float2 made(const float (&sums)[kSums], int at, const Norm& norm, int32_t filter) const {
        float2 bias = *reinterpret_cast<const float2*>(p.call.bias + filter), y = make_float2(sums[at], sums[at + 1]);
        if constexpr (kNorm) {
            float2 of_filters = *reinterpret_cast<const float2*>(p.call.weight_sums + filter);
            y.x = norm.by * (y.x - norm.mean * of_filters.x), y.y = norm.by * (y.y - norm.mean * of_filters.y);
        }
        return make_float2(y.x + bias.x, y.y + bias.y);
    }

    // Store the sums from the registers that they are in, kGate: as a · GELU(b). A lane has two of every eight filters, and
    // four lanes swap theirs, so that each has eight side by side, and all of them 64 bytes.
    template <int kGate>
    __device__ __forceinline__ void store_own(const float (&sums)[kSums], const Moments& moments) const {
        const CannyConv& c = p.call;
        int32_t lane = threadIdx.x % 32, first = first_row + threadIdx.x / 32 * 16 + lane / 4;
        Norm norms[2];
        if constexpr (kNorm)
            for (int i = 0; i < 2; i++) norms[i] = norm_of(moments.x[i], moments.squares[i]);
#pragma unroll
        for (int i = 0; i < kSums / 8 >> kGate; i++) {
            int32_t row = first + i % 2 * 8, column = (first_filter >> kGate) + i / 2 * 32 + lane % 4 * 8;
            uint32_t words[4] = {};
            if (!kGate && c.residual) {
                int64_t from = int64_t(residual_row(row)) * c.filters + column;
                if (row < p.rows) load_words(words, static_cast<const __half*>(c.residual) + from);
                swap_words(words);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int eight = (i / 2 * 4 + k) << kGate, at = eight * 4 + i % 2 * 2;
                int32_t filter = first_filter + eight * 8 + lane % 4 * 2;
                const __half* more = reinterpret_cast<const __half*>(&words[k]);
                float2 y = made(sums, at, norms[i % 2], filter);
                if constexpr (kGate) {
                    float2 b = made(sums, at + 4, norms[i % 2], filter + 8);
                    words[k] = pack(y.x * gelu(b.x), y.y * gelu(b.y));
                } else {
                    words[k] = pack(y.x + to_float(more[0]), y.y + to_float(more[1]));
                }
            }
            swap_words(words);
            if (row < p.rows) store_words(words, static_cast<__half*>(c.y) + int64_t(row) * (c.filters >> kGate) + column);
        }
    }

    // Eight filters of a row, which a thread stores: this is number `at` of the tile, with its bias and residual, which
    // are asked for before the sums are there.
    struct Piece {
        int32_t at;
        Vector<float> bias, weight_sums;
        Vector<__half> residual;
    };

    __device__ __forceinline__ void ask(Piece& piece, int32_t at) const {
        const CannyConv& c = p.call;
        int32_t row = first_row + at / kVectors, filter = first_filter + at % kVectors * 8;
        piece.at = at;
        if (at >= kHigh * kVectors || row >= p.rows) return;
        piece.bias.load(c.bias + filter);
        if constexpr (kNorm) piece.weight_sums.load(c.weight_sums + filter);
        if (!c.residual) return;
        piece.residual.load(static_cast<const __half*>(c.residual) + int64_t(residual_row(row)) * c.filters + filter);
    }

    __device__ __forceinline__ Piece first_piece() const {
        Piece piece;
        ask(piece, (rank * blockDim.x + threadIdx.x) << p.call.gate);
        return piece;
    }

    // Add up this block's share of the tile over the cluster, with bias, residual and gate, and store it.
    __device__ __forceinline__ void store(Piece& next) const {
        int32_t count = (p.rows - first_row < kHigh ? p.rows - first_row : kHigh) * kVectors;
        int32_t gate = kGates ? p.call.gate : 0, step = p.cluster * blockDim.x << gate;
        while (next.at < count) {
            Piece piece = next;
            if constexpr (!kNorm) ask(next, piece.at + step);
            int32_t row = piece.at / kVectors, column = piece.at % kVectors * 8;
            float(&y)[8] = piece.bias.value;
            total(piece);
            if (gate) {
                Piece b;
                ask(b, piece.at + 1);
                total(b);
#pragma unroll
                for (int k = 0; k < 8; k++) y[k] *= gelu(b.bias.value[k]);
            }
            Vector<__half>& v = piece.residual;
            if (p.call.residual)
#pragma unroll
                for (int k = 0; k < 8; k++) y[k] += to_float(v.value[k]);
#pragma unroll
            for (int k = 0; k < 8; k++) from_float(y[k], v.value[k]);
            int64_t to = int64_t(first_row + row) * (p.call.filters >> gate) + ((first_filter + column) >> gate);
            v.store(static_cast<__half*>(p.call.y) + to);
            if constexpr (kNorm) ask(next, piece.at + step);  // no registers for two
        }
    }

    // Put what a piece's sums are, with LayerNorm and bias, where its bias is.
    __device__ __forceinline__ void total(Piece& piece) const {
        const float* row = reinterpret_cast<const float*>(memory) + piece.at / kVectors * kSumsPitch;
        float zeros[8] = {}, moments[2] = {};
        float(&y)[8] = kNorm ? zeros : piece.bias.value;
        add_up(y, moments, row, piece.at % kVectors * 8);
        if constexpr (!kNorm) return;
        Norm norm = norm_of(moments[0], moments[1]);
#pragma unroll
        for (int k = 0; k < 8; k++)
            piece.bias.value[k] += norm.by * (y[k] - norm.mean * piece.weight_sums.value[k]);
    }

    // Add up eight sums of a row from a column on, and its moments: four blocks at a time, of which everything is asked
    // for before anything is added, since the way to their memory is long. Each block begins with its own, so that no
    // memory is asked by all of them at once.
    __device__ __forceinline__ void
    add_up(float (&y)[8], float (&moments)[2], const float* row, int32_t column) const {
#pragma unroll
        for (int from = 0; from < kConvMostCluster; from += 4) {
            float4 parts[4][2];
            float2 more[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t other = rank + from + i < p.cluster ? rank + from + i : rank + from + i - p.cluster;
                if (from + i < p.cluster)
                    for (int k = 0; k < 2; k++) parts[i][k] = cluster_read_4(row + column + 4 * k, other);
                if (kNorm && from + i < p.cluster) more[i] = cluster_read_2(row + kWide, other);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (from + i < p.cluster) {
                    for (int k = 0; k < 2; k++) {
                        const float4& part = parts[i][k];
                        y[4 * k] += part.x, y[4 * k + 1] += part.y, y[4 * k + 2] += part.z, y[4 * k + 3] += part.w;
                    }
                    if constexpr (kNorm) moments[0] += more[i].x, moments[1] += more[i].y;
                }
        }
    }
};

// Grid: blocks of a cluster, tiles of filters, tiles of rows.
template <int kGroups, int kWide, bool kNorm>
__global__ void __launch_bounds__(conv_threads(kGroups, kWide), conv_together(kGroups, kWide))
    conv(const ConvParams p) {
    using Block = ConvBlock<kGroups, kWide, kNorm>;
    Block block(p);
    int32_t helper = int32_t(threadIdx.x) - Block::kConsumers, ahead = min(block.last, block.first + p.places);
    ConvRing ring = block.weights_ring();
    if (helper == Block::kLoaders) {
        block.begin_barriers();
        block.copy_weights(ring, block.first, ahead);  // which no kernel before this one has written
    }
    typename Block::Row row{};
    if (helper < 0) block.clear_zeros(), row = block.row();
    __syncwarp();
    __syncthreads();  // barriers and zeros are there
    wait_for_previous();
    if (helper < 0) {
        if constexpr (Block::kUneven) registers_more<kConvMoreRegisters>();
        float sums[Block::kSums] = {};
        typename Block::Moments moments;
        block.multiply(sums, moments, row);
        let_next_begin();  // not before: its blocks would take places from those of another stream
        if (Block::kDirect && p.cluster == 1) {
            if (p.call.gate) return block.template store_own<1>(sums, moments);
            return block.template store_own<0>(sums, moments);
        }
        group_sync<1>(0, Block::kConsumers);  // nobody reads weights or positions any more
        block.lay_out(sums, moments);
    } else {
        if constexpr (Block::kUneven) registers_less<kConvFewRegisters>();
        if (helper < Block::kLoaders) block.copy_positions(helper);
        if (helper == Block::kLoaders) block.copy_weights(ring, ahead, block.last);
    }
    if (Block::kDirect && p.cluster == 1) return;
    __syncwarp();
    if constexpr (Block::kUneven) helper < 0 ? registers_less<kConvRegisters>() : registers_more<kConvRegisters>();
    typename Block::Piece piece = block.first_piece();
    __syncthreads();  // the sums are there
    if (p.cluster > 1) cluster_arrive(), cluster_wait();
    block.store(piece);
    if (p.cluster > 1) cluster_arrive_read(), cluster_wait();  // nobody reads this block's memory any more
}

// Do a call with `launch(kernel, grid, cluster, threads, bytes of shared memory, params)`; false where its shape has no
// kernel.
template <typename Launch>
bool run_conv(const CannyConv& call, Launch&& launch) {
    ConvPlan plan = conv_plan(call);
    if (!plan.groups) return false;
    const ConvParams& p = plan.params;
    int32_t high = 64 * plan.groups, threads = conv_threads(plan.groups, plan.wide);
    dim3 grid(p.cluster, call.filters / plan.wide, (p.rows + high - 1) / high);
    auto go = [&](auto kernel) { return launch(kernel, grid, p.cluster, threads, plan.bytes, p); };
    auto cut = [&](auto groups, auto norm) {
        constexpr int kGroups = decltype(groups)::value;
        constexpr bool kNorm = decltype(norm)::value;
        if (plan.wide == 64) return go(conv<kGroups, 64, kNorm>);
        if (plan.wide == 128) return go(conv<kGroups, 128, kNorm>);
        return plan.wide == 192 ? go(conv<kGroups, 192, kNorm>) : go(conv<kGroups, 256, kNorm>);
    };
    std::integral_constant<int, 1> one;
    std::integral_constant<int, 2> two;
    if (call.weight_sums) return plan.groups == 1 ? cut(one, std::true_type{}) : cut(two, std::true_type{});
    return plan.groups == 1 ? cut(one, std::false_type{}) : cut(two, std::false_type{});
}

}  // namespace canny
