// The kernels of plugins/tokens, as they are written, on a CPU.
#define EMULATE_CUDA
#include "kernel.cuh"

// Do one call; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int canny_layer_norm(const CannyLayerNorm* call, int order) {
    return emulator::status([&] { return canny::run_layer_norm(*call, emulator::launcher(order)); });
}

extern "C" int canny_geglu(const CannyGeglu* call, int order) {
    return emulator::status([&] { return canny::run_geglu(*call, emulator::launcher(order)); });
}

extern "C" int canny_add(const CannyAdd* call, int order) {
    return emulator::status([&] { return canny::run_add(*call, emulator::launcher(order)); });
}

extern "C" int canny_join(const CannyJoin* call, int order) {
    return emulator::status([&] { return canny::run_join(*call, emulator::launcher(order)); });
}

// What gates make of so many numbers, before anything is rounded to half precision.
extern "C" void emulate_gelu(const float* x, float* y, int count) {
    for (int i = 0; i < count; i++) y[i] = canny::gelu(x[i]);
}
