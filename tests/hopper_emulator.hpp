// plugins/conv/hopper.cuh for a CPU: products of warpgroups, barriers in shared memory and copies in the background.
//
// Both are done as late as they may: products when they are waited for, of the registers and the memory as they are
// then; copies when nothing else can go on, in other orders of threads at once or at random.
#pragma once

#include "mma_emulator.hpp"

namespace emulator {

constexpr uint32_t kSharedBegins = 1040;  // shared memory begins at no multiple of what matrices want

inline unsigned char* shared_at(Block& block, uint32_t address) {
    return block.shared.data() + address - kSharedBegins;
}

inline void wrong(const char* what) {
    if (fault.empty()) fault = what;
}

inline void settle(Phases& one) {
    if (one.pending || one.bytes) return;
    one.pending = one.count;
    one.barrier.generation++;
}

inline void arrive(Phases& one) {
    if (!one.pending) return wrong("more arrive at a barrier than it was begun for");
    one.pending--;
    settle(one);
}

inline Phases& phases_at(Block& block, uint32_t address) {
    Phases& one = block.phases[address];
    if (!one.count) wrong("a barrier that was not begun");
    return one;
}

inline float half_of(uint32_t packed, int which) {
    __half both[2];
    std::memcpy(both, &packed, sizeof packed);
    return float(both[which]);
}

// Element (column, k) of a matrix by its descriptor, k below 16. rows: a k has its columns side by side, 64 of them,
// the next 64 the descriptor's first distance further; else a column has its k so. The second distance is to eight rows
// on.
inline float element(Block& block, uint64_t descriptor, uint32_t column, uint32_t k, bool rows) {
    uint32_t begin = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t mode = uint32_t(descriptor >> 62), shifted = uint32_t(descriptor >> 49 & 7);
    if (mode != 1 || shifted) wrong("a matrix that is not swizzled by 128 bytes");
    if (begin % 1024 >= (rows ? 1 : 128)) wrong("a matrix that does not begin at a multiple of 1024");
    uint32_t row = rows ? k : column, along = rows ? column % 64 : k;
    uint32_t address = begin + row / 8 * eight_rows + row % 8 * 128 + along * 2;
    if (rows) address += column / 64 * (uint32_t(descriptor >> 16 & 0x3fff) << 4);
    address ^= (address >> 7 & 7) << 4;
    if (address < kSharedBegins || address + 2 > kSharedBegins + block.shared.size()) {
        wrong("a matrix outside of the shared memory");
        return NAN;
    }
    __half value;
    std::memcpy(&value, shared_at(block, address), sizeof value);
    return float(value);
}

// This thread's part of product number `which` of its oldest group, of the fragments of its whole warp.
inline void multiply(Block& block, size_t which) {
    unsigned lane = current->thread % 32;
    size_t warp = (&block - blocks.data()) * blockDim.x + current->thread / 32 * 32;
    Product& mine = current->products.front()[which];
    for (int j = 0; j < mine.count; j++) {
        if (!mine.adds) mine.sums[j] = 0.f;
        unsigned high = j / 2 % 2, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
        for (unsigned k = 0; k < 16; k++) {
            const Product& theirs = fibers[warp + lane / 4 * 4 + k % 8 / 2]->products.front()[which];
            mine.sums[j] += half_of(theirs.a[high + k / 8 * 2], k % 2) * element(block, mine.b, column, k, mine.rows);
        }
    }
}

}  // namespace emulator

namespace canny {

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - shared_memory()) + emulator::kSharedBegins;
}

inline void barrier_begin(uint32_t barrier, uint32_t count) {
    emulator::current->block->phases[barrier] = {{}, count, count, 0, false};
}

inline void barriers_begun() {
    for (auto& one : emulator::current->block->phases) one.second.seen = true;
}

inline void barrier_arrive(uint32_t barrier) {
    emulator::arrive(emulator::phases_at(*emulator::current->block, barrier));
}

inline void barrier_arrive_if(bool does, uint32_t barrier) {
    if (does) barrier_arrive(barrier);
}

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    emulator::Phases& one = emulator::phases_at(*emulator::current->block, barrier);
    one.bytes += bytes;
    emulator::arrive(one);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    emulator::Phases& one = emulator::phases_at(*emulator::current->block, barrier);
    while (one.count && (one.barrier.generation & 1) == parity) emulator::wait(one.barrier, one.barrier.generation);
}

inline bool barrier_ended(uint32_t barrier, uint32_t parity) {
    const emulator::Phases& one = emulator::phases_at(*emulator::current->block, barrier);
    return (one.barrier.generation & 1) != parity;
}

inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
    emulator::Block& block = *emulator::current->block;
    bool inside = row >= emulator::kSharedBegins && row + 16 <= emulator::kSharedBegins + block.shared.size();
    if (!inside) emulator::wrong("a row outside of the shared memory"), row = emulator::kSharedBegins;
    load_matrices(r, reinterpret_cast<const __half*>(emulator::shared_at(block, row)));
}

inline void hold(uint32_t&) {}

inline uint32_t uniform(uint32_t number) { return number; }

inline void copy_block(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    emulator::Block& block = *emulator::current->block;
    emulator::Phases& one = emulator::phases_at(block, barrier);
    if (!one.seen) emulator::wrong("a barrier that copies do not see yet");
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) emulator::wrong("a copy of no whole vectors");
    emulator::later([&block, &one, to, from, bytes] {
        std::memcpy(emulator::shared_at(block, to), from, bytes);
        one.bytes -= bytes;
        emulator::settle(one);
    });
}

struct ConvMap {
    const __half* x;
    int32_t rows, channels, high;
};

inline bool describe(ConvMap& map, const void* x, int32_t rows, int32_t channels, int32_t high) {
    map = {static_cast<const __half*>(x), rows, channels, high};
    return high > 0 && high <= 256 && channels % 8 == 0;
}

struct HeadMap {
    const __half* x;
    int32_t batch, rows, heads, width, stride, high;
};

inline bool describe_heads(
    HeadMap& map, const void* x, int32_t batch, int32_t rows, int32_t heads, int32_t width, int32_t stride, int32_t high
) {
    map = {static_cast<const __half*>(x), batch, rows, heads, width, stride, high};
    return high > 0 && high <= 256 && width % 8 == 0 && stride % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

template <typename Map>
void expect_rows(const Map&) {}

// Begin to copy `high` rows of 64 channels; `get(i, at)` is where the eight from `at` on of row i are, null for zeros.
template <typename Get>
void copy_swizzled(uint32_t to, int32_t high, uint32_t barrier, Get get) {
    emulator::Block& block = *emulator::current->block;
    emulator::Phases& one = emulator::phases_at(block, barrier);
    if (!one.seen) emulator::wrong("a barrier that copies do not see yet");
    if (to % 1024) emulator::wrong("rows that do not begin at a multiple of 1024");
    emulator::later([&block, &one, to, high, get] {
        for (int32_t at = 0; at < high * 64; at += 8) {
            uint32_t address = to + 2 * at;
            unsigned char* place = emulator::shared_at(block, address ^ (address >> 7 & 7) << 4);
            const __half* from = get(at / 64, at % 64);
            if (from) std::memcpy(place, from, 16);
            else std::memset(place, 0, 16);
        }
        one.bytes -= high * 128;
        emulator::settle(one);
    });
}

inline void has_waited() {
    if (!emulator::current->waited) emulator::wrong("a copy of what the kernel before may still write");
}

inline void copy_rows_early(uint32_t to, const ConvMap& map, int32_t row, int32_t channel, uint32_t barrier) {
    copy_swizzled(to, map.high, barrier, [map, row, channel](int32_t i, int32_t at) {
        bool there = row + i >= 0 && row + i < map.rows && channel + at < map.channels;
        return there ? map.x + int64_t(row + i) * map.channels + channel + at : nullptr;
    });
}

inline void copy_rows(uint32_t to, const ConvMap& map, int32_t row, int32_t channel, uint32_t barrier) {
    has_waited();
    copy_rows_early(to, map, row, channel, barrier);
}

inline void copy_head(
    uint32_t to, const HeadMap& map, int32_t batch, int32_t row, int32_t head, int32_t channel, uint32_t barrier
) {
    has_waited();
    copy_swizzled(to, map.high, barrier, [=](int32_t i, int32_t at) {
        bool there = batch < map.batch && head < map.heads && row + i < map.rows && channel + at < map.width;
        int64_t line = int64_t(batch) * map.rows + row + i;
        return there ? map.x + line * map.stride + head * map.width + channel + at : nullptr;
    });
}

inline void products_begin() { emulator::current->fenced = true; }

inline void products_commit() {
    emulator::current->products.emplace_back();
    emulator::current->fenced = false;
}

template <int kCount>
void multiply_group(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, bool add = true) {
    if (!emulator::current->fenced) emulator::wrong("a product without a fence before it");
    emulator::current->products.back().push_back({c, kCount, a, b});
    emulator::current->products.back().back().adds = add;
}

template <int kCount>
void multiply_rows(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b, bool add = true) {
    multiply_group(c, a, b, add);
    emulator::current->products.back().back().rows = true;
}

template <int kLeft>
void products_wait() {
    emulator::Block& block = *emulator::current->block;
    emulator::Barrier& warp = block.warps[emulator::current->thread / 32];
    auto& groups = emulator::current->products;
    while (groups.size() > kLeft + 1) {
        emulator::meet(warp);  // a warp's registers are not changed before all of it is here
        for (size_t i = 0; i < groups.front().size(); i++) emulator::multiply(block, i);
        emulator::meet(warp);
        groups.erase(groups.begin());
    }
}

template <int kCount>
void products_done(float (&)[kCount]) {}

template <int kSteps>
void products_hold(uint32_t (&)[kSteps][4]) {}

template <int kCount>
void registers_less() {}

template <int kCount>
void registers_more() {}

inline float4 cluster_read_4(const float* mine, int rank) {
    float4 value;
    emulator::Block& theirs = emulator::blocks[rank];
    std::memcpy(&value, emulator::shared_at(theirs, shared_address(mine)), sizeof value);
    return value;
}

inline float2 cluster_read_2(const float* mine, int rank) {
    return {cluster_read(mine, rank), cluster_read(mine + 1, rank)};
}

// Which block of the cluster, and where in its shared memory.
inline uint32_t cluster_address(const float* mine, int rank) { return shared_address(mine) | uint32_t(rank) << 24; }

inline void cluster_write_4(uint32_t theirs, float x, float y, float z, float w) {
    float4 value{x, y, z, w};
    if (theirs % 16) emulator::wrong("a vector that does not begin at a multiple of 16");
    if (!emulator::cluster.generation) emulator::wrong("a write to a block that may not have begun");
    emulator::Block& block = emulator::blocks[theirs >> 24];
    std::memcpy(emulator::shared_at(block, theirs & 0xffffff), &value, sizeof value);
}

}  // namespace canny
