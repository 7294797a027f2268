// The attention kernels of plugins/attention, as they are written, on a CPU.
#define EMULATE_CUDA
#include <cstdio>

#include "kernel.cuh"

// Do one attention; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int emulate_attention(const CannyAttention* call, int order) {
    try {
        bool done = canny::run_attention(*call, [&](auto kernel, dim3 grid, int threads, size_t bytes, const auto& p) {
            emulator::launch<const CannyAttention>(kernel, grid, 1, threads, bytes, p, order);
            return true;
        });
        return done ? 0 : 1;
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
