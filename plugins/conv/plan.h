// How a convolution is cut into blocks, by its shape alone.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "call.h"

namespace canny {

constexpr int kConvDeep = 64;                           // channels of a unit of work: one tap of 64 channels
constexpr int kConvBlock = 64 * kConvDeep;              // weights of a unit and 64 filters, side by side in memory
constexpr int kConvPitch = 72;                          // halves of a row of x in shared memory: no bank conflicts
constexpr int kConvZeros = 8;                           // rows of zeros
constexpr int kConvLoaders = 96, kConvWarpgroup = 128;   // threads that copy x; one more warp copies weights
constexpr int kConvMostBytes = 227 << 10;               // of shared memory that a block may have
constexpr int kConvMostCluster = 8;
constexpr int kConvAlign = 1024;  // the swizzled weights begin at a multiple of it

struct ConvParams {
    CannyConv call;
    int32_t out_height, out_width, rows;  // rows: B·h·w of y
    int32_t taps, units;                  // units: taps · channels / 64
    int32_t cluster;
    int32_t x_rows, x_places, places;  // rows of x that a tile needs, at most; places for as many, and for weights
};

struct ConvPlan {
    ConvParams params;
    int32_t groups = 0, wide = 0, tiles = 0, bytes = 0, predicted = 0;  // groups: 64s of rows of a tile; predicted: ns
};

constexpr int32_t conv_threads(int32_t groups) { return groups * kConvWarpgroup + kConvLoaders + 32; }

// Where the x that the first tap of the first column of a row is for would lie, were there no border: in positions.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int32_t conv_source(const ConvParams& p, int32_t row) {
    int32_t line = row / p.out_width, b = line / p.out_height, stride = p.call.stride;
    int32_t y = (line - b * p.out_height) * stride, x = (row - line * p.out_width) * stride;
    return (b * p.call.height + y) * p.call.width + x;
}

// The positions of x, from `first` to before `last`, that a tile of rows needs.
struct ConvRange {
    int32_t first, last;
};

#ifdef __CUDACC__
__host__ __device__
#endif
inline ConvRange conv_range(const ConvParams& p, int32_t first_row, int32_t high) {
    int32_t border = p.call.size / 2 * (p.call.width + 1), all = p.call.batch * p.call.height * p.call.width;
    int32_t last_row = first_row + high < p.rows ? first_row + high - 1 : p.rows - 1;
    int32_t first = conv_source(p, first_row) - border, last = conv_source(p, last_row) + border + 1;
    return {first > 0 ? first : 0, last < all ? last : all};
}

// Places for as much as fits; false where two of each do not.
inline bool conv_places(ConvPlan& plan) {
    ConvParams& p = plan.params;
    int32_t high = 64 * plan.groups, fixed = kConvZeros * kConvPitch * 2 + kConvAlign;
    p.x_rows = 0;
    for (int32_t row = 0; row < p.rows; row += high) {
        ConvRange range = conv_range(p, row, high);
        if (range.last - range.first > p.x_rows) p.x_rows = range.last - range.first;
    }
    int32_t x_bytes = p.x_rows * kConvPitch * 2, bytes = plan.wide * kConvDeep * 2;
    p.x_places = p.taps == 1 ? 4 : 2;
    p.places = plan.wide == 64 ? 8 : 6;
    auto sum = [&] { return fixed + p.x_places * (x_bytes + 16) + p.places * (bytes + 16); };
    while (sum() > kConvMostBytes && (p.places > 4 || p.x_places > 2)) p.places > 4 ? p.places-- : p.x_places--;
    int32_t sums = kConvAlign + high * (plan.wide + 8) * int32_t(sizeof(float));
    plan.bytes = sum() > sums ? sum() : sums;
    return plan.bytes <= kConvMostBytes;
}

// What a cut would take on an H200, in ns: a guess from its clocks, to choose by.
inline int32_t conv_predicted(const ConvPlan& plan) {
    const ConvParams& p = plan.params;
    constexpr double kClock = 1.75, kWeightsRate = 4300., kOnChipRate = 5500.;  // per ns: clocks, bytes, bytes
    constexpr int32_t kParts = 8, kProcessors = 16;  // a cluster lies in one of 8 parts of at least 16 processors
    int32_t share = plan.groups == 1 && 2 * plan.bytes <= kConvMostBytes ? 2 : 1;  // blocks of a processor
    int32_t at_once = kParts * (kProcessors * share / p.cluster), turns = (plan.tiles + at_once - 1) / at_once;
    int32_t length = (p.units + p.cluster - 1) / p.cluster, busy = plan.tiles * p.cluster > 132 ? share : 1;
    double products = plan.groups * plan.wide * 2.4 * busy, alone = 220;  // clocks of a unit
    double clocks = length * turns * (products > alone ? products : alone);
    double weights = double(p.units) * p.call.filters * kConvDeep * 2;
    double x = double(plan.tiles) * p.x_rows * p.units / p.taps * kConvDeep * 2;
    double chip = (x + weights * ((p.rows + 64 * plan.groups - 1) / (64 * plan.groups))) / kOnChipRate;
    double slowest = clocks / kClock;
    for (double other : {weights / kWeightsRate, chip}) slowest = other > slowest ? other : slowest;
    return int32_t(slowest) + 2000 + 150 * (p.cluster - 1);
}

// The cut of a call; groups is 0 where its shape has no kernel.
inline ConvPlan conv_plan(const CannyConv& call) {
    ConvPlan best, none;
    bool sizes = call.batch > 0 && call.height > 0 && call.width > 0 && call.channels > 0 && call.filters > 0;
    if (!sizes || call.channels % kConvDeep || call.filters % 64) return none;
    if ((call.size != 1 && call.size != 3) || (call.stride != 1 && call.stride != 2)) return none;
    if (call.residual && call.residual_batch < 1) return none;
    if (call.cluster < 0 || call.cluster > kConvMostCluster) return none;
    ConvParams p{call};
    p.out_height = (call.height + call.stride - 1) / call.stride;
    p.out_width = (call.width + call.stride - 1) / call.stride;
    p.rows = call.batch * p.out_height * p.out_width;
    p.taps = call.size * call.size;
    p.units = p.taps * (call.channels / kConvDeep);
    for (int32_t wide : {64, 128}) {
        if (call.filters % wide || (call.wide && call.wide != wide)) continue;
        ConvPlan plan;
        plan.params = p;
        plan.wide = wide;
        plan.groups = p.rows <= 64 ? 1 : p.rows <= 128 ? 2 : 3;
        while (plan.groups && !conv_places(plan)) plan.groups--;
        if (!plan.groups) continue;
        plan.tiles = call.filters / wide * ((p.rows + 64 * plan.groups - 1) / (64 * plan.groups));
        for (int32_t cluster = 1; cluster <= kConvMostCluster && cluster <= p.units; cluster++) {
            if (call.cluster && call.cluster != cluster) continue;
            plan.params.cluster = cluster;
            plan.predicted = conv_predicted(plan);
            if (!best.groups || plan.predicted < best.predicted) best = plan;
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
