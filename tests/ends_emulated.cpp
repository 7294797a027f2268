// The kernels of plugins/ends, as they are written, on a CPU.
#define EMULATE_CUDA
#include "first.cuh"
#include "last.cuh"

namespace {

template <typename Call, typename Run>
int emulate(const Call& call, int order, Run run) {
    return emulator::status([&] {
        return run(call, [&](auto kernel, dim3 grid, int threads, int bytes, const Call& p) {
            emulator::launch<const Call>(kernel, grid, 1, threads, bytes, p, order);
            return true;
        });
    });
}

}  // namespace

// Do one call; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int canny_first(const CannyFirst* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_first(given...); });
}

extern "C" int canny_last(const CannyLast* call, int order) {
    return emulate(*call, order, [](auto&&... given) { return canny::run_last(given...); });
}
