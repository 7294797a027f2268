// Where a block's threads are in a ring of places that one side fills and the other empties.
#pragma once

#include "hopper.cuh"

namespace canny {

// A ring of places in shared memory that one side fills and the other empties: where this side is.
struct ConvRing {
    uint32_t begin, end, full;  // barriers of full places, 8 bytes each; behind all of them those of empty ones
    uint32_t base, place, bytes;
    uint32_t parity = 0;

    __device__ __forceinline__ ConvRing(uint32_t barriers, int32_t places, uint32_t base, uint32_t bytes)
        : begin(barriers), end(barriers + 8 * places), full(barriers), base(base), place(base), bytes(bytes) {}

    __device__ __forceinline__ void begin_barriers(uint32_t fillers, uint32_t emptiers) const {
        for (uint32_t at = begin; at < end; at += 8) {
            barrier_begin(at, fillers);
            barrier_begin(at + end - begin, emptiers);
        }
    }

    __device__ __forceinline__ uint32_t empty() const { return full + end - begin; }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full, parity); }
    __device__ __forceinline__ bool is_full() const { return barrier_ended(full, parity); }
    __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity ^ 1); }  // at once the first time

    __device__ __forceinline__ void next_if(bool goes) {
        full += goes ? 8 : 0, place += goes ? bytes : 0;
        bool over = full == end;
        full = over ? begin : full, place = over ? base : place, parity ^= uint32_t(over);
    }

    __device__ __forceinline__ void next() { next_if(true); }
};

}  // namespace canny
