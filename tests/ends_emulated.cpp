// The kernels of plugins/ends, as they are written, on a CPU.
#define EMULATE_CUDA
#include "first.cuh"
#include "last.cuh"

// Do one call; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int canny_first(const CannyFirst* call, int order) {
    return emulator::status([&] { return canny::run_first(*call, emulator::launcher(order)); });
}

extern "C" int canny_last(const CannyLast* call, int order) {
    return emulator::status([&] { return canny::run_last(*call, emulator::launcher(order)); });
}
