// How a GroupNorm of a given shape is cut into blocks: a function of the shape alone, so that results repeat exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "../clusters.cuh"

namespace canny {

enum class Path : int32_t {
    kNone = 0,     // cannot be done
    kOneLaunch,    // a cluster of blocks holds its channels in registers: one pass over the tensor
    kTwoLaunches,  // partial statistics to the workspace, then a second pass applies them
    kLinear,       // (B, C, h, w) in memory: one block a group
};

struct Shape {
    int32_t batch, channels, positions, groups;  // positions = h * w
    bool half, channels_last;
};

struct Plan {
    Path path = Path::kNone;
    int32_t threads = 0;        // a block
    int32_t pitch = 0;          // elements from one position to the next
    int32_t tile = 0;           // channels of a block: whole groups, whole vectors
    int32_t tiles = 0;          // blocks along the channels
    int32_t tile_groups = 0;    // groups of a tile
    int32_t columns = 0;        // vectors of a tile, each with threads of its own
    int32_t lanes = 0;          // threads of a column: positions that a block takes at once
    int32_t slices = 0;         // blocks along the positions
    int32_t slice = 0;          // positions of a block
    int32_t batches = 0;        // times that a block takes `lanes` positions
    int32_t per_channel = 0;    // a vector spans more than two groups
    int32_t slots = 0;          // records of a group that a block's threads make
    int32_t warps_a_group = 0;  // that merge them
    uint32_t by_columns = 0, by_group = 0,
             by_warps = 0;  // for `divide` by columns, channels of a group, warps of a group
    size_t shared = 0;      // bytes of shared memory of a block
    size_t workspace = 0;   // bytes
};

constexpr int32_t kBatchesHalf = 6, kBatchesFloat = 4;  // most vectors of a thread that stay in registers
constexpr int32_t kThreads = 512, kThreadsPerChannel = 256, kLinearThreads = 512;
constexpr int32_t kSlices = 128,
                  kBlocks = 264;                // two launches: most slices, and how many blocks fill a large GPU twice
constexpr int32_t kRecord = 3 * sizeof(float);  // count, mean, sum of squares about the mean

constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// What `divide` takes for a division by d.
constexpr uint32_t inverse(uint32_t d) { return uint32_t(((uint64_t(1) << 32) + 2 * d - 1) / (2 * d)); }

constexpr int32_t lcm8(int32_t a) { return a % 8 == 0 ? a : a % 4 == 0 ? 2 * a : a % 2 == 0 ? 4 * a : 8 * a; }

// A tile of at least `bytes` a position, its columns and threads.
inline void set_tile(Plan& plan, const Shape& shape, int32_t bytes) {
    int32_t per_group = shape.channels / shape.groups;
    int32_t unit = lcm8(per_group), size = shape.half ? 2 : 4;
    plan.tile = unit * ceil_div(bytes, unit * size);
    if (plan.tile > shape.channels) plan.tile = unit * ceil_div(shape.channels, unit);
    plan.tiles = ceil_div(shape.channels, plan.tile);
    plan.tile_groups = plan.tile / per_group;
    plan.columns = plan.tile / 8;
    plan.per_channel = per_group < 8 && per_group != 4;
    plan.lanes = (plan.per_channel ? kThreadsPerChannel : kThreads) / plan.columns;
}

// Threads and shared memory, once tile, lanes and slices are known.
inline void set_block(Plan& plan, const Shape& shape) {
    int32_t per_group = shape.channels / shape.groups;
    plan.slice = ceil_div(shape.positions, plan.slices);
    if (plan.lanes > plan.slice) plan.lanes = plan.slice;
    plan.batches = ceil_div(plan.slice, plan.lanes);
    plan.threads = ceil_div(plan.lanes * plan.columns, 32) * 32;
    int32_t warps = plan.threads / 32;
    plan.slots = plan.lanes * (plan.per_channel ? per_group : (per_group + 6) / 8 + 1);
    plan.warps_a_group = warps > plan.tile_groups ? warps / plan.tile_groups : 1;
    plan.shared = size_t(plan.tile_groups) * ((plan.slots + plan.warps_a_group) * kRecord + 2 * sizeof(float));
    plan.by_columns = inverse(plan.columns);
    plan.by_group = inverse(per_group);
    plan.by_warps = inverse(plan.warps_a_group);
}

// The plan of one launch, of `slices` blocks in a cluster and tiles of at least `bytes`: usually two sectors of 32, so that
// few are read by two blocks.
inline Plan plan_one_launch(const Shape& shape, int32_t slices, int32_t bytes = 64) {
    Plan plan;
    plan.path = Path::kOneLaunch;
    plan.pitch = ceil_div(shape.channels, 8) * 8;
    plan.slices = slices;
    set_tile(plan, shape, bytes);
    if (plan.lanes) set_block(plan, shape);
    return plan;
}

inline Plan plan_two_launches(const Shape& shape) {
    Plan plan;
    plan.path = Path::kTwoLaunches;
    plan.pitch = ceil_div(shape.channels, 8) * 8;
    set_tile(plan, shape, 128);  // a whole line
    if (!plan.lanes) return plan;
    int32_t wanted = ceil_div(kBlocks, plan.tiles * shape.batch), most = ceil_div(shape.positions, plan.lanes);
    plan.slices = wanted < kSlices ? wanted : kSlices;
    if (plan.slices > most) plan.slices = most;
    set_block(plan, shape);
    plan.workspace = size_t(shape.batch) * shape.groups * plan.slices * kRecord;
    return plan;
}

inline Plan plan_linear(const Shape& shape) {
    Plan plan;
    plan.path = Path::kLinear;
    plan.tile_groups = plan.slices = 1;
    plan.tiles = shape.groups;
    plan.threads = plan.slots = kLinearThreads;
    plan.warps_a_group = plan.threads / 32;
    plan.by_warps = inverse(plan.warps_a_group);
    plan.shared = (plan.slots + plan.warps_a_group) * kRecord + 2 * sizeof(float);
    return plan;
}

// How often a large GPU is filled.
constexpr int32_t plan_turns(const Plan& plan, int32_t batch) {
    int32_t large = plan.slices > 8 ? 1 : kClustersAtOnce[plan.slices - 1];
    return ceil_div(plan.tiles * batch, plan.batches <= 2 ? 2 * large : large);
}

// The plan for a GPU whose clusters have up to `max_cluster` blocks (1 where it knows none).
//
// force: 0 chooses; a positive number is the cluster of one launch; -1 are two launches. A plan that cannot be
// done has the path kNone.
inline Plan make_plan(const Shape& shape, int32_t max_cluster, int32_t force = 0) {
    Plan none;
    if (shape.batch < 1 || shape.channels < 1 || shape.positions < 1 || shape.groups < 1) return none;
    if (shape.channels % shape.groups || shape.batch > 65535 || shape.groups > 65535) return none;
    if (int64_t(shape.channels + 8) * shape.positions > INT32_MAX) return none;  // of one sample
    if (!shape.channels_last) return plan_linear(shape);
    if (!shape.half && shape.channels % 8) return none;
    int32_t most = shape.half ? kBatchesHalf : kBatchesFloat;
    Plan chosen;
    for (int32_t slices = 1; slices <= max_cluster && slices <= shape.positions && force >= 0; slices *= 2) {
        Plan plan = plan_one_launch(shape, slices);
        if (!plan.lanes) return none;  // a tile has more vectors than a block has threads
        if (plan.batches > most || (force && slices != force)) continue;
        chosen = plan;
        // Two vectors a thread are soon done; more are worth the wait for other blocks of the cluster.
        if (plan.batches <= 2) break;
    }
    // A last few clusters that find no place take as long as all the others: better fewer blocks with more each.
    auto late = [&] { return chosen.path != Path::kNone && plan_turns(chosen, shape.batch) == 2 && !force; };
    for (int32_t slices : {6, 5, 3}) {
        if (slices > max_cluster || slices > shape.positions || (!late() && force != slices)) continue;
        Plan plan = force ? plan_one_launch(shape, slices) : plan_one_launch(shape, slices, 128);
        if (plan.batches <= most && (force || plan_turns(plan, shape.batch) == 1)) chosen = plan;
    }
    // Tiles of half a line are slow to read where there are few blocks; then the map is rather read twice.
    if (late() && chosen.batches > 2 && chosen.tile * (shape.half ? 2 : 4) < 128) chosen = none;
    if (chosen.path != Path::kNone || force > 0) return chosen;
    chosen = plan_two_launches(shape);
    return chosen.lanes ? chosen : none;
}

}  // namespace canny
