// GroupNorm (Wu & He 2018) of channels-last maps (B, h·w, C), with a row added before it and SiLU after it or not.
//
// A vector of 8 channels may lie in two groups, or in more where a group has fewer than 8 channels: then each of its
// channels has a record of its own.
#pragma once

#include <type_traits>

#include "records.cuh"

namespace canny {

// A thread's place in a tile: one vector of channels, every `lanes`-th position of a slice.
template <typename T, int kSegments>  // 2: the vector lies in two groups at most; 8: each channel has its own record
struct Thread {
    const Params& p;
    int32_t column, lane, channel, tile_groups, per_group, first_group, cut, wide, begin, rows;
    int64_t sample;

    __device__ __forceinline__ explicit Thread(const Params& params) : p(params) {
        const Plan& plan = p.plan;
        lane = divide(threadIdx.x, plan.by_columns);
        column = threadIdx.x - lane * plan.columns;
        channel = blockIdx.y * plan.tile + column * kWidth;
        per_group = p.channels / p.groups;
        tile_groups = min(plan.tile_groups, p.groups - int32_t(blockIdx.y) * plan.tile_groups);
        first_group = divide(column * kWidth, plan.by_group);   // of the vector, counted in the tile
        cut = (first_group + 1) * per_group - column * kWidth;  // its channels from here on are of the next group
        wide =
            lane < plan.lanes ? min(kWidth, p.channels - channel) : 0;  // channels that there are; the rest is padding
        begin = blockIdx.x * plan.slice;
        rows = min(plan.slice, p.positions - begin);
        sample = int64_t(blockIdx.z) * p.positions * plan.pitch;
    }

    __device__ __forceinline__ int32_t offset(int32_t position) const {
        return (begin + position) * p.plan.pitch + channel;
    }

    // How many of V positions from `first` on are this thread's.
    template <int V>
    __device__ __forceinline__ int32_t load(Vector<T> (&data)[V], int32_t first) const {
        const T* x = static_cast<const T*>(p.x) + sample;
        int32_t count = 0;
#pragma unroll
        for (int v = 0; v < V; v++) {
            int32_t position = first + v * p.plan.lanes + lane;
            if (wide > 0 && position < rows) {
                data[v].load(x + offset(position));
                if (wide < kWidth) data[v].clear(wide);  // or NaN out of the padding would go into the padding
                count++;
            } else {
                data[v].clear(0);
            }
        }
        return count;
    }

    // The same of a map of half precision that is joined now and written, of parts with a multiple of 8 channels.
    template <int V>
    __device__ __forceinline__ int32_t load_joined(Vector<__half> (&data)[V], const CannyJoin& join) const {
        bool of_x = channel < join.first;
        int32_t width = of_x ? join.first : join.second;
        int64_t from = (int64_t(blockIdx.z) * p.positions + begin) * width + channel - (of_x ? 0 : join.first);
        const __half* base = static_cast<const __half*>(of_x ? join.x : join.skip) + from;
        const __half* added = static_cast<const __half*>(of_x ? join.x_residual : join.residual);
        bool adds = added != nullptr;
        Vector<__half> residual[V];
        int32_t count = 0;
#pragma unroll
        for (int v = 0; v < V; v++) {
            int32_t position = v * p.plan.lanes + lane;
            data[v].clear(0);
            if (wide > 0 && position < rows) {
                data[v].load(base + position * width);
                if (adds) residual[v].load(added + from + position * width);
                count++;
            }
        }
        float scale = adds ? (of_x ? join.x_scales : join.scales)[blockIdx.z] : 0.f;
        __half* y = static_cast<__half*>(join.y) + sample;
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (v >= count) break;
            if (adds) add_scaled(data[v], scale, residual[v]);
            data[v].store(y + offset(v * p.plan.lanes + lane));
        }
        return count;
    }

    // The vector of `from` at this thread's channels, which may be fewer than a vector has.
    template <typename U>
    __device__ __forceinline__ void load_channels(Vector<U>& values, const U* from) const {
        values.clear(0);
        if (wide == kWidth && p.channels % kWidth == 0) {
            values.load(from + channel);
        } else {
#pragma unroll
            for (int c = 0; c < kWidth; c++)
                if (c < wide) values.value[c] = from[channel + c];
        }
    }

    __device__ __forceinline__ void load_row(Vector<T>& row) const {
        row.clear(0);
        if (p.row != nullptr) load_channels(row, static_cast<const T*>(p.row) + int64_t(blockIdx.z) * p.row_stride);
    }

    // The records of V positions, `count` of them there.
    template <int V>
    __device__ __forceinline__ void take(
        Record (&found)[kSegments], const Vector<T> (&data)[V], int32_t count, const Vector<T>& row
    ) const {
        float sum[kWidth];
#pragma unroll
        for (int c = 0; c < kWidth; c++) {
            sum[c] = to_float(row.value[c]) * float(count);
#pragma unroll
            for (int v = 0; v < V; v++) sum[c] += to_float(data[v].value[c]);  // zero where there is no position
        }
#pragma unroll
        for (int s = 0; s < kSegments; s++) {
            float total = 0.f;
            int32_t channels = 0;
#pragma unroll
            for (int c = 0; c < kWidth; c++)
                if (in_segment(c, s)) total += sum[c], channels++;
            found[s].count = float(channels * count);
            found[s].mean = channels * count > 0 ? total * reciprocal_fast(found[s].count) : 0.f;
            found[s].squares = 0.f;
        }
#pragma unroll
        for (int c = 0; c < kWidth; c++) {
            float mean = kSegments > 2 ? found[c % kSegments].mean : c >= cut ? found[1].mean : found[0].mean;
            float shift = to_float(row.value[c]) - mean, squares = 0.f;
#pragma unroll
            for (int v = 0; v < V; v++) {
                float d = to_float(data[v].value[c]) + shift;
                if (v < count) squares += d * d;
            }
#pragma unroll
            for (int s = 0; s < kSegments; s++) found[s].squares += in_segment(c, s) ? squares : 0.f;
        }
    }

    // Put the thread's records where `merge_slots` looks for those of their groups.
    __device__ __forceinline__ void put(const Shared& shared, const Record (&records)[kSegments]) const {
        if (wide <= 0) return;
        const Plan& plan = p.plan;
#pragma unroll
        for (int s = 0; s < kSegments; s++) {
            if (kSegments == 2) {
                int32_t j = first_group + s;
                bool here = s == 0 || cut < wide;
                if (here) shared.slots[j * plan.slots + (column - first_column(j)) * plan.lanes + lane] = records[s];
            } else if (s < wide) {
                int32_t j = divide(column * kWidth + s, plan.by_group), which = column * kWidth + s - j * per_group;
                shared.slots[j * plan.slots + which * plan.lanes + lane] = records[s];
            }
        }
    }

    __device__ __forceinline__ int32_t first_column(int32_t j) const { return j * per_group / kWidth; }

    __device__ __forceinline__ void merge_block(const Shared& shared) const {
        merge_slots(p.plan, shared, tile_groups, [this](int32_t j) {
            int32_t columns = ((j + 1) * per_group - 1) / kWidth - first_column(j) + 1;
            return (kSegments == 2 ? columns : per_group) * p.plan.lanes;
        });
    }

    // gamma and beta become the scale and the shift of y = x · scale + shift, the row being in the shift.
    __device__ __forceinline__ void coefficients(
        const Shared& shared, const Vector<T>& row, Vector<float>& scale, Vector<float>& shift
    ) const {
        int32_t last = p.plan.tile_groups - 1;
        float2 first = shared.norms[first_group], next = shared.norms[min(first_group + 1, last)];
#pragma unroll
        for (int c = 0; c < kWidth; c++) {
            float2 norm = c >= cut ? next : first;
            if (kSegments > 2) norm = shared.norms[min(divide(column * kWidth + c, p.plan.by_group), last)];
            scale.value[c] *= norm.y;
            shift.value[c] += (to_float(row.value[c]) - norm.x) * scale.value[c];
            if (c >= wide) scale.value[c] = shift.value[c] = 0.f;  // and so will be the padding
        }
    }

    template <int V>
    __device__ __forceinline__ void apply(
        Vector<T> (&data)[V], int32_t first, int32_t count, const Vector<float>& scale, const Vector<float>& shift
    ) const {
        T* y = static_cast<T*>(p.y) + sample;
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (v >= count) break;
            finish(data[v], scale.value, shift.value, p.silu);
            data[v].store(y + offset(first + v * p.plan.lanes + lane));
        }
    }

private:
    __device__ __forceinline__ int32_t segment(int c) const { return kSegments == 2 ? int32_t(c >= cut) : c; }
    __device__ __forceinline__ bool in_segment(int c, int s) const { return c < wide && segment(c) == s; }
};

// One pass: the blocks of a cluster hold all positions of their tile in registers, read or joined there.
template <typename T, int V, int kSegments, typename P = Params>
__global__ void __launch_bounds__(kThreads, V <= 2 && sizeof(T) == 2 ? 2 : 1) one_launch(const P p) {
    const Plan& plan = p.plan;
    Thread<T, kSegments> thread(p);
    Shared shared(plan);
    Vector<T> data[V];
    Vector<T> row;
    Vector<float> scale, shift;
    wait_for_previous();
    int32_t count;
    if constexpr (std::is_same_v<P, JoinParams>)
        count = thread.load_joined(data, p.join);
    else
        count = thread.load(data, 0);
    thread.load_row(row);
    Record records[kSegments];
    thread.take(records, data, count, row);
    thread.put(shared, records);
    __syncthreads();
    let_next_begin();
    thread.load_channels(scale, p.gamma);
    thread.load_channels(shift, p.beta);
    thread.merge_block(shared);
    if (plan.slices > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    int32_t each = plan.warps_a_group;
    merge_norms(shared, thread.tile_groups, each * plan.slices, p.epsilon, [&](int32_t j, int32_t i) {
        int32_t rank = divide(i, plan.by_warps);
        const Record* mine = shared.warps + j * each + i - rank * each;
        if (plan.slices == 1) return *mine;
        Record theirs;
        theirs.count = cluster_read(&mine->count, rank);
        theirs.mean = cluster_read(&mine->mean, rank);
        theirs.squares = cluster_read(&mine->squares, rank);
        return theirs;
    });
    if (plan.slices > 1) cluster_arrive_read();
    __syncthreads();
    thread.coefficients(shared, row, scale, shift);
    thread.apply(data, 0, count, scale, shift);
    if (plan.slices > 1) cluster_wait();  // a block stays until the others have read its shared memory
}

// The first of two passes: a record of each group and slice.
template <typename T, int V, int kSegments>
__global__ void __launch_bounds__(kThreads, kSegments == 2 ? 2 : 1) statistics(const Params p) {
    const Plan& plan = p.plan;
    Thread<T, kSegments> thread(p);
    Shared shared(plan);
    Vector<T> row;
    wait_for_previous();
    thread.load_row(row);
    Record records[kSegments];
#pragma unroll
    for (int s = 0; s < kSegments; s++) records[s].count = records[s].mean = records[s].squares = 0.f;
    for (int32_t first = 0; first < plan.slice; first += V * plan.lanes) {
        Vector<T> data[V];
        Record found[kSegments];
        int32_t count = thread.load(data, first);
        thread.take(found, data, count, row);
#pragma unroll
        for (int s = 0; s < kSegments; s++) records[s] = merge(records[s], found[s]);
    }
    thread.put(shared, records);
    __syncthreads();
    thread.merge_block(shared);
    __syncthreads();
    Record* out = reinterpret_cast<Record*>(p.partials);
    for (int32_t j = threadIdx.x; j < thread.tile_groups; j += blockDim.x) {
        Record a = {};
        for (int32_t i = 0; i < plan.warps_a_group; i++) a = merge(a, shared.warps[j * plan.warps_a_group + i]);
        int64_t group = int64_t(blockIdx.z) * p.groups + int64_t(blockIdx.y) * plan.tile_groups + j;
        out[group * plan.slices + blockIdx.x] = a;
    }
}

// The second pass, last positions first: they are the likeliest to be in the L2 cache still.
template <typename T, int V, int kSegments>
__global__ void __launch_bounds__(kThreads, 2) apply(const Params p) {
    const Plan& plan = p.plan;
    Thread<T, kSegments> thread(p);
    Shared shared(plan);
    Vector<T> row;
    Vector<float> scale, shift;
    wait_for_previous();
    thread.load_row(row);
    thread.load_channels(scale, p.gamma);
    thread.load_channels(shift, p.beta);
    const Record* in = reinterpret_cast<const Record*>(p.partials);
    in += (int64_t(blockIdx.z) * p.groups + int64_t(blockIdx.y) * plan.tile_groups) * plan.slices;
    merge_norms(shared, thread.tile_groups, plan.slices, p.epsilon, [&](int32_t j, int32_t i) {
        return in[j * plan.slices + i];
    });
    __syncthreads();
    thread.coefficients(shared, row, scale, shift);
    int32_t step = V * plan.lanes;
    for (int32_t first = (plan.slice - 1) / step * step; first >= 0; first -= step) {
        Vector<T> data[V];
        int32_t count = thread.load(data, first);
        thread.apply(data, first, count, scale, shift);
    }
}

}  // namespace canny
