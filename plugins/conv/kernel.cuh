// Convolutions of small maps as matrix products (B·h·w) × (taps·channels) × filters, in half precision with sums in
// float. With few positions the time is that of reading the weights, once and all at the same time:
//
// - A tile is 64 or 128 positions × 64 or 128 filters, or 192 or 256 of a 1×1 convolution, or 192 × 64. The blocks of a
//   cluster share it: each has a slice of the products' length, is given what the others have of a part of the tile, and
//   adds that up, always in the same order.
// - One thread has the weights copied, a block of shared memory's own layout at a time, from before its turn on. Another
//   has the positions' channels copied, 64 of them once for all nine taps. Barriers tell who waits for whom.
// - Each warpgroup multiplies 64 positions, which it picks for each tap by address, by the weights in shared memory.
// - A second map comes behind x, 64 channels of the tile's own positions at a time, which lie where x has its middle tap.
// - Of a doubled map the four phases are convolutions of 2×2 taps, each by weights of its own (call.h); no tile has rows of two.
// - The two halves of a cross-attention over a text that is multiplied out are 1×1 convolutions by weights that the text has
//   (call.h); no tile has positions of two texts.
//
// A LayerNorm before it is done to the sums: with mean m and deviation d of a position, u the sum of a filter's weights w,
// it is (x·w - m·u) / d. m and d come from sums of x and x² in float. Both differences lose digits where m is many times d:
// up to 30 times nothing shows beside what half precision rounds (3e-4 of the largest result), at 100 times 2e-3 does.
// The maps of transformers have m below d.
#pragma once

#include <type_traits>

#include "ring.cuh"
#include "tile.cuh"

namespace canny {

// What a kernel is given.
struct ConvWork {
    ConvMap x, second;
    ConvParams params;
};

// kTaps: 1 or 9, or 4 of a phase.
template <int kGroups, int kWide, bool kNorm, int kTaps, int kKind>
struct ConvBlock : ConvTile<kGroups, kWide, kNorm, kKind> {
    using Tile = ConvTile<kGroups, kWide, kNorm, kKind>;
    using typename Tile::Moments;
    using Tile::kHigh, Tile::kSums, Tile::kConsumers, Tile::kScores, Tile::kValues, Tile::kCross, Tile::kUp, Tile::p,
        Tile::memory, Tile::image, Tile::first_row, Tile::end_row, Tile::first_filter, Tile::rank, Tile::warp, Tile::lane;

    static constexpr int kUnit = kWide * kConvRow;  // bytes of the weights of a unit
    static constexpr int kOffsets = conv_offsets(kGroups, kTaps);
    static constexpr bool kUneven = conv_uneven(kGroups, kWide);
    static constexpr int kSide = kUp ? 2 : 3;  // taps along an axis

    const ConvWork& work;
    uint32_t weights, positions, barriers;  // addresses
    uint32_t* offsets;                      // of each tap and thread
    int32_t first, last;                    // units from first to before last are this block's
    ConvRange range;

    __device__ __forceinline__ explicit ConvBlock(const ConvWork& work) : Tile(work.params), work(work) {
        weights = shared_address(memory);
        char* behind = memory + p.places * kUnit + p.x_places * x_bytes();
        positions = weights + p.places * kUnit;
        barriers = shared_address(behind);
        Tile::constants = reinterpret_cast<float*>(behind + 16 * (p.places + p.x_places));
        offsets = reinterpret_cast<uint32_t*>(Tile::constants + kWide * (1 + kNorm));
        // What others write needs a place of its own; a block's own sums come when nobody reads weights any more.
        char* parts = p.cluster > 1 ? reinterpret_cast<char*>(offsets) + kOffsets : memory;
        Tile::parts = reinterpret_cast<float*>(parts);
        first = rank * p.share + min(rank, p.rest);
        last = first + p.share + (rank < p.rest);
        if constexpr (kCross) {
            int32_t of_x = image;
            if (kScores) of_x -= conv_divide(image, p.by_x_batch) * p.call.x_batch;
            range.first = first_row + (of_x - image) * p.rows_each;
        } else {
            range = conv_range(p, first_row - image * p.rows_each, kHigh, kUp ? p.rows_each : p.rows);
        }
    }

    __device__ __forceinline__ int32_t x_bytes() const { return p.x_rows * kConvRow; }

    // Which 64 channels a unit is of: first those of x, then those of the second map, which have a unit each.
    __device__ __forceinline__ int32_t part_of(int32_t unit) const {
        int32_t of_x = min(unit, p.x_units);
        return of_x / kTaps + unit - of_x;
    }

    __device__ __forceinline__ ConvRing weights_ring() const {
        return {barriers, p.places, weights, uint32_t(kTaps == 1 ? kUnit + x_bytes() : kUnit)};
    }

    // Where each unit has channels of its own, they come behind its weights, and one barrier tells of both.
    __device__ __forceinline__ ConvRing positions_ring() const {
        uint32_t bytes = x_bytes();
        if (kTaps == 1) return {barriers, p.places, weights + kUnit, kUnit + bytes};
        return {barriers + 16 * p.places, p.x_places, positions, bytes};
    }

    __device__ __forceinline__ void begin_barriers() const {
        weights_ring().begin_barriers(kTaps == 1 ? 2 : 1, kConsumers / 32);
        if (kTaps > 1) positions_ring().begin_barriers(1, kConsumers / 32);
        barriers_begun();
    }

    // The last eight rows of each place, for taps beyond the border.
    __device__ __forceinline__ void clear_zeros() const {
        constexpr int32_t kBytes = kConvEight * kConvRow;
        char* zeros = memory + (positions - weights) - kBytes;
        if (kTaps > 1)
            for (int32_t place = 0; place < p.x_places; place++)
                for (int32_t i = threadIdx.x * 16; i < kBytes; i += kConsumers * 16)
                    *reinterpret_cast<uint4*>(zeros + (place + 1) * x_bytes() + i) = uint4{};
    }

    // One thread: have the weights of units copied, from `unit` to before `end`.
    __device__ __forceinline__ void copy_weights(ConvRing& ring, int32_t unit, int32_t end) const {
        constexpr int32_t kBlock = kConvBlock * int(sizeof(__half));
        int32_t blocks = first_filter / 64;
        if constexpr (kUp) blocks += image * (p.call.filters / 64);
        const __half* from = static_cast<const __half*>(p.call.weight) +
                             (int64_t(blocks) * p.units + unit) * kConvBlock;
        for (; unit < end; unit++, from += kConvBlock) {
            ring.wait_empty();
            barrier_expect(ring.full, kUnit);
            if constexpr (kCross) {
                copy_words(ring, unit);
            } else {
#pragma unroll
                for (int32_t i = 0; i < kWide / 64; i++)
                    copy_block(ring.place + i * kBlock, from + int64_t(i) * p.units * kConvBlock, kBlock, ring.full);
            }
            ring.next();
        }
    }

    // What a text's words made of weights: 64 channels of each head's words as rows; or of 64 columns of scores each word's
    // channels, 16 words at a time, which are of one head. Rows beyond a text's words are of the next or zeros: such scores
    // are put far below the others, and become zeros.
    __device__ __forceinline__ void copy_words(const ConvRing& ring, int32_t unit) const {
        constexpr int32_t kEach = kConvWords / kConvStep, kSteps = kConvDeep / kConvStep, kBytes = kConvStep * kConvRow;
        int32_t words = image * p.call.words;
        if constexpr (kScores) {
            int32_t channel = first_filter / kConvWords * p.call.channels + unit * kConvDeep;
#pragma unroll
            for (int32_t i = 0; i < kWide / kConvWords; i++, channel += p.call.channels)
                copy_rows_early(ring.place + i * kConvWords * kConvRow, work.second, words, channel, ring.full);
        } else {
#pragma unroll
            for (int32_t i = 0; i < kSteps; i++) {
                int32_t step = unit * kSteps + i, head = uint32_t(step) / kEach;
                int32_t word = words + (step - head * kEach) * kConvStep;
                int32_t channel = (p.heads + head) * p.call.filters + first_filter;
#pragma unroll
                for (int32_t k = 0; k < kWide / 64; k++) {
                    uint32_t to = ring.place + (k * kSteps + i) * kBytes;
                    copy_rows_early(to, work.second, word, channel + k * 64, ring.full);
                }
            }
        }
    }

    // One thread: have 64 channels of all positions copied at a time. Those of the second map go to where x has the same
    // positions, from the next multiple of eight before them on.
    __device__ __forceinline__ void copy_positions() const {
        ConvRing ring = positions_ring();
        int32_t parts = p.call.channels / kConvDeep, ahead = first_row - range.first;  // parts: of x
        for (int32_t part = part_of(first), end = part_of(last - 1); part <= end; part++) {
            ring.wait_empty();
            bool of_x = part < parts;
            barrier_expect(ring.full, (of_x ? p.x_boxes * p.x_box : p.second_box) * kConvRow);
            if (of_x)
                for (int32_t row = 0; row < p.x_boxes * p.x_box; row += p.x_box)
                    copy_rows(ring.place + row * kConvRow, work.x, range.first + row, part * kConvDeep, ring.full);
            else
                copy_rows(
                    ring.place + ahead / kConvEight * kConvEight * kConvRow,
                    work.second, first_row - ahead % kConvEight, (part - parts) * kConvDeep, ring.full
                );
            ring.next();
        }
    }

    // Where a row of x lies in a place: its first 16 channels, or the next eight; those of the 16 after them at that xor 32.
    __device__ __forceinline__ uint32_t offset_of(int32_t row) const {
        return row * kConvRow + ((lane / 16 ^ (row & (kConvEight - 1))) << 4);
    }

    // Have at hand where the row of x lies that this lane names to its warp, for each tap; of the only one, counted from a
    // unit's weights, what is returned.
    __device__ __forceinline__ uint32_t put_offsets() const {
        int32_t row = first_row + warp * 16 + lane % 16, stride = p.call.stride;
        if constexpr (kCross) return kUnit + offset_of(row < end_row ? row - first_row : 0);
        ConvPosition to = conv_position(p, row - image * p.rows_each);
        int32_t middle = to.at - range.first;
        if constexpr (kTaps == 1) {
            return kUnit + offset_of(row < end_row ? middle : 0);
        } else {
#pragma unroll 1
            for (int32_t tap = 0; tap < kTaps; tap++) {
                int32_t line = tap / kSide - 1, column = tap % kSide - 1;
                if (kUp) line += image / 2, column += image % 2;
                int32_t y = to.y * stride + line, x = to.x * stride + column;
                bool exists = row < end_row && y >= 0 && y < p.call.height && x >= 0 && x < p.call.width;
                int32_t at = middle + line * p.call.width + column, zeros = p.x_rows - kConvEight;
                offsets[tap * kConsumers + threadIdx.x] = offset_of(exists ? at : zeros + (at & (kConvEight - 1)));
            }
            return 0;
        }
    }

    // This warp's 16 positions × 64 channels of a tap, from its rows' addresses.
    __device__ __forceinline__ void pick(uint32_t (&a)[4][4], uint32_t from) const {
#pragma unroll
        for (int k = 0; k < 4; k++) load_matrices(a[k], from ^ k << 5);
    }

    static constexpr uint32_t kDeepRows = kConvDeep * kConvRow;  // bytes of a unit and 64 channels of words

    // Product number k of a unit by the weights at b.
    __device__ __forceinline__ void product(float (&sums)[kSums], const uint32_t (&a)[4][4], uint64_t b, int k) const {
        if constexpr (kValues) multiply_rows(sums, a[k], b + k * (kConvStep * kConvRow / 16));
        else multiply_group(sums, a[k], b + 2 * k);
    }

    // The warpgroups: multiply. A thread's sums are of the rows and filters of wgmma's fragments. only: see put_offsets.
    //
    // A warp is alone on its scheduler: what it does between one unit's products and the next's is time in which nothing is
    // multiplied. So only the picking of rows stands there. What else there is to do stands between a unit's first products,
    // without branches, at which the compiler would wait for them; `meanwhile` is done beside the last.
    template <typename Meanwhile>
    __device__ __forceinline__ void
    multiply(float (&sums)[kSums], Moments& moments, uint32_t only, Meanwhile&& meanwhile) const {
        const bool leads = lane == 0;
        ConvRing ring = weights_ring(), x_ring = positions_ring();
        // left: of the units that have these channels of x in common.
        int32_t tap = first < p.x_units ? first - part_of(first) * kTaps : kTaps / 2;
        int32_t left = first < p.x_units ? kTaps - tap : 1;
        auto offset = [&] { return offsets[tap * kConsumers + threadIdx.x]; };
        uint32_t a[2][4][4], before = 0;  // before: the barrier of the weights that were multiplied last
        if (kTaps > 1) x_ring.wait_full();
        ring.wait_full();
        pick(a[0], kTaps > 1 ? x_ring.place + offset() : ring.place + only);
        auto step = [&](const uint32_t(&mine)[4][4], uint32_t(&after)[4][4], int32_t unit) {
            const uint64_t b = kValues ? rows_at(uniform(ring.place), kDeepRows) : matrix_at(uniform(ring.place));
            const uint32_t now = ring.empty();
            products_begin();
            product(sums, mine, b, 0);
            ring.next();
            uint32_t from = ring.place + only;
            bool x_there = true;
            if constexpr (kTaps > 1) {
                left--, tap++;
                const bool ends = left == 0, of_x = unit + 1 < p.x_units;
                barrier_arrive_if(ends && leads, x_ring.empty());  // rows of these channels are all in registers
                x_ring.next_if(ends);
                if (ends) tap = of_x ? 0 : kTaps / 2, left = of_x ? kTaps : 1;
                from = x_ring.place + offset();
                x_there = x_ring.is_full();
            }
            hold(from);
            product(sums, mine, b, 1);
            const bool there = ring.is_full();
            if constexpr (kNorm) moments.add(mine);
            product(sums, mine, b, 2);
            product(sums, mine, b, 3);
            products_commit();
            products_wait<1>();  // the unit before is multiplied: its weights and registers are free
            barrier_arrive_if(leads && unit > first, before);
            before = now;
            if (unit + 1 >= last) return;
            if (kTaps > 1 && !x_there) x_ring.wait_full();
            if (!there) ring.wait_full();
            pick(after, from);
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

// Grid: blocks of a cluster, tiles of filters, tiles of rows; or the latter before the former.
template <int kGroups, int kWide, bool kNorm, int kTaps, int kKind>
__global__ void __launch_bounds__(conv_threads(kGroups, kWide), conv_together(kGroups, kWide))
    conv(const __grid_constant__ ConvWork work) {
    using Block = ConvBlock<kGroups, kWide, kNorm, kTaps, kKind>;
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
        block.copy_weights(ring, block.first, ahead);  // which the kernel before this one has not written
    }
    typename Block::Constants constants;
    if (multiplies) block.ask_constants(constants), block.clear_zeros();
    __syncwarp();
    __syncthreads();  // barriers and zeros are there
    if (shared) cluster_arrive_read();  // this block has begun: the others may write to its memory
    uint32_t only = multiplies ? block.put_offsets() : 0;
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
        block.multiply(sums, moments, only, ask);
        let_next_begin();  // not before: its blocks would take places from those of another stream
        if constexpr (kNorm) moments.join();
        if (shared) {
            cluster_wait();
            block.template give<true>(sums, moments);
            cluster_arrive(), cluster_wait();  // all have given
        } else {
            group_sync<1>(0, Block::kConsumers);  // nobody reads weights any more
            block.template give<false>(sums, moments);  // each thread to itself
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

template <int kNumber>
using ConvInt = std::integral_constant<int, kNumber>;

// Do a call with `launch(kernel, grid, cluster, threads, bytes of shared memory, params)`; false where its shape has no
// kernel.
template <typename Launch>
bool run_conv(const CannyConv& call, Launch&& launch) {
    ConvPlan plan = conv_plan(call);
    if (!plan.groups) return false;
    const ConvParams& p = plan.params;
    ConvWork work{{}, {}, p};
    int32_t positions = (call.cross == 1 ? call.x_batch : call.batch) * call.height * call.width;
    if (!describe(work.x, call.x, positions, call.channels, p.x_box)) return false;
    if (call.second_channels && !describe(work.second, call.second, positions, call.second_channels, p.second_box))
        return false;
    int32_t lines = call.batch * call.words, at_once = call.cross == 1 ? kConvWords : kConvStep;
    if (call.cross && !describe(work.second, call.weight, lines, call.text_pitch, at_once)) return false;
    int32_t across = call.filters / plan.wide, threads = conv_threads(plan.groups, plan.wide);
    int32_t along = plan.tiles / across;
    dim3 grid(p.cluster, p.rows_beside ? along : across, p.rows_beside ? across : along);
    auto go = [&](auto kernel) { return launch(kernel, grid, p.cluster, threads, plan.bytes, work); };
    auto of = [&](auto groups, auto wide, auto norm, auto gate) {
        constexpr int kGroups = groups, kWide = wide, kGate = gate;
        if constexpr (kWide > conv_widest(kGroups, norm) || (kGate && !conv_gates(kGroups, kWide))) {
            return false;
        } else {
            if constexpr (!norm && !kGate && kWide <= kConvNarrow) {
                if (p.taps == 9) return go(conv<kGroups, kWide, false, 9, kConvPlain>);
                if (p.taps == 4) return go(conv<kGroups, kWide, false, 4, kConvUp>);
            }
            return go(conv<kGroups, kWide, norm, 1, kGate ? kConvGate : kConvPlain>);
        }
    };
    auto choose = [&](auto groups, auto wide) {
        std::true_type yes;
        std::false_type no;
        if (call.weight_sums) return call.gate ? of(groups, wide, yes, yes) : of(groups, wide, yes, no);
        return call.gate ? of(groups, wide, no, yes) : of(groups, wide, no, no);
    };
    auto cut = [&](auto groups) {
        constexpr int kGroups = groups;
        switch (plan.wide) {
            case kConvWords: return go(conv<kGroups, kConvWords, true, 1, kConvScores>);
            case 2 * kConvWords: return go(conv<kGroups, 2 * kConvWords, true, 1, kConvScores>);
            case 64: return call.cross ? go(conv<kGroups, 64, false, 1, kConvValues>) : choose(groups, ConvInt<64>());
            case 128: return call.cross ? go(conv<kGroups, 128, false, 1, kConvValues>) : choose(groups, ConvInt<128>());
            case 192: return choose(groups, ConvInt<192>());
            default: return choose(groups, ConvInt<256>());
        }
    };
    if (plan.groups == 3) return choose(ConvInt<3>(), ConvInt<64>());
    return plan.groups == 1 ? cut(ConvInt<1>()) : cut(ConvInt<2>());
}

}  // namespace canny
