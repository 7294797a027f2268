// Runs CUDA kernels on a CPU as they are written: each thread of a cluster is a fiber, which gives way at barriers.
//
// Only what plugins/ uses of CUDA is here. Shared memory begins as NaN and is guarded at its end; threads run in an
// order of the caller's choice between two barriers, so that a missing barrier changes the result; a barrier that not
// every thread reaches is an error.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;
using __half = _Float16;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct float3 {
    float x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {
    int size = 0, arrived = 0;
    unsigned generation = 0;

    void arrive() {
        if (++arrived == size) arrived = 0, generation++;
    }
};

// A barrier in shared memory: its phase ends when all have arrived and every byte that is expected came.
struct Phases {
    Barrier barrier;
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;
    bool seen = false;  // by copies in the background
};

struct Block {
    dim3 index;
    Barrier barrier;
    std::vector<Barrier> warps;
    std::array<Barrier, 15> groups;
    std::vector<float> exchange;                     // of shuffles
    std::vector<const __half*> rows;                 // of matrices to be loaded
    std::vector<std::array<uint32_t, 6>> fragments;  // of matrices to be multiplied
    std::vector<unsigned char> shared;
    int left = 0;  // threads that have not ended
    std::map<uint32_t, Phases> phases;  // by address
};

// 16 bytes to be copied, zeros where `from` is null.
struct Copy {
    void* to;
    const void* from;
};

// sums += a · b, to be done some time before it is waited for. rows: b lies row after row, else column after column.
struct Product {
    float* sums;
    int count;
    const uint32_t* a;
    uint64_t b;
    bool rows = false, adds = true;  // else what was in the sums goes
};

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = true;
    Barrier* waits = nullptr;
    unsigned generation = 0, cluster_generation = 0;
    unsigned thread = 0;
    Block* block = nullptr;
    std::vector<std::vector<Copy>> copies = {{}};  // in groups, the last one open
    std::vector<std::vector<Product>> products = {{}};
    bool fenced = false, waited = false;  // registers before products; for the kernel before
};

constexpr size_t kStack = 64 << 10, kGuard = 256;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;  // of the cluster that runs
inline Barrier cluster;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline void (*work)(const void*) = nullptr;
inline const void* argument = nullptr;
inline std::vector<std::function<void()>> background;  // what copies will do
inline bool at_once = false;                           // or do as soon as they are asked for
inline std::string fault;                              // what a thread did wrong

inline void later(std::function<void()> action) {
    if (at_once)
        action();
    else
        background.push_back(std::move(action));
}

inline void pause() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned generation) {
    current->waits = &barrier;
    current->generation = generation;
    if (barrier.generation == generation) pause();
    current->waits = nullptr;
}

inline void meet(Barrier& barrier) {
    unsigned generation = barrier.generation;
    barrier.arrive();
    wait(barrier, generation);
}

inline void live() {
    for (;;) {
        work(argument);
        current->done = true;
        std::vector<unsigned char>& shared = current->block->shared;
        if (--current->block->left == 0) std::fill(shared.begin(), shared.end() - kGuard, 0xff);  // nobody's any more
        pause();
    }
}

inline void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = dim3(fiber.thread);
    blockIdx = fiber.block->index;
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp =
            mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        fiber.start.uc_stack.ss_size = kStack;
        makecontext(&fiber.start, live, 0);
        setcontext(&fiber.start);
    }
}

inline bool can_move(const Fiber& fiber) {
    return !fiber.done && !(fiber.waits && fiber.waits->generation == fiber.generation);
}

// Resume once each of `count` threads of a cluster that can go on, `order` naming them; how many did.
inline int sweep(const int* order, int count) {
    int moved = 0;
    for (int i = 0; i < count; i++) {
        Fiber& fiber = *fibers[order[i]];
        if (can_move(fiber)) resume(fiber), moved++;
    }
    return moved;
}

// Let every block, and in it every warp, run as far ahead of the others as barriers allow; whether any moved.
inline bool run_ahead(const std::vector<int>& order, int threads) {
    bool moved = false;
    for (size_t block = 0; block < order.size(); block += threads) {
        for (bool again = true; again;) {
            again = false;
            for (int warp = 0; warp < threads; warp += 32)
                while (sweep(order.data() + block + warp, 32)) again = moved = true;
        }
    }
    return moved;
}

// Run the threads of one cluster to their end: in this order, or with `random` in one that changes all the time.
inline void run_cluster(int size, int threads, size_t shared, std::vector<int>& order, std::mt19937* random) {
    cluster = {size * threads, 0, 0};
    for (int b = 0; b < size; b++) {
        Block& block = blocks[b];
        block.barrier = {threads, 0, 0};
        block.left = threads;
        block.warps.assign(threads / 32, Barrier{32, 0, 0});
        block.groups.fill({});
        block.exchange.assign(threads, NAN);
        block.rows.assign(threads, nullptr);
        block.fragments.resize(threads);
        block.shared.assign(shared + kGuard, 0xff);
        block.phases.clear();
        for (int t = 0; t < threads; t++) {
            Fiber& fiber = *fibers[b * threads + t];
            fiber.block = &block;
            fiber.thread = t;
            fiber.done = false;
            fiber.waits = nullptr;
            fiber.copies = {{}};
            fiber.products = {{}};
            fiber.fenced = fiber.waited = false;
        }
    }
    fault.clear();
    background.clear();
    for (bool moved = true; moved;) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        moved = random ? sweep(order.data(), int(order.size())) > 0 : run_ahead(order, threads);
        bool comes = !background.empty() && (!moved || (random && (*random)() % 2));
        if (comes) {  // one copy at a time, as late as possible or at random
            auto which = background.begin() + (random ? (*random)() % background.size() : 0);
            std::function<void()> action = std::move(*which);
            background.erase(which);
            action();
            moved = true;
        }
    }
    auto fail = [](const std::string& what) {
        fibers.clear();  // they stand in the middle of a kernel
        throw std::runtime_error(what);
    };
    if (!fault.empty()) fail(fault);
    for (int i : order)
        if (!fibers[i]->done) fail("a barrier was not reached by all threads");
    for (int i : order)
        if (fibers[i]->products.size() > 1) fail("products that nobody waited for");
    for (int b = 0; b < size; b++)
        for (size_t i = shared; i < shared + kGuard; i++)
            if (blocks[b].shared[i] != 0xff) fail("a write beyond the shared memory");
}

// Run a kernel of one argument. order: 0 the first cluster comes first and in it the first thread, 1 the last, more:
// threads at random, with this seed.
template <typename P>
void launch(void (*kernel)(P), dim3 grid, int cluster_size, int threads, size_t shared, const P& params, int order) {
    struct Call {
        void (*kernel)(P);
        const P* params;
    } call{kernel, &params};
    work = [](const void* to) { static_cast<const Call*>(to)->kernel(*static_cast<const Call*>(to)->params); };
    argument = &call;
    gridDim = grid;
    blockDim = dim3(threads);
    if (grid.x % cluster_size || threads % 32) throw std::runtime_error("a grid that is no whole number of clusters");
    blocks.resize(cluster_size);
    std::vector<int> sequence(cluster_size * threads);
    for (size_t i = 0; i < sequence.size(); i++) sequence[i] = order == 1 ? int(sequence.size() - 1 - i) : int(i);
    while (fibers.size() < sequence.size()) fibers.push_back(std::make_unique<Fiber>());
    std::mt19937 random(order);
    at_once = order == 1;
    unsigned across = grid.x / cluster_size, count = across * grid.y * grid.z;
    for (unsigned i = 0; i < count; i++) {
        unsigned at = order == 1 ? count - 1 - i : i, x = at % across * cluster_size, line = at / across;
        for (int b = 0; b < cluster_size; b++) blocks[b].index = dim3(x + b, line % grid.y, line / grid.y);
        run_cluster(cluster_size, threads, shared, sequence, order > 1 ? &random : nullptr);
    }
}

// What does a call's kernels, of blocks without clusters.
inline auto launcher(int order) {
    return [order](auto kernel, dim3 grid, int threads, size_t shared, const auto& call) {
        launch<const std::decay_t<decltype(call)>>(kernel, grid, 1, threads, shared, call, order);
        return true;
    };
}

// Of a call: 0, 1 where `run` finds no kernel for it, 2 where something was wrong, which is printed.
template <typename Run>
int status(Run run) {
    try {
        return run() ? 0 : 1;
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::current->block->barrier); }
inline void __syncwarp() { emulator::meet(emulator::current->block->warps[emulator::current->thread / 32]); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    emulator::Block& block = *emulator::current->block;
    unsigned me = emulator::current->thread;
    static_assert(sizeof(T) == sizeof(float));
    std::memcpy(&block.exchange[me], &value, sizeof value);
    emulator::meet(block.warps[me / 32]);
    T theirs;
    std::memcpy(&theirs, &block.exchange[me ^ unsigned(mask)], sizeof theirs);
    emulator::meet(block.warps[me / 32]);
    return theirs;
}

inline bool __any_sync(unsigned, bool value) {
    for (int mask = 1; mask < 32; mask *= 2) value |= __shfl_xor_sync(0, float(value), mask) != 0.f;
    return value;
}

namespace canny {

inline char* shared_memory() { return reinterpret_cast<char*>(emulator::current->block->shared.data()); }

inline void cluster_arrive() {
    emulator::current->cluster_generation = emulator::cluster.generation;
    emulator::cluster.arrive();
}

inline void cluster_arrive_read() { cluster_arrive(); }

inline void cluster_wait() { emulator::wait(emulator::cluster, emulator::current->cluster_generation); }

inline void let_next_begin() {}

inline void wait_for_previous() { emulator::current->waited = true; }

inline void wait_for_previous(int known) {
    if (known == -1) emulator::fault = "no wait for the kernel before";
    wait_for_previous();
}

inline float cluster_read(const float* mine, int rank) {
    size_t offset = reinterpret_cast<const char*>(mine) - shared_memory();
    float value;
    std::memcpy(&value, emulator::blocks[rank].shared.data() + offset, sizeof value);
    return value;
}

inline float3 cluster_read_3(const float* mine, int rank) {
    return {cluster_read(mine, rank), cluster_read(mine + 1, rank), cluster_read(mine + 2, rank)};
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline float rsqrt_fast(float x) { return rsqrtf(x); }
inline float to_float(__half x) { return float(x); }
inline float to_float(float x) { return x; }
inline void from_float(float x, __half& y) { y = __half(x); }
inline void from_float(float x, float& y) { y = x; }

}  // namespace canny
