// How a convolution is cut into blocks, by its shape alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../clusters.cuh"
#include "call.h"

namespace canny {

constexpr int kConvDeep = 64;              // channels of a unit of work: one tap of 64 channels
constexpr int kConvBlock = 64 * kConvDeep;  // weights of a unit and 64 filters, side by side in memory
constexpr int kConvRow = 2 * kConvDeep;    // bytes of a row of x in shared memory, swizzled as the weights are
constexpr int kConvEight = 8;              // rows after which the swizzle repeats; so many are zeros
constexpr int kConvMostBox = 256;          // rows of a copy
constexpr int kConvWarpgroup = 128;
constexpr int kConvMostBytes = 227 << 10;  // of shared memory that a block may have
constexpr int kConvHalfBytes = 113 << 10;  // and with another on its processor
constexpr int kConvMostGroups = 3, kConvMostCluster = 8;
constexpr int32_t kConvPlaces = 6;         // most for weights
constexpr int kConvAlign = 1024;           // the swizzled weights begin at a multiple of it

// What is done with a tile's sums, or to them: a template's number.
enum ConvKind { kConvPlain, kConvGate, kConvScores, kConvValues, kConvUp };

inline int32_t conv_kind(const CannyConv& call) {
    return call.up ? kConvUp : call.cross ? kConvGate + call.cross : call.gate;
}

constexpr int32_t kConvWords = 80;  // columns of a head's scores: most words of a text
constexpr int32_t kConvStep = 16;   // words of a product

struct ConvParams {
    CannyConv call;
    int32_t out_height, out_width, rows;  // rows: B·h·w of y
    int32_t taps, x_units, units;         // x_units: taps · channels / 64; units: with those of the second map
    int32_t cluster, share, rest;         // units of a block, of which the first `rest` have one more
    uint32_t by_width, by_height, by_residual, by_cluster;  // inverses of out_width, out_height, rows of the residual, cluster
    // Rows of a copy of x, or of the second map; how many copies of x are all that a tile needs; rows of a place, places,
    // and those for weights.
    int32_t x_box, second_box, x_boxes, x_rows, x_places, places;
    int32_t heads, tiles_each;  // with cross; tiles of rows of an image
    int32_t rows_beside;  // 1: tiles of rows begin side by side, else tiles of filters
    uint32_t by_tiles, by_x_batch;  // inverses of tiles_each and x_batch
    float each_channel;  // 1 / channels: a division in each piece of a tile takes a microsecond
    int32_t rows_each;  // of an image, which has weights of its own: a row of the batch with cross, a phase with up, or all
};

struct ConvPlan {
    ConvParams params;
    int32_t groups = 0, wide = 0, tiles = 0, bytes = 0;  // groups: 64s of rows of a tile
    int32_t predicted = 0;                               // in ns, what cuts are chosen by
};

constexpr int32_t kConvWidths[] = {64, 128, 192, 256, kConvWords, 2 * kConvWords};  // filters of a tile
constexpr int32_t kConvNarrow = 128;                     // up to which there are all sizes; above 1×1 only

// Whether threads that multiply need more registers than each thread of a block can have.
constexpr bool conv_uneven(int32_t groups, int32_t wide) { return groups == 2 && wide == 256; }

// A thread of one more warp has x copied, one of another the weights. Only a whole warpgroup can give registers away.
constexpr int32_t conv_threads(int32_t groups, int32_t wide) {
    return groups * kConvWarpgroup + (conv_uneven(groups, wide) ? kConvWarpgroup : 64);
}

// Registers of two warpgroups that multiply and of the one that copies, where 168 for each are too few.
constexpr int kConvMoreRegisters = 208, kConvFewRegisters = 88;

// Filters of the widest tile that threads have registers for.
constexpr int32_t conv_widest(int32_t groups, bool norm) {
    return groups == 3 ? 64 : groups == 2 && !norm ? 192 : 256;
}

// Whether threads have registers for the gate.
constexpr bool conv_gates(int32_t groups, int32_t wide) { return groups == 1 || wide > 64; }

// How many blocks a processor has registers for.
constexpr int32_t conv_together(int32_t groups, int32_t wide) { return groups * wide <= 128 ? 2 : 1; }

// Eights of filters of a piece of a tile, see tile.cuh; bytes of what a block has of one; and of all that the blocks of a
// cluster give to one.
constexpr int32_t conv_piece(int32_t kind) { return kind == kConvScores ? kConvWords / 8 : kind == kConvGate ? 8 : 4; }
constexpr int32_t conv_part(int32_t kind, bool norm) { return (conv_piece(kind) + norm) * 32 * 16; }

constexpr int32_t conv_parts(int32_t groups, int32_t wide, int32_t cluster, int32_t kind, bool norm) {
    int32_t pieces = 4 * groups * (wide / (8 * conv_piece(kind)));
    return cluster == 1 ? 0 : (pieces + cluster - 1) / cluster * cluster * conv_part(kind, norm);
}

// Bytes of where each thread's rows of x lie for each of several taps.
constexpr int32_t conv_offsets(int32_t groups, int32_t taps) {
    return taps == 1 ? 0 : taps * groups * kConvWarpgroup * int32_t(sizeof(uint32_t));
}

#ifdef __CUDACC__
#define CANNY_BOTH __host__ __device__ __forceinline__
#else
#define CANNY_BOTH inline
#endif

// n / d for n, d below 8192, `by` being conv_inverse(d); see divide in group_norm/device.cuh.
constexpr uint32_t conv_inverse(uint32_t d) { return uint32_t(((uint64_t(1) << 32) + 2 * d - 1) / (2 * d)); }
CANNY_BOTH int32_t conv_divide(int32_t n, uint32_t by) { return int32_t(uint64_t(2u * n + 1u) * by >> 32); }
constexpr int32_t kConvMostRows = 8000;  // with those that a tile has beyond the end below 8192

// A position of y, or of its phase, and where the x of its middle tap lies: in positions.
struct ConvPosition {
    int32_t b, y, x, at;
};

CANNY_BOTH ConvPosition conv_position(const ConvParams& p, int32_t row) {
    int32_t line = conv_divide(row, p.by_width), b = conv_divide(line, p.by_height), stride = p.call.stride;
    int32_t y = line - b * p.out_height, x = row - line * p.out_width;
    return {b, y, x, (b * p.call.height + y * stride) * p.call.width + x * stride};
}

// The positions of x, from `first` to before `last`, that a tile of an image's rows needs.
struct ConvRange {
    int32_t first, last;
};

CANNY_BOTH ConvRange conv_range(const ConvParams& p, int32_t first_row, int32_t high, int32_t rows) {
    int32_t border = p.call.size / 2 * (p.call.width + 1), all = p.call.batch * p.call.height * p.call.width;
    int32_t last_row = first_row + high < rows ? first_row + high - 1 : rows - 1;
    int32_t first = conv_position(p, first_row).at - border;
    int32_t last = conv_position(p, last_row).at + border + 1;
    return {first > 0 ? first : 0, last < all ? last : all};
}

constexpr int32_t conv_eights(int32_t rows) { return (rows + kConvEight - 1) / kConvEight * kConvEight; }

// What a tile needs of x at a time.
inline void conv_extent(ConvPlan& plan) {
    ConvParams& p = plan.params;
    int32_t high = 64 * plan.groups, most_x = 0, most_second = 0;
    if (p.call.cross) {  // no tile has rows of two images
        p.x_boxes = 1, p.x_box = p.x_rows = conv_eights(std::min(high, p.rows_each));
        return;
    }
    p.second_box = conv_eights(p.taps == 1 ? high : high + kConvEight - 1);
    for (int32_t row = 0; row < p.rows_each; row += high) {
        ConvRange range = conv_range(p, row, high, p.rows_each);
        int32_t second = (row - range.first) / kConvEight * kConvEight + p.second_box;
        if (range.last - range.first > most_x) most_x = range.last - range.first;
        if (second > most_second) most_second = second;
    }
    p.x_boxes = (most_x + kConvMostBox - 1) / kConvMostBox;
    p.x_box = conv_eights((most_x + p.x_boxes - 1) / p.x_boxes);
    p.x_rows = p.x_boxes * p.x_box;
    if (p.call.second_channels && most_second > p.x_rows) p.x_rows = most_second;
    if (p.taps > 1) p.x_rows += kConvEight;
}

// Whether x goes through a LayerNorm.
inline bool conv_normed(const CannyConv& call) { return call.weight_sums || call.cross == 1; }

// Whether a processor has at most one block of a kernel that is alone on the GPU.
inline bool conv_few(const ConvPlan& plan) {
    return plan.tiles * plan.params.cluster <= kProcessors && !plan.params.call.beside;
}

// Places for as much as is worth it: copies take some 0.9 µs from when they are asked for, the more of them under way the
// better, to what a block has to do in all. Beside another block if it can be: the next kernel's begins to read weights
// while this one ends. False where what is least does not fit.
inline bool conv_places(ConvPlan& plan) {
    ConvParams& p = plan.params;
    bool norm = conv_normed(p.call);
    int32_t fixed = kConvAlign + plan.wide * (1 + norm) * int32_t(sizeof(float)) + conv_offsets(plan.groups, p.taps) +
                    conv_parts(plan.groups, plan.wide, p.cluster, conv_kind(p.call), norm);
    int32_t x_bytes = p.x_rows * kConvRow, bytes = plan.wide * kConvRow, units = p.share + (p.rest > 0);
    int32_t most_places = std::clamp(units, 4, kConvPlaces);
    int32_t most_x = p.taps == 1 ? most_places : p.call.second_channels ? 3 : 2;  // the second map has one tap
    auto sum = [&] { return fixed + p.x_places * (x_bytes + 16) + p.places * (bytes + 16); };
    // So many at least that a tile's sums have room in them, which they take when nobody reads weights any more.
    int32_t least = p.taps > 1 ? 4 : plan.groups * plan.wide > 256 ? 3 : 2, least_x = p.taps > 1 ? 2 : least;
    bool half = conv_together(plan.groups, plan.wide) > 1 && !conv_few(plan);
    for (int32_t most : {half ? kConvHalfBytes : 0, kConvMostBytes}) {
        p.x_places = most_x, p.places = most_places;
        while (sum() > most && (p.places > least || p.x_places > least_x)) {
            if (p.places > least) p.places--;
            else p.x_places--;
            if (p.taps == 1) p.x_places = p.places;  // a place is for both
        }
        plan.bytes = sum();
        if (plan.bytes <= most) return true;
    }
    return false;
}

// Blocks of a cut that a processor has place for.
inline int32_t conv_beside(const ConvPlan& plan) {
    return plan.bytes <= kConvHalfBytes ? conv_together(plan.groups, plan.wide) : 1;
}

// Alone on the GPU, a kernel of few blocks takes so much memory that no two of them share a processor: they are set up
// while the kernel before still has most processors, and would crowd on the others.
inline void conv_spread(ConvPlan& plan) {
    if (conv_few(plan) && plan.bytes <= kConvHalfBytes) plan.bytes = kConvHalfBytes + 1024;
}

// What a cut takes, in ns: fitted to what `bench.conv --sweep` measured on an H100 of 1,280 likely cuts of 72 shapes, so
// that it chooses those that are 0.8% slower than the best, on average. The longest counts: a block's products or what they
// read of shared memory, what the second-level cache gives all blocks, or what memory gives that.
inline int32_t conv_predicted(const ConvPlan& plan) {
    const ConvParams& p = plan.params;
    constexpr double kClock = 1.755, kCacheRate = 9301., kMemoryRate = 3196.;  // per ns: clocks, bytes
    constexpr double kOwn = 8.47, kShared = 7.65, kMore = 1.3;  // for the sums of a filter and 64 rows; gate or softmax
    constexpr int32_t kMany = 120;                               // blocks
    bool norm = conv_normed(p.call);
    int32_t together = conv_beside(plan), at_once = kClustersAtOnce[p.cluster - 1] * together;
    int32_t blocks = plan.tiles * p.cluster, turns = (plan.tiles + at_once - 1) / at_once;
    bool crowded = together > 1 && blocks > kMany;
    // A unit: the clocks that shared memory is busy with it, at 128 bytes each, or the wait of a warpgroup for itself.
    auto unit = [&](int32_t taps) {
        double busy = crowded ? (taps == 1 ? 2.84 : taps == 4 ? 2.2 : 2.) : 1.;
        double shared = 1.82 * busy * (plan.groups * (plan.wide + 21.2 / taps) + plan.wide) / kClock;
        return std::max(shared, 216.1 + 26.9 * plan.groups) + (norm ? 105.3 : 0.);
    };
    int32_t share = (p.units + p.cluster - 1) / p.cluster;
    int32_t single = std::min(p.units - p.x_units, share);  // the second map's, in the last block of a cluster
    double products = turns * ((share - single) * unit(p.taps) + single * unit(1));
    double high = 64 * plan.groups, of_x = (high + (p.taps > 1 ? 2 * p.call.width + 2 : 0)) * kConvRow / p.taps;
    double read = p.units * double(plan.wide * kConvRow) + (p.units - single) * of_x + single * high * kConvRow;
    double cache = p.rows_beside ? plan.tiles * read / kCacheRate : 0.;
    double images = p.rows / p.rows_each;  // each with weights of its own
    double readers = std::min(blocks * plan.wide / 5762., 1.);  // so many bytes ahead keep the memory busy
    double memory = images * p.units * p.call.filters * kConvRow / kMemoryRate / readers;
    double sums = ((p.cluster == 1 ? kOwn : kShared) + (p.call.gate || p.call.cross == 1 ? kMore : 0.)) * plan.groups *
                  plan.wide * turns;
    double rest = 1651. + sums + 333. * (p.cluster - 1) + 2512. * (turns - 1) + (blocks >= kMany ? 183. : 0.);
    return int32_t(std::max({products, cache, memory}) + rest);
}

// Whether a call without a cross-attention, or with one that there is a kernel for.
inline bool conv_crosses(const CannyConv& call) {
    if (!call.cross) return true;
    if (call.cross < 1 || call.cross > 2 || call.size != 1 || call.stride != 1 || call.gate) return false;
    if (call.weight_sums || call.second_channels || call.words < 1 || call.words > kConvWords) return false;
    bool scores = call.cross == 1;
    int32_t columns = scores ? call.filters : call.channels, channels = scores ? call.channels : call.filters;
    if (columns % kConvWords || (scores && (call.residual || call.x_batch < 1 || call.batch % call.x_batch))) return false;
    return call.text_pitch % 8 == 0 && call.text_pitch >= 2 * columns / kConvWords * channels + columns / kConvWords;
}

// The cut of a call; groups is 0 where its shape has no kernel.
inline ConvPlan conv_plan(const CannyConv& call) {
    ConvPlan best, none;
    bool sizes = call.batch > 0 && call.height > 0 && call.width > 0 && call.channels > 0 && call.filters > 0;
    if (!sizes || call.channels % kConvDeep || call.filters % 64) return none;
    if ((call.size != 1 && call.size != 3) || (call.stride != 1 && call.stride != 2)) return none;
    if (call.weight_sums && call.size != 1) return none;
    if (call.second_channels < 0 || call.second_channels % kConvDeep) return none;
    if (call.second_channels && (call.stride != 1 || call.weight_sums)) return none;
    if (call.gate && (call.gate != 1 || call.size != 1 || call.residual)) return none;
    bool plain = call.size == 3 && call.stride == 1 && !call.residual && !call.second_channels;
    if (call.up && (call.up != 1 || !plain)) return none;
    if (call.residual && (call.residual_batch < 1 || call.residual_batch > call.batch)) return none;
    if (call.cluster < 0 || call.cluster > kConvMostCluster) return none;
    if (!conv_crosses(call)) return none;
    ConvParams p{call};
    p.each_channel = 1.f / float(call.channels);
    p.out_height = (call.height + call.stride - 1) / call.stride;
    p.out_width = (call.width + call.stride - 1) / call.stride;
    int32_t images = call.cross ? call.batch : call.up ? 4 : 1;
    p.rows_each = (call.cross ? 1 : call.batch) * p.out_height * p.out_width;
    p.rows = images * p.rows_each;
    p.taps = call.up ? 4 : call.size * call.size;
    p.x_units = p.taps * (call.channels / kConvDeep);
    p.units = p.x_units + call.second_channels / kConvDeep;
    if (p.rows > kConvMostRows) return none;
    p.heads = (call.cross == 1 ? call.filters : call.channels) / kConvWords;
    p.by_x_batch = call.cross == 1 ? conv_inverse(call.x_batch) : 0;
    p.by_width = conv_inverse(p.out_width);
    p.by_height = conv_inverse(p.out_height);
    p.by_residual = call.residual ? conv_inverse(call.residual_batch * p.out_height * p.out_width) : 0;
    for (int32_t groups = 1; groups <= kConvMostGroups; groups++) {
        int32_t high = 64 * groups;
        if (groups > 1 && high - 64 >= p.rows_each) break;
        if (call.high && call.high != high) continue;
        ConvPlan rows;
        rows.params = p;
        rows.groups = groups;
        rows.params.tiles_each = (p.rows_each + high - 1) / high;
        rows.params.by_tiles = conv_inverse(rows.params.tiles_each);
        conv_extent(rows);
        for (int32_t wide : kConvWidths) {
            if (call.filters % wide || (call.wide && call.wide != wide)) continue;
            bool whole_heads = wide % kConvWords == 0, wanted = whole_heads == (call.cross == 1);
            if (!wanted || (call.cross && groups > 2) || (call.cross == 2 && wide > kConvNarrow)) continue;
            if ((wide > kConvNarrow && p.taps > 1) || wide > conv_widest(groups, call.weight_sums)) continue;
            if (call.gate && !conv_gates(groups, wide)) continue;
            ConvPlan plan = rows;
            plan.wide = wide;
            plan.params.rows_beside = p.taps * wide > high;
            plan.tiles = call.filters / wide * rows.params.tiles_each * images;
            for (int32_t cluster = 1; cluster <= kConvMostCluster && cluster <= p.units; cluster++) {
                if (call.cluster && call.cluster != cluster) continue;
                plan.params.cluster = cluster;
                plan.params.by_cluster = conv_inverse(cluster);
                plan.params.share = p.units / cluster;
                plan.params.rest = p.units % cluster;
                if (!conv_places(plan)) continue;
                conv_spread(plan);
                plan.predicted = conv_predicted(plan);
                if (!best.groups || plan.predicted < best.predicted) best = plan;
            }
        }
    }
    return best;
}

// What canny_conv_plan tells.
inline void conv_facts(const CannyConv& call, int32_t out[8]) {
    ConvPlan plan = conv_plan(call);
    const ConvParams& p = plan.params;
    const int32_t facts[] = {plan.groups, plan.wide, p.cluster,  plan.tiles * p.cluster,
                             p.x_places,  p.places,  plan.bytes, plan.predicted};
    for (int32_t i = 0; i < 8; i++) out[i] = facts[i];
}

}  // namespace canny
