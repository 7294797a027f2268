// GroupNorm (Wu & He 2018) of channels-last maps (B, h·w, C), with a row added before it and SiLU after it or not.
//
// A vector of 8 channels may lie in two groups, or in more where a group has fewer than 8 channels: then each of its
// channels has a record of its own.
#pragma once

#include <type_traits>

#include "records.cuh"

namespace canny {

// A thread's place in a tile: one vector of channels, every `lanes`-th position of a slice.
// kSegments: groups that the vector lies in at most; 8: each channel has its own record.
// kMore: what else there may be: 0 nothing, 1 a row, 2 a row and padding.
template <typename T, int kSegments, int kMore = 2>
struct Thread {
    const Params& p;
    int32_t column, lane, channel, tile_groups, first_group, cut, wide, begin, left;
    int64_t offset;  // of its first position

    __device__ __forceinline__ explicit Thread(const Params& params) : p(params) {
        const Plan& plan = p.plan;
        lane = divide(threadIdx.x, plan.by_columns);
        column = threadIdx.x - lane * plan.columns;
        channel = blockIdx.y * plan.tile + column * kWidth;
        tile_groups = min(plan.tile_groups, p.groups - int32_t(blockIdx.y) * plan.tile_groups);
        first_group = divide(column * kWidth, plan.by_group);     // of the vector, counted in the tile
        cut = (first_group + 1) * p.per_group - column * kWidth;  // its channels from here on are of the next group
        wide = lane < plan.lanes ? min(kWidth, p.channels - channel) : 0;  // those there are; the rest is padding
        begin = blockIdx.x * plan.slice;
        left = wide > 0 ? min(plan.slice, p.positions - begin) - lane : 0;  // positions from its first one on
        offset = int64_t(blockIdx.z) * (p.positions * plan.pitch) + ((begin + lane) * plan.pitch + channel);
    }

    __device__ __forceinline__ bool padded() const { return kMore > 1 && wide > 0 && wide < kWidth; }
    __device__ __forceinline__ bool has_row() const { return kMore > 0 && p.row != nullptr; }

    // How many of V positions from `first` on are the thread's.
    template <int V>
    __device__ __forceinline__ int32_t count(int32_t first) const {
        int32_t there = 0;
#pragma unroll
        for (int v = 0; v < V; v++) there += first + v * p.plan.lanes < left;
        return there;
    }

    __device__ __forceinline__ const T* from(int32_t first) const {
        return static_cast<const T*>(p.x) + offset + first * p.plan.pitch;
    }

    // `count` of V positions from x on, zeros for the others.
    template <int V>
    __device__ __forceinline__ void load(Vector<T> (&data)[V], const T* x, int32_t count) const {
        int32_t step = p.plan.lanes * p.plan.pitch;
#pragma unroll
        for (int v = 0; v < V; v++) {
            data[v].clear(0);
            if (v < count) data[v].load(x);
            x += step;
        }
        if (padded()) {  // or NaN out of the padding would go into the padding
#pragma unroll
            for (int v = 0; v < V; v++) data[v].clear(wide);
        }
    }

    // Of a joined map, whose parts have multiples of 8 channels: whether x is the thread's, and where it begins there.
    __device__ __forceinline__ bool of_x(const CannyJoin& join) const { return channel < join.first; }
    __device__ __forceinline__ int64_t part(const CannyJoin& join) const {
        int32_t width = of_x(join) ? join.first : join.second;
        int32_t within = (begin + lane) * width + channel - (of_x(join) ? 0 : join.first);
        return int64_t(blockIdx.z) * (p.positions * width) + within;
    }

    // The same of a map of half precision that is joined now and written, `from` being that part's.
    template <int V>
    __device__ __forceinline__ void load_joined(
        Vector<__half> (&data)[V], const CannyJoin& join, int64_t from, int32_t count
    ) const {
        bool of_x = this->of_x(join);
        int32_t step = p.plan.lanes * (of_x ? join.first : join.second);
        const __half* base = static_cast<const __half*>(of_x ? join.x : join.skip) + from;
        const __half* added = static_cast<const __half*>(of_x ? join.x_residual : join.residual);
        bool adds = added != nullptr;
        added += from;
        Vector<__half> residual[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
            data[v].clear(0);
            if (v < count) {
                data[v].load(base);
                if (adds) residual[v].load(added);
            }
            base += step;
            added += step;
        }
        float scale = adds ? (of_x ? join.x_scales : join.scales)[blockIdx.z] : 0.f;
        __half* y = static_cast<__half*>(join.y) + offset;
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (v >= count) break;
            if (adds) add_scaled(data[v], scale, residual[v]);
            data[v].store(y);
            y += p.plan.lanes * p.plan.pitch;
        }
    }

    // The vector of `from` at this thread's channels, which may be fewer than a vector has; `aligned`: as vectors are.
    template <typename U>
    __device__ __forceinline__ void load_channels(Vector<U>& values, const U* from, bool aligned = true) const {
        values.clear(0);
        if (wide == kWidth && aligned) {
            values.load(from + channel);
        } else if (padded() || !aligned) {
#pragma unroll
            for (int c = 0; c < kWidth; c++)
                if (c < wide) values.value[c] = from[channel + c];
        }
    }

    __device__ __forceinline__ void load_row(Vector<T>& row) const {
        row.clear(0);
        if (!has_row()) return;
        const T* from = static_cast<const T*>(p.row) + int64_t(blockIdx.z) * p.row_stride;
        load_channels(row, from, kMore < 2 || p.channels % kWidth == 0);
    }

    // What records of `count` positions have beforehand: the number of their values, and 1 / that.
    __device__ __forceinline__ void prepare(Record (&found)[kSegments], float (&each)[kSegments], int32_t count) const {
#pragma unroll
        for (int s = 0; s < kSegments; s++) {
            int32_t channels = kSegments > 2 ? 1 : kSegments == 1 ? wide : s == 0 ? min(cut, wide) : wide - cut;
            found[s].count = float(channels * count);
            each[s] = reciprocal_fast(fmaxf(found[s].count, 1.f));
        }
    }

    // The records of V positions, `count` of them there and the others zero.
    template <int V>
    __device__ __forceinline__ void take(
        Record (&found)[kSegments], const float (&each)[kSegments], const Vector<T> (&data)[V], int32_t count,
        const Vector<T>& row
    ) const {
        float shift[kWidth], total[kSegments] = {}, squares[kSegments] = {};
#pragma unroll
        for (int c = 0; c < kWidth; c++) {
            shift[c] = to_float(data[0].value[c]);
#pragma unroll
            for (int v = 1; v < V; v++) shift[c] += to_float(data[v].value[c]);
        }
        if (has_row()) {
#pragma unroll
            for (int c = 0; c < kWidth; c++) shift[c] += to_float(row.value[c]) * float(count);
        }
#pragma unroll
        for (int c = 0; c < kWidth; c++) add(total, c, shift[c], true);
#pragma unroll
        for (int s = 0; s < kSegments; s++) found[s].mean = total[s] * each[s];
        float mean = found[0].mean, next = found[kSegments - 1].mean;
#pragma unroll
        for (int c = 0; c < kWidth; c++)
            shift[c] = kSegments > 2 ? found[c % kSegments].mean : is_next(c) ? next : mean;
        if (has_row()) {
#pragma unroll
            for (int c = 0; c < kWidth; c++) shift[c] -= to_float(row.value[c]);
        }
        if (padded()) {  // zeros are no deviations
#pragma unroll
            for (int c = 0; c < kWidth; c++)
                if (c >= wide) shift[c] = 0.f;
        }
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (v >= count) break;
#pragma unroll
            for (int c = 0; c < kWidth; c++) {
                float d = to_float(data[v].value[c]) - shift[c];
                add(squares, c, d * d, v == 0);
            }
        }
#pragma unroll
        for (int s = 0; s < kSegments; s++) found[s].squares = squares[s];
    }

    // Where among the slots `merge_slots` looks for the thread's records of their groups.
    __device__ __forceinline__ int32_t slot() const {
        int32_t first = kSegments > 2 ? 0 : column - first_column(first_group);
        return first_group * p.plan.slots + first * p.plan.lanes + lane;
    }

    // The next group's: the vector is that group's first one.
    __device__ __forceinline__ int32_t next_slot() const { return (first_group + 1) * p.plan.slots + lane; }

    __device__ __forceinline__ void put(
        const Shared& shared, const Record (&records)[kSegments], int32_t slot, int32_t next_slot
    ) const {
        if (wide <= 0) return;
        if constexpr (kSegments <= 2) {
            shared.slots[slot] = records[0];
            if (kSegments == 2 && cut < wide) shared.slots[next_slot] = records[kSegments - 1];
        } else {
#pragma unroll
            for (int s = 0; s < kSegments; s++) {
                if (s >= wide) break;
                int32_t at = column * kWidth + s, j = divide(at, p.plan.by_group), which = at - j * p.per_group;
                shared.slots[j * p.plan.slots + which * p.plan.lanes + lane] = records[s];
            }
        }
    }

    __device__ __forceinline__ int32_t first_column(int32_t j) const { return uint32_t(j * p.per_group) / kWidth; }

    // Slots of group j that hold records.
    __device__ __forceinline__ int32_t used(int32_t j) const {
        int32_t columns = uint32_t((j + 1) * p.per_group - 1) / kWidth - first_column(j) + 1;
        return (kSegments <= 2 ? columns : p.per_group) * p.plan.lanes;
    }

    // gamma and beta become the scale and the shift of y = x · scale + shift, the row being in the shift.
    __device__ __forceinline__ void coefficients(
        const Shared& shared, const Vector<T>& row, Vector<float>& scale, Vector<float>& shift
    ) const {
        // Behind the last group, where no vector has a next one, lie numbers that nobody uses.
        float2 first = shared.norms[first_group], next = shared.norms[first_group + 1];
#pragma unroll
        for (int c = 0; c < kWidth; c++) {
            float2 norm = is_next(c) ? next : first;
            int32_t j = min(divide(column * kWidth + c, p.plan.by_group), p.plan.tile_groups - 1);
            if (kSegments > 2) norm = shared.norms[j];
            scale.value[c] *= norm.y;
            shift.value[c] -= norm.x * scale.value[c];
        }
        if (has_row()) {
#pragma unroll
            for (int c = 0; c < kWidth; c++) shift.value[c] += to_float(row.value[c]) * scale.value[c];
        }
        if (padded()) {  // and so will be the padding
            scale.clear(wide);
            shift.clear(wide);
        }
    }

    template <int V>
    __device__ __forceinline__ void apply(
        Vector<T> (&data)[V], int32_t first, int32_t count, const Vector<float>& scale, const Vector<float>& shift
    ) const {
        T* y = static_cast<T*>(p.y) + offset + first * p.plan.pitch;
        int32_t step = p.plan.lanes * p.plan.pitch;
        // Code for one vector, the others moving up: at most launches nothing is in the instruction caches.
#pragma unroll(sizeof(T) == 2 ? 1 : V)
        for (int v = 0; v < V; v++) {
            if (v >= count) break;
            Vector<T> one = data[0];
            finish(one, scale.value, shift.value, p.silu);
            one.store(y);
            y += step;
#pragma unroll
            for (int i = 1; i < V; i++) data[i - 1] = data[i];
        }
    }

private:
    __device__ __forceinline__ bool is_next(int c) const { return kSegments > 1 && c > 0 && c >= cut; }  // cut > 0

    // Add what is channel c's to its segment's; `anew`: to nothing, channel 0 being the first.
    __device__ __forceinline__ void add(float (&to)[kSegments], int c, float value, bool anew) const {
        if (kSegments > 2)
            to[c % kSegments] = anew ? value : to[c % kSegments] + value;
        else if (is_next(c))
            to[kSegments - 1] = anew && c == 1 ? value : to[kSegments - 1] + value;
        else
            to[0] = anew && c == 0 ? value : to[0] + value;
    }
};

// One pass: the blocks of a cluster hold all positions of their tile in registers, read or joined there.
template <typename T, int V, int kSegments, int kMore = 2, typename P = Params>
__global__ void __launch_bounds__(kThreads, V <= 2 && sizeof(T) == 2 ? 2 : 1) one_launch(const P p) {
    const Plan& plan = p.plan;
    constexpr bool kJoins = std::is_same_v<P, JoinParams>;
    constexpr bool kFull = V == 2 && kSegments == 2 && kMore > 0;  // of registers, until there are statistics
    Thread<T, kSegments, kMore> thread(p);
    Shared shared(plan);
    Vector<T> data[V];
    Vector<T> row;
    Vector<float> scale, shift;
    // All that is known before the kernel before has ended is worked out before.
    auto used = [&](int32_t j) { return thread.used(j); };
    int32_t count = thread.template count<V>(0), slot = thread.slot(), next_slot = thread.next_slot();
    Turn turn(plan, thread.tile_groups, used);
    Record records[kSegments];
    float each_value[kSegments];
    thread.prepare(records, each_value, count);
    thread.load_channels(scale, p.gamma);  // no kernel writes these
    if (!kFull) thread.load_channels(shift, p.beta);
    int32_t known = thread.left & slot & turn.known();
    if (kSegments == 2) known &= next_slot;
    if constexpr (kJoins) {
        int64_t from = thread.part(p.join);
        wait_for_previous(known & int32_t(from) & int32_t(from >> 32));
        thread.load_joined(data, p.join, from, count);
    } else {
        const T* from = thread.from(0);
        wait_for_previous(known & int32_t(uintptr_t(from)) & int32_t(uintptr_t(from) >> 32));
        thread.load(data, from, count);
    }
    thread.load_row(row);
    thread.take(records, each_value, data, count, row);
    thread.put(shared, records, slot, next_slot);
    __syncthreads();
    let_next_begin();
    if (kFull) thread.load_channels(shift, p.beta);
    merge_slots(plan, shared, turn, used);
    if (plan.slices > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        __syncthreads();
    }
    int32_t each = plan.warps_a_group;
    auto get = [&](int32_t j, int32_t i) {
        int32_t rank = divide(i, plan.by_warps);
        float3 is = cluster_read_3(&shared.warps[j * each + i - rank * each].count, rank);
        return Record{is.x, is.y, is.z};
    };
    merge_norms(shared, thread.tile_groups, each * plan.slices, shared.warps, each, p, get);
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
        float each[kSegments];
        int32_t count = thread.template count<V>(first);
        thread.load(data, thread.from(first), count);
        thread.prepare(found, each, count);
        thread.take(found, each, data, count, row);
#pragma unroll
        for (int s = 0; s < kSegments; s++) records[s] = merge(records[s], found[s]);
    }
    thread.put(shared, records, thread.slot(), thread.next_slot());
    __syncthreads();
    auto used = [&](int32_t j) { return thread.used(j); };
    merge_slots(plan, shared, Turn(plan, thread.tile_groups, used), used);
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
    auto get = [&](int32_t j, int32_t i) { return in[j * plan.slices + i]; };
    merge_norms(shared, thread.tile_groups, plan.slices, in, plan.slices, p, get);
    __syncthreads();
    thread.coefficients(shared, row, scale, shift);
    int32_t step = V * plan.lanes;
    for (int32_t first = (plan.slice - 1) / step * step; first >= 0; first -= step) {
        Vector<T> data[V];
        int32_t count = thread.template count<V>(first);
        thread.load(data, thread.from(first), count);
        thread.apply(data, first, count, scale, shift);
    }
}

}  // namespace canny
