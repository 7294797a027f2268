// The kernels of plugins/tokens, as they are written, on a CPU.
#define EMULATE_CUDA
#include "kernel.cuh"

namespace {

template <typename Call, typename Run>
int emulate(const Call& call, int order, Run run) {
    return emulator::status([&] {
        return run(call, [&](auto kernel, dim3 grid, int threads, const Call& p) {
            emulator::launch<const Call>(kernel, grid, 1, threads, 0, p, order);
            return true;
        });
    });
}

}  // namespace

// Do one call; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int canny_layer_norm(const CannyLayerNorm* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_layer_norm(given...); });
}

extern "C" int canny_geglu(const CannyGeglu* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_geglu(given...); });
}

extern "C" int canny_add(const CannyAdd* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_add(given...); });
}

extern "C" int canny_join(const CannyJoin* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_join(given...); });
}

// What gates make of so many numbers, before anything is rounded to half precision.
extern "C" void emulate_gelu(const float* x, float* y, int count) {
    for (int i = 0; i < count; i++) y[i] = canny::gelu(x[i]);
}
