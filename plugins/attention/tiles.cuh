// The keys and values of a head in the shared memory of a block, on compute capability 9.0: tile after tile in a ring.
//
// A thread has them copied, others read them; barriers tell who waits for whom. Of keys and of values there is a place each
// for so many tiles, and a barrier for when it is full, and one for when nobody reads it any more.
#pragma once

#include "kernel.cuh"
#include "wgmma.cuh"

namespace canny {

constexpr int32_t kHopperGroup = 128, kHopperMostGroups = 3, kHopperMostSplits = 8;  // threads, warpgroups, cluster
constexpr int32_t kHopperPlaces = 4;    // of tiles in shared memory, a power of two
constexpr int32_t kHopperAlign = 1024;  // the swizzle's

// What a kernel is given.
struct HopperWork {
    HeadMap k, v;
    CannyAttention call;
    int32_t groups, splits;      // warpgroups of a block, blocks of a cluster
    int32_t tiles, share, rest;  // of keys; a block has `share`, the first `rest` blocks one more
    uint32_t by_heads;           // their inverse
};

template <int D, int kKeys>
struct HopperTiles {
    static constexpr int kBoxes = (D + 63) / 64, kBox = kKeys * 64, kTile = kBox * kBoxes;
    static constexpr int kBytes = kHopperPlaces * (2 * kTile * 2 + 4 * 8);  // of places and barriers

    const HopperWork& work;
    const CannyAttention& p;
    char* memory;
    int32_t rank, first, turns;  // in the cluster; this block's tiles
    int32_t batch, head, first_query;

    __device__ __forceinline__ explicit HopperTiles(const HopperWork& given) : work(given), p(given.call) {
        memory = shared_memory() + (0u - shared_address(shared_memory())) % kHopperAlign;
        rank = blockIdx.x;
        first = rank * work.share + min(rank, work.rest);
        turns = work.share + (rank < work.rest);
        first_query = blockIdx.y * work.groups * 64;
        batch = divide(blockIdx.z, work.by_heads);
        head = blockIdx.z - batch * p.heads;
    }

    static __device__ __forceinline__ uint32_t place(int32_t turn) { return turn & (kHopperPlaces - 1); }
    static __device__ __forceinline__ uint32_t parity(int32_t turn) { return turn / kHopperPlaces & 1; }

    // Addresses: places of keys, of values, barriers of full places of keys, of empty ones, and both of values.
    __device__ __forceinline__ uint32_t keys_of(int32_t turn) const {
        return shared_address(memory) + place(turn) * kTile * 2;
    }
    __device__ __forceinline__ uint32_t values_of(int32_t turn) const {
        return keys_of(turn) + kHopperPlaces * kTile * 2;
    }
    __device__ __forceinline__ uint32_t keys_full(int32_t turn) const {
        return shared_address(memory) + kHopperPlaces * kTile * 4 + place(turn) * 8;
    }
    __device__ __forceinline__ uint32_t values_full(int32_t turn) const { return keys_full(turn) + kHopperPlaces * 16; }
    static __device__ __forceinline__ uint32_t empty(uint32_t full) { return full + kHopperPlaces * 8; }

    __device__ __forceinline__ void begin_barriers() const {
        for (int32_t i = 0; i < kHopperPlaces; i++) {
            barrier_begin(keys_full(i), 1), barrier_begin(empty(keys_full(i)), 4 * work.groups);
            barrier_begin(values_full(i), 1), barrier_begin(empty(values_full(i)), 4 * work.groups);
        }
        barriers_begun();
    }

    // One thread: have a tile copied as soon as nobody reads any more what was in its place.
    __device__ __forceinline__ void copy(const HeadMap& map, uint32_t to, uint32_t full, int32_t turn) const {
        if (turn >= kHopperPlaces) barrier_wait(empty(full), parity(turn) ^ 1);
        barrier_expect(full, kTile * 2);
#pragma unroll
        for (int32_t i = 0; i < kBoxes; i++)
            copy_head(to + i * kBox * 2, map, batch, (first + turn) * kKeys, head, i * 64, full);
    }

    __device__ __forceinline__ void copy_all() const {
        for (int32_t turn = 0; turn < turns; turn++) {
            copy(work.k, keys_of(turn), keys_full(turn), turn);
            copy(work.v, values_of(turn), values_full(turn), turn);
        }
    }

    // A warp is done with a tile.
    __device__ __forceinline__ void release(uint32_t full) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty(full));
    }
};

}  // namespace canny
