// plugins/attention/mma.cuh for a CPU.
#pragma once

#include "kernel_emulator.hpp"

namespace canny {

inline uint32_t pack(float low, float high) {
    __half both[2] = {__half(low), __half(high)};
    uint32_t packed;
    std::memcpy(&packed, both, sizeof packed);
    return packed;
}

inline float unpack(uint32_t packed, int which) {
    __half both[2];
    std::memcpy(both, &packed, sizeof packed);
    return float(both[which]);
}

template <int kGroups>
void group_sync(int32_t group, int32_t threads) {
    if (group >= kGroups) return;
    emulator::Barrier& barrier = emulator::current->block->groups[group];
    barrier.size = threads;
    emulator::meet(barrier);
}

// Rows of kCount matrices by address, one from each thread; `get(rows, lane)` is what a thread gets of each matrix.
template <int kCount, typename Get>
void load_by_warp(uint32_t (&r)[kCount], const __half* row, Get get) {
    emulator::Block& block = *emulator::current->block;
    unsigned me = emulator::current->thread, first = me / 32 * 32;
    block.rows[me] = row;
    emulator::meet(block.warps[me / 32]);
    for (int j = 0; j < kCount; j++) r[j] = get([&](int i) { return block.rows[first + 8 * j + i]; }, int(me % 32));
    emulator::meet(block.warps[me / 32]);
}

inline void load_matrices(uint32_t (&r)[4], const __half* row) {
    load_by_warp(r, row, [](auto rows, int lane) {
        const __half* two = rows(lane / 4) + lane % 4 * 2;
        return pack(float(two[0]), float(two[1]));
    });
}

template <int kCount>
void load_transposed(uint32_t (&r)[kCount], const __half* row) {
    load_by_warp(r, row, [](auto rows, int lane) {
        int first = lane % 4 * 2;
        return pack(float(rows(first)[lane / 4]), float(rows(first + 1)[lane / 4]));
    });
}

// The product over `depth` columns of a.
inline void multiply(float (&c)[4], const std::array<uint32_t, 6>& mine, unsigned depth) {
    emulator::Block& block = *emulator::current->block;
    unsigned me = emulator::current->thread, first = me / 32 * 32, lane = me % 32;
    block.fragments[me] = mine;
    emulator::meet(block.warps[me / 32]);
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < depth; k++) {
            const auto& left = block.fragments[first + row * 4 + k % 8 / 2];
            const auto& right = block.fragments[first + column * 4 + k % 8 / 2];
            c[i] += unpack(left[i / 2 + k / 8 * 2], k % 2) * unpack(right[4 + k / 8], k % 2);
        }
    }
    emulator::meet(block.warps[me / 32]);
}

inline void multiply(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    multiply(c, {a[0], a[1], a[2], a[3], b0, b1}, 16);
}

inline void multiply(float (&c)[4], const uint32_t* a, uint32_t b) { multiply(c, {a[0], a[1], 0, 0, b, 0}, 8); }

inline void copy_16(void* to, const void* from, bool there) {
    if (!emulator::current->waited) emulator::fault = "a copy of what the kernel before may still write";
    emulator::current->copies.back().push_back({to, there ? from : nullptr});
}

inline void copies_commit() { emulator::current->copies.emplace_back(); }

// Copies come as late as they may.
template <int kLeft>
void copies_wait() {
    auto& groups = emulator::current->copies;
    while (groups.size() > kLeft + 1) {
        for (const emulator::Copy& copy : groups.front()) {
            if (copy.from)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace canny
