// A tile of a convolution once it is summed up: LayerNorm, bias, residual and gate, and to memory.
//
// It goes by pieces: 16 rows, which are a warp's, and the filters that make 32 numbers of y. Blocks that share a tile each
// finish some of its pieces. What the others have of them they write to that block's shared memory, in the order of their
// own registers, so that a warp which finishes a piece reads it as if the sums had been its own.
#pragma once

#include "plan.h"

#include "hopper.cuh"

namespace canny {

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
struct ConvTile {
    static constexpr int kHigh = 64 * kGroups, kSums = kWide / 2, kWarps = 4 * kGroups;
    static constexpr bool kAsksEarly = kWide <= kConvNarrow;  // for residuals; wider tiles have no registers for it
    static constexpr int kHeld = kAsksEarly ? kWide / 32 : 1;  // pieces of a warp whose residual is in registers

    const ConvParams& p;
    char* memory;
    float *constants, *parts;  // biases and sums of weights; what other blocks have of this one's pieces
    int32_t first_row, first_filter, rank;

    __device__ __forceinline__ explicit ConvTile(const ConvParams& params) : p(params) {
        memory = shared_memory() + (0u - shared_address(shared_memory())) % kConvAlign;
        rank = blockIdx.x;
        first_filter = blockIdx.y * kWide;
        first_row = blockIdx.z * kHigh;
    }

    // Sums of x and x² of a thread's part of its two rows, lane / 4 and that plus 8 of its warp's.
    struct Moments {
        float x[2] = {}, squares[2] = {};

        __device__ __forceinline__ void add(const uint32_t (&a)[4][4]) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float value = to_float(reinterpret_cast<const __half*>(&a[i / 8][i / 2 % 4])[i % 2]);
                x[i / 2 % 2] += value, squares[i / 2 % 2] += value * value;
            }
        }

        // With those of the three other lanes that have the same rows.
        __device__ __forceinline__ void join() {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& sum = i < 2 ? x[i] : squares[i - 2];
                for (int mask = 1; mask <= 2; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            }
        }
    };

    // Have biases, and sums of weights, at hand.
    __device__ __forceinline__ void load_constants() const {
        for (int32_t i = threadIdx.x; i < kWide; i += 32 * kWarps) {
            constants[i] = p.call.bias[first_filter + i];
            if constexpr (kNorm) constants[kWide + i] = p.call.weight_sums[first_filter + i];
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

    // A lane's part of a piece: its first row, the other being 8 below, and its first column of y.
    struct Place {
        int32_t row, column;
    };

    __device__ __forceinline__ Place place_of(int32_t slab, int32_t section) const {
        int32_t lane = threadIdx.x % 32;
        return {first_row + slab * 16 + lane / 4, (first_filter >> p.call.gate) + section * 32 + lane % 4 * 8};
    }

    // The piece that is number `slot` of this block's, or of this warp's where no other block shares the tile.
    __device__ __forceinline__ Place place_in_turn(int32_t slot) const {
        if (p.cluster == 1) return place_of(threadIdx.x / 32, slot);
        int32_t piece = (threadIdx.x / 32 + slot * kWarps) * p.cluster + rank;
        return place_of(piece % kWarps, piece / kWarps);
    }

    using Residual = uint32_t[2][4];

    __device__ __forceinline__ void ask(Residual& residual, const Place& to) const {
        const CannyConv& c = p.call;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int32_t row = to.row + 8 * i, lines = c.residual_batch * p.out_height * p.out_width;
            for (uint32_t& word : residual[i]) word = 0;
            if (!c.residual || row >= p.rows || to.column >= (first_filter + kWide) >> c.gate) continue;
            int64_t from = int64_t(row - conv_divide(row, p.by_residual) * lines) * c.filters + to.column;
            load_words(residual[i], static_cast<const __half*>(c.residual) + from);
        }
    }

    __device__ __forceinline__ void ask_first(Residual (&residuals)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kHeld; i++) ask(residuals[i], place_in_turn(i));
    }

    // Two sums of a thread, of those in `sums` from `at` on, with LayerNorm and bias, of this filter of the tile and the next.
    template <int kCount>
    __device__ __forceinline__ float2 made(const float (&sums)[kCount], int at, const Norm& norm, int32_t filter) const {
        float2 bias = *reinterpret_cast<const float2*>(constants + filter), y = make_float2(sums[at], sums[at + 1]);
        if constexpr (kNorm) {
            float2 of_filters = *reinterpret_cast<const float2*>(constants + kWide + filter);
            y.x = norm.by * (y.x - norm.mean * of_filters.x), y.y = norm.by * (y.y - norm.mean * of_filters.y);
        }
        return make_float2(y.x + bias.x, y.y + bias.y);
    }

    // Store a piece of the sums from `begin` on, kGate: as a · GELU(b). A lane has two of every eight filters, and four
    // lanes swap theirs, so that each has eight side by side, and all of them 64 bytes.
    template <int kGate, int kCount>
    __device__ __forceinline__ void finish(
        const float (&sums)[kCount], int begin, const Moments& moments, const Place& to, Residual& residual
    ) const {
        int32_t first = ((to.column - (first_filter >> kGate)) / 32 * 32 << kGate) + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Norm norm;
            if constexpr (kNorm) norm = norm_of(moments.x[i], moments.squares[i]);
            uint32_t(&words)[4] = residual[i];
            if (!kGate && p.call.residual) swap_words(words);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int eight = k << kGate, at = begin + eight * 4 + i * 2;
                const __half* more = reinterpret_cast<const __half*>(&words[k]);
                float2 y = made(sums, at, norm, first + eight * 8);
                if constexpr (kGate) {
                    float2 b = made(sums, at + 4, norm, first + eight * 8 + 8);
                    words[k] = pack(y.x * gelu(b.x), y.y * gelu(b.y));
                } else {
                    words[k] = pack(y.x + to_float(more[0]), y.y + to_float(more[1]));
                }
            }
            swap_words(words);
            int64_t line = int64_t(to.row + 8 * i) * (p.call.filters >> kGate);
            if (to.row + 8 * i < p.rows) store_words(words, static_cast<__half*>(p.call.y) + line + to.column);
        }
    }

    // Store the warp's pieces of its own sums.
    template <int kGate>
    __device__ __forceinline__ void
    store_own(const float (&sums)[kSums], const Moments& moments, Residual (&residuals)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kWide / 32 >> kGate; i++) {
            Place to = place_in_turn(i);
            if constexpr (!kAsksEarly) ask(residuals[0], to);
            finish<kGate>(sums, i * (16 << kGate), moments, to, residuals[kAsksEarly ? i : 0]);
        }
    }

    // Floats of what a block has of a piece, for all lanes: four for each eight filters, and the moments.
    template <int kGate>
    static constexpr int kPart = conv_part(kGate, kNorm) / int(sizeof(float));

    // Write the sums, which are in registers, to the blocks that finish their pieces.
    template <int kGate>
    __device__ __forceinline__ void give(const float (&sums)[kSums], const Moments& moments) const {
        int32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < kWide / 32 >> kGate; t++) {
            int32_t piece = t * kWarps + threadIdx.x / 32, slot = conv_divide(piece, p.by_cluster);
            const float* place = parts + (slot * p.cluster + rank) * kPart<kGate> + lane * 4;
            uint32_t to = cluster_address(place, piece - slot * p.cluster);
#pragma unroll
            for (int j = 0; j < 4 << kGate; j++) {
                const float* four = sums + (t * (4 << kGate) + j) * 4;
                cluster_write_4(to + j * 512, four[0], four[1], four[2], four[3]);
            }
            if constexpr (kNorm)
                cluster_write_4(
                    to + (4 << kGate) * 512, moments.x[0], moments.squares[0], moments.x[1], moments.squares[1]
                );
        }
    }

    // Add up what all blocks have of this warp's pieces, always in the same order, and store them.
    template <int kGate>
    __device__ __forceinline__ void store_given(Residual (&residuals)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < ((kWide / 32 >> kGate) + 1) / 2; i++) {  // as many as two blocks have each
            int32_t slot = threadIdx.x / 32 + i * kWarps;
            if (slot * p.cluster + rank >= (kWide / 32 >> kGate) * kWarps) return;
            const float4* part = reinterpret_cast<const float4*>(parts + slot * p.cluster * kPart<kGate>) +
                                 threadIdx.x % 32;
            float sums[16 << kGate] = {};
            Moments moments;
#pragma unroll 2
            for (int32_t other = 0; other < p.cluster; other++, part += kPart<kGate> / 4) {
#pragma unroll
                for (int j = 0; j < 4 << kGate; j++) {
                    float4 four = part[j * 32];
                    sums[4 * j] += four.x, sums[4 * j + 1] += four.y, sums[4 * j + 2] += four.z, sums[4 * j + 3] += four.w;
                }
                if constexpr (!kNorm) continue;
                float4 four = part[(4 << kGate) * 32];
                moments.x[0] += four.x, moments.squares[0] += four.y, moments.x[1] += four.z, moments.squares[1] += four.w;
            }
            Place to = place_in_turn(i);
            if constexpr (!kAsksEarly) ask(residuals[0], to);
            finish<kGate>(sums, 0, moments, to, residuals[kAsksEarly ? i : 0]);
        }
    }
};

}  // namespace canny
