// The kernels of plugins/conv, as they are written, on a CPU.
#define EMULATE_CUDA
#include <cstdio>

#include "kernel.cuh"

// Do one convolution; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int emulate_conv(const CannyConv* call, int order) {
    try {
        bool done = canny::run_conv(*call, [&](auto kernel, dim3 grid, int cluster, size_t bytes, const auto& p) {
            emulator::launch<const canny::ConvParams>(kernel, grid, cluster, canny::kConvThreads, bytes, p, order);
            return true;
        });
        return done ? 0 : 1;
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
