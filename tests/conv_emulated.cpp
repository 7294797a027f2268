// The kernels of plugins/conv, as they are written, on a CPU.
#define EMULATE_CUDA
#include <cstdio>

#include "kernel.cuh"

#ifdef EMULATE_WIDE  // only kernels of tiles so wide, with or without a LayerNorm: to compile the rest takes longest
namespace canny {
#define NONE(groups, wide, norm, taps, gate)                \
    template <>                                             \
    void conv<groups, wide, norm, taps, gate>(const ConvWork) { \
        emulator::wrong("a kernel was not compiled");       \
    }
#define NONE_OF(groups, wide, norm) NONE(groups, wide, norm, 1, 0) NONE(groups, wide, norm, 1, 1) NONE(groups, wide, norm, 9, 0)
#define NONE_SO_WIDE(wide)  \
    NONE_OF(1, wide, false) \
    NONE_OF(2, wide, false) \
    NONE_OF(1, wide, true)  \
    NONE_OF(2, wide, true)
#if EMULATE_WIDE != 64
NONE_SO_WIDE(64)
#endif
#if EMULATE_WIDE != 128
NONE_SO_WIDE(128)
#endif
#if EMULATE_WIDE != 256
NONE_SO_WIDE(256)
#endif
NONE_SO_WIDE(192)
NONE_OF(1, EMULATE_WIDE, !EMULATE_NORM)
NONE_OF(2, EMULATE_WIDE, !EMULATE_NORM)
}  // namespace canny
#endif

// Do one convolution; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int emulate_conv(const CannyConv* call, int order) {
    try {
        auto launch = [&](auto kernel, dim3 grid, int cluster, int threads, int bytes, const auto& p) {
            emulator::launch<const canny::ConvWork>(kernel, grid, cluster, threads, bytes, p, order);
            return true;
        };
        return canny::run_conv(*call, launch) ? 0 : 1;
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}

// How a call is cut, as in kernel.h.
extern "C" void canny_conv_plan(const CannyConv* call, int32_t* out) { canny::conv_facts(*call, out); }
