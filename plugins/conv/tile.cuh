// A tile of a convolution once it is summed up: LayerNorm, bias, residual and gate, and to memory.
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
    static constexpr int kHigh = 64 * kGroups, kSums = kWide / 2, kSumsPitch = kWide + 8;  // pitch: no bank conflicts
    static constexpr int kVectors = kWide / 8;                                             // pieces of a row
    static constexpr bool kGates = conv_gates(kGroups, kWide);

    const ConvParams& p;
    char* memory;
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
            for (int i = 0; i < (kNorm ? 32 : 0); i++) {
                float value = to_float(reinterpret_cast<const __half*>(&a[i / 8][i / 2 % 4])[i % 2]);
                x[i / 2 % 2] += value, squares[i / 2 % 2] += value * value;
            }
        }

        // With those of the three other lanes that have the same rows.
        __device__ __forceinline__ void join() {
#pragma unroll
            for (int i = 0; i < (kNorm ? 4 : 0); i++) {
                float& sum = i < 2 ? x[i] : squares[i - 2];
                for (int mask = 1; mask <= 2; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            }
        }
    };

    // The moments go to where a row has no sums.
    __device__ __forceinline__ void lay_out(const float (&sums)[kSums], const Moments& moments) const {
        int32_t lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
        float* to = reinterpret_cast<float*>(memory) + row * kSumsPitch + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kSums; i += 2)
            *reinterpret_cast<float2*>(to + i / 2 % 2 * 8 * kSumsPitch + i / 4 * 8) = make_float2(sums[i], sums[i + 1]);
#pragma unroll
        for (int i = 0; i < (kNorm ? 2 : 0); i++) {
            to = reinterpret_cast<float*>(memory) + (row + 8 * i) * kSumsPitch + kWide;
            if (lane % 4 == 0) *reinterpret_cast<float2*>(to) = make_float2(moments.x[i], moments.squares[i]);
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

    // Which line of the residual a row has added.
    __device__ __forceinline__ int32_t residual_row(int32_t row) const {
        return row - conv_divide(row, p.by_residual) * p.call.residual_batch * p.out_height * p.out_width;
    }

    // Two sums of a thread, of those in `sums` from `at` on, with LayerNorm and bias; their filter is the first of both.
    __device__ __forceinline__ float2 made(const float (&sums)[kSums], int at, const Norm& norm, int32_t filter) const {
        float2 bias = *reinterpret_cast<const float2*>(p.call.bias + filter), y = make_float2(sums[at], sums[at + 1]);
        if constexpr (kNorm) {
            float2 of_filters = *reinterpret_cast<const float2*>(p.call.weight_sums + filter);
            y.x = norm.by * (y.x - norm.mean * of_filters.x), y.y = norm.by * (y.y - norm.mean * of_filters.y);
        }
        return make_float2(y.x + bias.x, y.y + bias.y);
    }

    // Store the sums from the registers that they are in, kGate: as a · GELU(b). A lane has two of every eight filters, and
    // four lanes swap theirs, so that each has eight side by side, and all of them 64 bytes.
    template <int kGate>
    __device__ __forceinline__ void store_own(const float (&sums)[kSums], const Moments& moments) const {
        const CannyConv& c = p.call;
        int32_t lane = threadIdx.x % 32, first = first_row + threadIdx.x / 32 * 16 + lane / 4;
        Norm norms[2];
        if constexpr (kNorm)
            for (int i = 0; i < 2; i++) norms[i] = norm_of(moments.x[i], moments.squares[i]);
#pragma unroll
        for (int i = 0; i < kSums / 8 >> kGate; i++) {
            int32_t row = first + i % 2 * 8, column = (first_filter >> kGate) + i / 2 * 32 + lane % 4 * 8;
            uint32_t words[4] = {};
            if (!kGate && c.residual) {
                int64_t from = int64_t(residual_row(row)) * c.filters + column;
                if (row < p.rows) load_words(words, static_cast<const __half*>(c.residual) + from);
                swap_words(words);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int eight = (i / 2 * 4 + k) << kGate, at = eight * 4 + i % 2 * 2;
                int32_t filter = first_filter + eight * 8 + lane % 4 * 2;
                const __half* more = reinterpret_cast<const __half*>(&words[k]);
                float2 y = made(sums, at, norms[i % 2], filter);
                if constexpr (kGate) {
                    float2 b = made(sums, at + 4, norms[i % 2], filter + 8);
                    words[k] = pack(y.x * gelu(b.x), y.y * gelu(b.y));
                } else {
                    words[k] = pack(y.x + to_float(more[0]), y.y + to_float(more[1]));
                }
            }
            swap_words(words);
            if (row < p.rows) store_words(words, static_cast<__half*>(c.y) + int64_t(row) * (c.filters >> kGate) + column);
        }
    }

    // Eight filters of a row, which a thread stores: this is number `at` of the tile, with its bias and residual, which
    // are asked for before the sums are there.
    struct Piece {
        int32_t at;
        Vector<float> bias, weight_sums;
        Vector<__half> residual;
    };

    __device__ __forceinline__ void ask(Piece& piece, int32_t at) const {
        const CannyConv& c = p.call;
        int32_t row = first_row + at / kVectors, filter = first_filter + at % kVectors * 8;
        piece.at = at;
        if (at >= kHigh * kVectors || row >= p.rows) return;
        piece.bias.load(c.bias + filter);
        if constexpr (kNorm) piece.weight_sums.load(c.weight_sums + filter);
        if (!c.residual) return;
        piece.residual.load(static_cast<const __half*>(c.residual) + int64_t(residual_row(row)) * c.filters + filter);
    }

    __device__ __forceinline__ Piece first_piece() const {
        Piece piece;
        ask(piece, (rank * blockDim.x + threadIdx.x) << p.call.gate);
        return piece;
    }

    // Add up this block's share of the tile over the cluster, with bias, residual and gate, and store it.
    __device__ __forceinline__ void store(Piece& next) const {
        int32_t count = (p.rows - first_row < kHigh ? p.rows - first_row : kHigh) * kVectors;
        int32_t gate = kGates ? p.call.gate : 0, step = p.cluster * blockDim.x << gate;
        while (next.at < count) {
            Piece piece = next;
            if constexpr (!kNorm) ask(next, piece.at + step);
            int32_t row = piece.at / kVectors, column = piece.at % kVectors * 8;
            float(&y)[8] = piece.bias.value;
            total(piece);
            if (gate) {
                Piece b;
                ask(b, piece.at + 1);
                total(b);
#pragma unroll
                for (int k = 0; k < 8; k++) y[k] *= gelu(b.bias.value[k]);
            }
            Vector<__half>& v = piece.residual;
            if (p.call.residual)
#pragma unroll
                for (int k = 0; k < 8; k++) y[k] += to_float(v.value[k]);
#pragma unroll
            for (int k = 0; k < 8; k++) from_float(y[k], v.value[k]);
            int64_t to = int64_t(first_row + row) * (p.call.filters >> gate) + ((first_filter + column) >> gate);
            v.store(static_cast<__half*>(p.call.y) + to);
            if constexpr (kNorm) ask(next, piece.at + step);  // no registers for two
        }
    }

    // Put what a piece's sums are, with LayerNorm and bias, where its bias is.
    __device__ __forceinline__ void total(Piece& piece) const {
        const float* row = reinterpret_cast<const float*>(memory) + piece.at / kVectors * kSumsPitch;
        float zeros[8] = {}, moments[2] = {};
        float(&y)[8] = kNorm ? zeros : piece.bias.value;
        add_up(y, moments, row, piece.at % kVectors * 8);
        if constexpr (!kNorm) return;
        Norm norm = norm_of(moments[0], moments[1]);
#pragma unroll
        for (int k = 0; k < 8; k++)
            piece.bias.value[k] += norm.by * (y[k] - norm.mean * piece.weight_sums.value[k]);
    }

    // Add up eight sums of a row from a column on, and its moments: four blocks at a time, of which everything is asked
    // for before anything is added, since the way to their memory is long. Each block begins with its own, so that no
    // memory is asked by all of them at once.
    __device__ __forceinline__ void
    add_up(float (&y)[8], float (&moments)[2], const float* row, int32_t column) const {
#pragma unroll
        for (int from = 0; from < kConvMostCluster; from += 4) {
            float4 parts[4][2];
            float2 more[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t other = rank + from + i < p.cluster ? rank + from + i : rank + from + i - p.cluster;
                if (from + i < p.cluster)
                    for (int k = 0; k < 2; k++) parts[i][k] = cluster_read_4(row + column + 4 * k, other);
                if (kNorm && from + i < p.cluster) more[i] = cluster_read_2(row + kWide, other);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (from + i < p.cluster) {
                    for (int k = 0; k < 2; k++) {
                        const float4& part = parts[i][k];
                        y[4 * k] += part.x, y[4 * k + 1] += part.y, y[4 * k + 2] += part.z, y[4 * k + 3] += part.w;
                    }
                    if constexpr (kNorm) moments[0] += more[i].x, moments[1] += more[i].y;
                }
        }
    }
};

}  // namespace canny
