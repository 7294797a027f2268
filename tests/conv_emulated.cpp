// The kernels of plugins/conv, as they are written, on a CPU.
#define EMULATE_CUDA
#include "kernel.cuh"

// To compile kernels takes longest. EMULATE_WIDE asks for those of tiles so wide alone, with or without a LayerNorm, which
// EMULATE_NORM says, of 64 and 128 rows, or with EMULATE_TALL of 192. EMULATE_CROSS asks for those of a cross-attention: 1
// for scores, 2 for values, 3 for both.
#ifndef EMULATE_WIDE
#define EMULATE_WIDE 0
#endif
#ifndef EMULATE_NORM
#define EMULATE_NORM 0
#endif
#ifndef EMULATE_TALL
#define EMULATE_TALL 0
#endif
#ifndef EMULATE_CROSS
#define EMULATE_CROSS 0
#endif

static bool absent = false;  // whether a kernel was called that was not asked for

#if EMULATE_WIDE || EMULATE_CROSS
namespace canny {
#define NONE(groups, wide, norm, taps, kind)                    \
    template <>                                                 \
    void conv<groups, wide, norm, taps, kind>(const ConvWork) { \
        absent = true;                                          \
    }
#define NONE_OF(groups, wide, norm)          \
    NONE(groups, wide, norm, 1, kConvPlain)  \
    NONE(groups, wide, norm, 1, kConvGate)   \
    NONE(groups, wide, norm, 9, kConvPlain)  \
    NONE(groups, wide, norm, 4, kConvUp)
#define NONE_SO_WIDE(wide)  \
    NONE_OF(1, wide, false) \
    NONE_OF(2, wide, false) \
    NONE_OF(1, wide, true)  \
    NONE_OF(2, wide, true)
#define NO_SCORES(groups)                                \
    NONE(groups, kConvWords, true, 1, kConvScores)       \
    NONE(groups, 2 * kConvWords, true, 1, kConvScores)
#define NO_VALUES(groups)                      \
    NONE(groups, 64, false, 1, kConvValues)    \
    NONE(groups, 128, false, 1, kConvValues)

#if EMULATE_WIDE != 64 || EMULATE_TALL
NONE_SO_WIDE(64)
#endif
#if EMULATE_WIDE != 128
NONE_SO_WIDE(128)
#endif
#if EMULATE_WIDE != 256
NONE_SO_WIDE(256)
#endif
NONE_SO_WIDE(192)
#if EMULATE_WIDE && !EMULATE_TALL
NONE_OF(1, EMULATE_WIDE, !EMULATE_NORM)
NONE_OF(2, EMULATE_WIDE, !EMULATE_NORM)
#endif
#if EMULATE_TALL
NONE_OF(3, 64, !EMULATE_NORM)
#else
NONE_OF(3, 64, false)
NONE_OF(3, 64, true)
#endif
#if !(EMULATE_CROSS & 1)
NO_SCORES(1)
NO_SCORES(2)
#endif
#if !(EMULATE_CROSS & 2)
NO_VALUES(1)
NO_VALUES(2)
#endif
}  // namespace canny
#endif

// Do one convolution; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong, 3 where its kernel was not
// compiled. turned: tiles of rows are neighbours in the grid where those of filters would be, or the other way round.
static int emulate(const CannyConv& call, int order, bool turned) {
    absent = false;
    int status = emulator::status([&] {
        auto launch = [&](auto kernel, dim3 grid, int cluster, int threads, int bytes, canny::ConvWork work) {
            if (turned) std::swap(grid.y, grid.z), work.params.rows_beside = !work.params.rows_beside;
            emulator::launch<const canny::ConvWork>(kernel, grid, cluster, threads, bytes, work, order);
            return true;
        };
        return canny::run_conv(call, launch);
    });
    return status == 0 && absent ? 3 : status;
}

extern "C" int emulate_conv(const CannyConv* call, int order) { return emulate(*call, order, false); }
extern "C" int emulate_conv_turned(const CannyConv* call, int order) { return emulate(*call, order, true); }

// Whether its tiles of rows are neighbours in the grid, else those of filters.
extern "C" int conv_rows_beside(const CannyConv* call) { return canny::conv_plan(*call).params.rows_beside; }

// How a call is cut, as in kernel.h.
extern "C" void canny_conv_plan(const CannyConv* call, int32_t* out) { canny::conv_facts(*call, out); }
