// A tile of a convolution once it is summed up: LayerNorm, bias, residual and gate, and to memory.
//
// It goes by pieces: 16 rows, which are a warp's, and the filters that make 32 numbers of y. Blocks that share a tile each
// finish some of its pieces. Every block writes what it has of a piece to the shared memory of the one that finishes it, in
// the order of its own registers; where no other shares the tile, to its own. From there one loop takes them, so that there
// is little code: in a step each launch comes after other kernels and has to fetch its instructions, of which those that
// run once take 2 ns each.
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

// kNorm: with a LayerNorm before it. kKind: see ConvKind.
template <int kGroups, int kWide, bool kNorm, int kKind>
struct ConvTile {
    static constexpr int kHigh = 64 * kGroups, kSums = kWide / 2, kWarps = 4 * kGroups, kConsumers = 32 * kWarps;
    static constexpr bool kScores = kKind == kConvScores, kValues = kKind == kConvValues, kCross = kScores || kValues;
    static constexpr bool kUp = kKind == kConvUp, kImages = kCross || kUp;
    static constexpr int kGate = kKind == kConvGate, kEights = conv_piece(kKind), kColumns = 8 * kEights >> kGate;
    static constexpr int kSections = kWide / (8 * kEights), kPieces = kSections * kWarps;
    // For residuals; wider tiles have no registers for it.
    static constexpr bool kAsksEarly = kWide <= kConvNarrow && !kScores;
    static constexpr int kHeld = kAsksEarly ? kSections : 1;  // pieces of a warp whose residual is in registers

    const ConvParams& p;
    char* memory;
    float *constants, *parts;  // biases and sums of weights; what the blocks have of this one's pieces
    int32_t first_row, end_row, first_filter, rank, warp, lane;
    int32_t image = 0;  // which has weights of its own: a row of the batch with a cross-attention, or a phase

    __device__ __forceinline__ explicit ConvTile(const ConvParams& params) : p(params) {
        memory = shared_memory() + (0u - shared_address(shared_memory())) % kConvAlign;
        rank = blockIdx.x;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int32_t of_rows = p.rows_beside ? blockIdx.y : blockIdx.z;
        first_filter = (p.rows_beside ? blockIdx.z : blockIdx.y) * kWide;
        first_row = of_rows * kHigh;
        end_row = p.rows;
        if constexpr (kImages) {
            image = conv_divide(of_rows, p.by_tiles);
            first_row += image * (p.rows_each - p.tiles_each * kHigh);
            end_row = (image + 1) * p.rows_each;
        }
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

    // Biases, and sums of weights, on their way to shared memory.
    struct Constants {
        static constexpr int kEach = (kWide + kConsumers - 1) / kConsumers;
        float bias[kEach] = {}, of_weights[kEach] = {};
    };

    __device__ __forceinline__ void ask_constants(Constants& asked) const {
#pragma unroll
        for (int i = 0; i < Constants::kEach; i++) {
            int32_t at = threadIdx.x + i * kConsumers;
            if (at >= kWide) continue;
            if constexpr (kScores) {
                asked.bias[i] = of_word(at);
                continue;
            }
            asked.bias[i] = p.call.bias[first_filter + at];
            if constexpr (kNorm) asked.of_weights[i] = p.call.weight_sums[first_filter + at];
        }
    }

    // What a head's score of a word has by itself, for a column of the tile.
    __device__ __forceinline__ float of_word(int32_t at) const {
        const CannyConv& c = p.call;
        int32_t head = at / kConvWords, word = at - head * kConvWords;
        if (word >= c.words) return kFar;
        head += first_filter / kConvWords;
        int64_t line = int64_t(image * c.words + word) * c.text_pitch;
        return to_float(static_cast<const __half*>(c.weight)[line + 2 * p.heads * c.channels + head]);
    }

    __device__ __forceinline__ void put_constants(const Constants& asked) const {
#pragma unroll
        for (int i = 0; i < Constants::kEach; i++) {
            int32_t at = threadIdx.x + i * kConsumers;
            if (at >= kWide) continue;
            constants[at] = asked.bias[i];
            if constexpr (kNorm && !kScores) constants[kWide + at] = asked.of_weights[i];
        }
    }

    // A LayerNorm of a row: by · (x·w - mean · the sum of w) is what its product by w should be.
    struct Norm {
        float mean = 0.f, by = 1.f;
    };

    __device__ __forceinline__ Norm norm_of(float x, float squares) const {
        float mean = x * p.each_channel, square = squares * p.each_channel;
        return {mean, rsqrt_fast(fmaxf(square - mean * mean, 0.f) + p.call.epsilon)};
    }

    // A lane's part of a piece: its first row, the other being 8 below, its first column of y, and its first filter.
    struct Place {
        int32_t row, column, filter;
    };

    // Of the piece that is number `slot` of this block's.
    __device__ __forceinline__ Place place_of(int32_t slot) const {
        int32_t piece = slot * p.cluster + rank, section = piece / kWarps * kColumns;
        return {
            first_row + piece % kWarps * 16 + lane / 4, (first_filter >> kGate) + section + lane % 4 * 8,
            (section << kGate) + lane % 4 * 2
        };
    }

    // Which position of y a row of a phase is.
    __device__ __forceinline__ int32_t line_of(int32_t row) const {
        ConvPosition to = conv_position(p, row - image * p.rows_each);
        return ((to.b * p.out_height + to.y) * 2 + image / 2) * 2 * p.out_width + 2 * to.x + image % 2;
    }

    using Residual = uint32_t[2][4];

    __device__ __forceinline__ void ask(Residual& residual, const Place& to) const {
        const CannyConv& c = p.call;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int32_t row = to.row + 8 * i, lines = c.residual_batch * p.out_height * p.out_width;
            for (uint32_t& word : residual[i]) word = 0;
            if (kUp || !c.residual || row >= end_row || to.column >= (first_filter + kWide) >> kGate) continue;
            int64_t from = int64_t(row - conv_divide(row, p.by_residual) * lines) * c.filters + to.column;
            load_words(residual[i], static_cast<const __half*>(c.residual) + from);
        }
    }

    __device__ __forceinline__ void ask_first(Residual (&residuals)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kHeld; i++) ask(residuals[i], place_of(warp + i * kWarps));
    }

    // Two sums of a thread with LayerNorm and bias, of this filter of the tile and the next.
    __device__ __forceinline__ float2 made(float x, float y, const Norm& norm, int32_t filter) const {
        float2 bias = *reinterpret_cast<const float2*>(constants + filter);
        if constexpr (kNorm) {
            float2 of_filters = *reinterpret_cast<const float2*>(constants + kWide + filter);
            x = norm.by * (x - norm.mean * of_filters.x), y = norm.by * (y - norm.mean * of_filters.y);
        }
        return make_float2(x + bias.x, y + bias.y);
    }

    using Sums = float[kEights][4];  // of a lane and a piece: two filters of each eight, in both rows

    // Store a piece. A lane has two of every eight filters, and four lanes swap theirs, so that each has eight side by side,
    // and all of them 64 bytes.
    __device__ __forceinline__ void
    finish(Sums& sums, const Moments& moments, const Place& to, Residual& residual) const {
        int32_t line = to.row;
        if constexpr (kUp) line = line_of(to.row);
        __half* y = static_cast<__half*>(p.call.y) + int64_t(line) * (p.call.filters >> kGate) + to.column;
        float x = moments.x[0], squares = moments.squares[0];
        // With a gate each row by itself, for less code.
#pragma unroll(kGate ? 1 : 2)
        for (int i = 0; i < 2; i++) {
            Norm norm;
            if constexpr (kNorm) norm = norm_of(x, squares);
            uint32_t words[4];
            if constexpr (!kGate) {
                for (int k = 0; k < 4; k++) words[k] = residual[i][k];
                if (!kUp && p.call.residual) swap_words(words);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int eight = k << kGate;
                float2 made_y = made(sums[eight][0], sums[eight][1], norm, to.filter + eight * 8);
                if constexpr (kGate) {
                    float2 b = made(sums[eight + 1][0], sums[eight + 1][1], norm, to.filter + eight * 8 + 8);
                    words[k] = pack(made_y.x * gelu(b.x), made_y.y * gelu(b.y));
                } else {
                    const __half* more = reinterpret_cast<const __half*>(&words[k]);
                    words[k] = pack(made_y.x + to_float(more[0]), made_y.y + to_float(more[1]));
                }
            }
            swap_words(words);
            if (to.row + 8 * i < end_row) store_words(words, y);
            if constexpr (kUp) y += (line_of(to.row + 8) - line) * p.call.filters;
            else y += 8 * (p.call.filters >> kGate);
            x = moments.x[1], squares = moments.squares[1];
#pragma unroll
            for (float(&four)[4] : sums) four[0] = four[2], four[1] = four[3];
        }
    }

    // The softmax of a head's scores in 16 rows, of which four lanes have two words of each eight.
    __device__ __forceinline__ void finish_scores(Sums& sums, const Moments& moments, const Place& to) const {
        __half* y = static_cast<__half*>(p.call.y) + int64_t(to.row) * p.call.filters + to.column;
        float x = moments.x[0], squares = moments.squares[0];
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            float by = norm_of(x, squares).by, most = kFar, total = 0.f;
#pragma unroll
            for (int j = 0; j < kEights; j++) {
                float2 of_words = *reinterpret_cast<const float2*>(constants + to.filter + 8 * j);
                sums[j][0] = fmaf(sums[j][0], by, of_words.x), sums[j][1] = fmaf(sums[j][1], by, of_words.y);
                most = fmaxf(most, fmaxf(sums[j][0], sums[j][1]));
            }
            for (int mask = 1; mask <= 2; mask *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
#pragma unroll
            for (int j = 0; j < kEights; j++)
                for (int k = 0; k < 2; k++) total += sums[j][k] = exp2_fast(sums[j][k] - most);
            for (int mask = 1; mask <= 2; mask *= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
            total = reciprocal_fast(total);
#pragma unroll
            for (int first = 0; first < kEights; first += 4) {
                uint32_t words[4] = {};
#pragma unroll
                for (int j = first; j < first + 4 && j < kEights; j++)
                    words[j - first] = pack(sums[j][0] * total, sums[j][1] * total);
                swap_words(words);
                if (to.row + 8 * i < end_row && first + lane % 4 < kEights) store_words(words, y + 8 * first);
            }
            y += 8 * p.call.filters;
            x = moments.x[1], squares = moments.squares[1];
#pragma unroll
            for (float(&four)[4] : sums) four[0] = four[2], four[1] = four[3];
        }
    }

    // Floats of what a block has of a piece, for all lanes.
    template <bool kShared>
    static constexpr int kPart = conv_part(kKind, kNorm && kShared) / int(sizeof(float));

    // Write the sums, which are in registers, to where their pieces are finished. kShared: by several blocks; then the
    // moments, too.
    template <bool kShared>
    __device__ __forceinline__ void give(const float (&sums)[kSums], const Moments& moments) const {
#pragma unroll
        for (int t = 0; t < kSections; t++) {
            int32_t piece = t * kWarps + warp, slot = kShared ? conv_divide(piece, p.by_cluster) : piece;
            float* place = parts + (slot * p.cluster + rank) * kPart<kShared> + lane * 4;
            uint32_t theirs = kShared ? cluster_address(place, piece - slot * p.cluster) : 0;
            auto put = [&](int j, float x, float y, float z, float w) {
                if constexpr (kShared)
                    cluster_write_4(theirs + j * 512, x, y, z, w);
                else
                    *reinterpret_cast<float4*>(place + j * 128) = float4{x, y, z, w};
            };
#pragma unroll
            for (int j = 0; j < kEights; j++) {
                const float* four = sums + (t * kEights + j) * 4;
                put(j, four[0], four[1], four[2], four[3]);
            }
            if constexpr (kNorm && kShared)
                put(kEights, moments.x[0], moments.squares[0], moments.x[1], moments.squares[1]);
        }
    }

    // Add up what all blocks have of this warp's pieces, always in the same order, and store them.
    __device__ __forceinline__ void store(Moments moments, Residual (&residuals)[kHeld]) const {
        const bool shared = p.cluster > 1;
        const int32_t fours = (shared ? kPart<true> : kPart<false>) / 4;
#pragma unroll 1
        for (int32_t slot = warp; slot * p.cluster + rank < kPieces; slot += kWarps) {
            const Place to = place_of(slot);
            if constexpr (!kAsksEarly && !kScores) ask(residuals[0], to);
            const float4* part = reinterpret_cast<const float4*>(parts) + slot * p.cluster * fours + lane;
            Sums sums = {};
            if (kNorm && shared) moments = {};
#pragma unroll 1
            for (int32_t other = 0; other < p.cluster; other++, part += fours) {
#pragma unroll
                for (int j = 0; j < kEights; j++) {
                    float4 four = part[j * 32];
                    sums[j][0] += four.x, sums[j][1] += four.y, sums[j][2] += four.z, sums[j][3] += four.w;
                }
                if (!kNorm || !shared) continue;
                float4 four = part[kEights * 32];
                moments.x[0] += four.x, moments.squares[0] += four.y, moments.x[1] += four.z, moments.squares[1] += four.w;
            }
            if constexpr (kScores) finish_scores(sums, moments, to);
            else finish(sums, moments, to, residuals[0]);
#pragma unroll
            for (int i = 0; i + 1 < kHeld; i++)
                for (int j = 0; j < 8; j++) residuals[i][j / 4][j % 4] = residuals[i + 1][j / 4][j % 4];
        }
    }
};

}  // namespace canny
