// Convolutions of small maps as matrix products (B·h·w) × (taps·channels) × filters, in half precision with sums in
// float. With few positions the time is that of reading the weights, once and all at the same time:
//
// - A tile is 64 or 128 positions × 64 or 128 filters, or 192 or 256 of a 1×1 convolution. The blocks of a cluster share
//   it: each has a slice of the products' length, is given what the others have of a part of the tile, and adds that up,
//   always in the same order.
// - One thread has the weights copied, a block of shared memory's own layout at a time, from before its turn on. Another
//   has the positions' channels copied, 64 of them once for all nine taps. Barriers tell who waits for whom.
// - Each warpgroup multiplies 64 positions, which it picks for each tap by address, by the weights in shared memory.
// - A second map comes behind x, 64 channels of the tile's own positions at a time, which lie where x has its middle tap.
//
// A LayerNorm before it is done to the sums: with mean m and deviation d of a position, u the sum of a filter's weights w,
// it is (x·w - m·u) / d. m and d come from sums of x and x² in float. Both differences lose digits where m is many times d:
// up to 30 times nothing shows beside what half precision rounds (3e-4 of the largest result), at 100 times 2e-3 does.
// The maps of transformers have m below d.
#pragma once

#include <type_traits>

#include "tile.cuh"

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
    __device__ __forceinline__ bool is_full() const { return barrier_ended(full + 8 * place, turn & 1); }

    __device__ __forceinline__ void wait_empty() const {
        if (turn) barrier_wait(empty + 8 * place, (turn - 1) & 1);
    }

    __device__ __forceinline__ void next() {
        if (++place == places) place = 0, turn++;
    }
};

// What a kernel is given.
struct ConvWork {
    ConvMap x, second;
    ConvParams params;
};

// kTaps: 1 or 9.
template <int kGroups, int kWide, bool kNorm, int kTaps, int kGate>
struct ConvBlock : ConvTile<kGroups, kWide, kNorm, kGate> {
    using Tile = ConvTile<kGroups, kWide, kNorm, kGate>;
    using typename Tile::Moments;
    using Tile::kHigh, Tile::kSums, Tile::kConsumers, Tile::p, Tile::memory, Tile::first_row, Tile::first_filter,
        Tile::rank, Tile::warp, Tile::lane;

    static constexpr int kUnit = kWide * kConvDeep;  // weights of a unit
    static constexpr bool kUneven = conv_uneven(kGroups, kWide);

    const ConvWork& work;
    __half *weights, *positions;  // zeros lie behind the positions
    uint32_t barriers;
    int32_t first, last;  // units from first to before last are this block's
    ConvRange range;

    __device__ __forceinline__ explicit ConvBlock(const ConvWork& work) : Tile(work.params), work(work) {
        weights = reinterpret_cast<__half*>(memory);
        positions = weights + p.places * kUnit;
        __half* behind = positions + (p.x_places * p.x_rows + kConvEight) * kConvPitch;
        barriers = shared_address(behind);
        Tile::constants = reinterpret_cast<float*>(behind) + 4 * (p.places + p.x_places);
        // What others write needs a place of its own; a block's own sums come when nobody reads weights any more.
        Tile::parts = p.cluster > 1 ? Tile::constants + kWide * (1 + kNorm) : reinterpret_cast<float*>(memory);
        first = rank * p.share + min(rank, p.rest);
        last = first + p.share + (rank < p.rest);
        range = conv_range(p, first_row, kHigh);
    }

    // Which 64 channels a unit is of: first those of x, then those of the second map, which have a unit each.
    __device__ __forceinline__ int32_t part_of(int32_t unit) const {
        int32_t of_x = min(unit, p.x_units);
        return of_x / kTaps + unit - of_x;
    }

    __device__ __forceinline__ ConvRing weights_ring() const { return {barriers, p.places}; }
    __device__ __forceinline__ ConvRing positions_ring() const { return {barriers + 16 * p.places, p.x_places}; }

    __device__ __forceinline__ void begin_barriers() const {
        weights_ring().begin(1, kConsumers / 32);
        positions_ring().begin(1, kConsumers / 32);
        barriers_begun();
    }

    __device__ __forceinline__ void clear_zeros() const {
        uint32_t* zeros = reinterpret_cast<uint32_t*>(positions + p.x_places * p.x_rows * kConvPitch);
        for (int32_t i = threadIdx.x; i < kConvEight * kConvPitch / 2; i += kConsumers) zeros[i] = 0;
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

    // One thread: have 64 channels of all positions copied at a time. Those of the second map go to where x has the same
    // positions, from the next multiple of eight before them on.
    __device__ __forceinline__ void copy_positions() const {
        ConvRing ring = positions_ring();
        int32_t parts = p.call.channels / kConvDeep, ahead = first_row - range.first;  // parts: of x
        for (int32_t part = part_of(first), end = part_of(last - 1); part <= end; part++) {
            ring.wait_empty();
            uint32_t barrier = ring.full + 8 * ring.place;
            const __half* to = positions + ring.place * p.x_rows * kConvPitch;
            bool of_x = part < parts;
            barrier_expect(barrier, (of_x ? p.x_boxes * p.x_box : p.second_box) * kConvPitch * sizeof(__half));
            if (of_x)
                for (int32_t row = 0; row < p.x_boxes * p.x_box; row += p.x_box)
                    copy_rows(
                        shared_address(to + row * kConvPitch), work.x, range.first + row, part * kConvDeep, barrier
                    );
            else
                copy_rows(
                    shared_address(to + ahead / kConvEight * kConvEight * kConvPitch), work.second,
                    first_row - ahead % kConvEight, (part - parts) * kConvDeep, barrier
                );
            ring.next();
        }
    }

    // The row of y whose x this lane names to its warp: where the middle tap lies in a place, which taps there are, a bit
    // each, and from which eighth of the channels on.
    struct Row {
        int32_t at, eighth;
        uint32_t exist;
    };

    __device__ __forceinline__ Row row() const {
        int32_t row = first_row + warp * 16 + lane % 16, stride = p.call.stride;
        ConvPosition to = conv_position(p, row);
        uint32_t line = 2 | (to.x > 0) | uint32_t(to.x * stride + 1 < p.call.width) << 2, taps = line << 3;
        if (to.y > 0) taps |= line;
        if (to.y * stride + 1 < p.call.height) taps |= line << 6;
        if (kTaps == 1) taps = 1;
        return {to.at - range.first, lane / 16, row < p.rows ? taps : 0};
    }

    // Where this lane's row of x lies for a tap: of the first 16 channels; those of the 16 after them lie at that xor 32.
    __device__ __forceinline__ uint32_t aim(const Row& row, int32_t place, int32_t tap) const {
        int32_t line = kTaps == 9 ? tap / 3 : 1, column = kTaps == 9 ? tap - 3 * line : 1;
        int32_t at = row.at + (line - 1) * p.call.width + column - 1;
        int32_t of_eight = at & (kConvEight - 1), line_of = place * p.x_rows + at;
        if (!(row.exist >> tap & 1)) line_of = p.x_places * p.x_rows + of_eight;
        return shared_address(positions) + line_of * (kConvPitch * 2) + ((row.eighth ^ of_eight) << 4);
    }

    // This warp's 16 positions × 64 channels of a tap, from where `aim` says.
    __device__ __forceinline__ void pick(uint32_t (&a)[4][4], uint32_t from) const {
#pragma unroll
        for (int k = 0; k < 4; k++) load_matrices(a[k], from ^ k << 5);
    }

    // The warpgroups: multiply. A thread's sums are of the rows and filters of wgmma's fragments.
    //
    // A warp is alone on its scheduler: what it does between one unit's products and the next's is time in which nothing is
    // multiplied. So only the picking of rows stands there, and everything else is done while products run; `meanwhile` is
    // done beside the last.
    template <typename Meanwhile>
    __device__ __forceinline__ void
    multiply(float (&sums)[kSums], Moments& moments, const Row& row, Meanwhile&& meanwhile) const {
        const bool leads = lane == 0;
        ConvRing ring = weights_ring(), x_ring = positions_ring();
        int32_t tap = first < p.x_units ? first - part_of(first) * kTaps : kTaps / 2;
        uint32_t a[2][4][4], before = 0;  // before: the barrier of the weights that were multiplied last
        x_ring.wait_full();
        pick(a[0], aim(row, x_ring.place, tap));
        bool there = false;  // the next weights, for all that is known
        uint64_t b = matrix_at(shared_address(weights));
        auto step = [&](const uint32_t(&mine)[4][4], uint32_t(&after)[4][4], int32_t unit) {
            if (!there) ring.wait_full();
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_group(sums, mine[k], b + 2 * k);
            products_commit();
            uint32_t done = before;
            before = ring.empty + 8 * ring.place;
            ring.next();
            b = matrix_at(shared_address(weights + ring.place * kUnit));
            there = ring.is_full();
            if (++tap >= kTaps || unit >= p.x_units) {  // rows of these channels are all in registers
                if (leads) barrier_arrive(x_ring.empty + 8 * x_ring.place);
                tap = unit + 1 < p.x_units ? 0 : kTaps / 2, x_ring.next();
                if (unit + 1 < last) x_ring.wait_full();
            }
            uint32_t from = aim(row, x_ring.place, tap);
            hold(from);
            if constexpr (kNorm) moments.add(mine);
            products_wait<1>();  // the unit before is multiplied: its weights and registers are free
            if (leads && unit > first) barrier_arrive(done);
            if (unit + 1 < last) pick(after, from);
        };
        for (int32_t unit = first; unit < last; unit += 2) {
            step(a[0], a[1], unit);
            if (unit + 1 < last) step(a[1], a[0], unit + 1);
        }
        meanwhile();
        products_wait<0>();
        products_done(sums);
    }
};

// Grid: blocks of a cluster, tiles of filters, tiles of rows.
template <int kGroups, int kWide, bool kNorm, int kTaps, int kGate>
__global__ void __launch_bounds__(conv_threads(kGroups, kWide), conv_together(kGroups, kWide))
    conv(const __grid_constant__ ConvWork work) {
    using Block = ConvBlock<kGroups, kWide, kNorm, kTaps, kGate>;
    Block block(work);
    const ConvParams& p = work.params;
    // The first threads of two warps.
    bool copies_x = threadIdx.x == Block::kConsumers, copies_weights = threadIdx.x == Block::kConsumers + 32;
    bool multiplies = threadIdx.x < Block::kConsumers, shared = p.cluster > 1;
    int32_t ahead = min(block.last, block.first + p.places);
    ConvRing ring = block.weights_ring();
    if (copies_x) expect_rows(work.x);
    if (copies_weights) {
        block.begin_barriers();
        block.copy_weights(ring, block.first, ahead);  // which no kernel before this one has written
    }
    typename Block::Row row{};
    typename Block::Constants constants;
    if (multiplies) block.ask_constants(constants), block.clear_zeros(), row = block.row();
    __syncwarp();
    __syncthreads();  // barriers and zeros are there
    if (shared) cluster_arrive_read();  // this block has begun: the others may write to its memory
    wait_for_previous();
    if (multiplies) {
        if constexpr (Block::kUneven) registers_more<kConvMoreRegisters>();
        block.put_constants(constants);
        float sums[Block::kSums] = {};
        typename Block::Moments moments;
        typename Block::Residual residuals[Block::kHeld];
        auto ask = [&] {
            if constexpr (Block::kAsksEarly) block.ask_first(residuals);
        };
        block.multiply(sums, moments, row, ask);
        let_next_begin();  // not before: its blocks would take places from those of another stream
        if constexpr (kNorm) moments.join();
        if (shared) {
            cluster_wait();
            block.template give<true>(sums, moments);
            cluster_arrive(), cluster_wait();  // all have given
        } else {
            group_sync<1>(0, Block::kConsumers);  // nobody reads weights any more
            block.template give<false>(sums, moments);
            __syncwarp();
        }
        block.store(moments, residuals);
    } else {
        if constexpr (Block::kUneven) registers_less<kConvFewRegisters>();
        if (copies_x) block.copy_positions();
        if (copies_weights) block.copy_weights(ring, ahead, block.last);
        __syncwarp();
        if (shared) cluster_wait(), cluster_arrive(), cluster_wait();
    }
}

// Do a call with `launch(kernel, grid, cluster, threads, bytes of shared memory, params)`; false where its shape has no
// kernel.
template <typename Launch>
bool run_conv(const CannyConv& call, Launch&& launch) {
    ConvPlan plan = conv_plan(call);
    if (!plan.groups) return false;
    const ConvParams& p = plan.params;
    ConvWork work{{}, {}, p};
    int32_t positions = call.batch * call.height * call.width;
    if (!describe(work.x, call.x, positions, call.channels, p.x_box)) return false;
    if (call.second_channels && !describe(work.second, call.second, positions, call.second_channels, p.second_box))
        return false;
    int32_t high = 64 * plan.groups, threads = conv_threads(plan.groups, plan.wide);
    dim3 grid(p.cluster, call.filters / plan.wide, (p.rows + high - 1) / high);
    auto go = [&](auto kernel) { return launch(kernel, grid, p.cluster, threads, plan.bytes, work); };
    auto cut = [&](auto groups, auto norm, auto gate) {
        constexpr int kGroups = decltype(groups)::value, kGate = decltype(gate)::value;
        constexpr bool kNorm = decltype(norm)::value;
        if constexpr (!kNorm && !kGate)
            if (p.taps == 9)
                return plan.wide == 64 ? go(conv<kGroups, 64, false, 9, 0>) : go(conv<kGroups, 128, false, 9, 0>);
        if constexpr (!kGate || conv_gates(kGroups, 64))
            if (plan.wide == 64) return go(conv<kGroups, 64, kNorm, 1, kGate>);
        if (plan.wide == 128) return go(conv<kGroups, 128, kNorm, 1, kGate>);
        if (plan.wide == 192) return go(conv<kGroups, 192, kNorm, 1, kGate>);
        if constexpr (conv_widest(kGroups, kNorm) >= 256)
            if (plan.wide == 256) return go(conv<kGroups, 256, kNorm, 1, kGate>);
        return false;
    };
    auto choose = [&](auto groups, auto norm) {
        return call.gate ? cut(groups, norm, std::integral_constant<int, 1>{})
                         : cut(groups, norm, std::integral_constant<int, 0>{});
    };
    std::integral_constant<int, 1> one;
    std::integral_constant<int, 2> two;
    if (call.weight_sums) return plan.groups == 1 ? choose(one, std::true_type{}) : choose(two, std::true_type{});
    return plan.groups == 1 ? choose(one, std::false_type{}) : choose(two, std::false_type{});
}

}  // namespace canny
