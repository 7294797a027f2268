// The attention kernels of plugins/attention, as they are written, on a CPU.
#define EMULATE_CUDA
#include "kernel.cuh"

// Do one attention; 0, 1 where there is no kernel for it, 2 for what the emulator found wrong.
extern "C" int emulate_attention(const CannyAttention* call, int order) {
    return emulator::status([&] { return canny::run_attention(*call, emulator::launcher(order)); });
}

// How a call is cut: blocks, warps, groups, bytes of shared memory; false where there is no kernel for it.
extern "C" bool attention_cut(const CannyAttention* call, int32_t* out) {
    return canny::run_attention(*call, [&](auto, dim3 grid, int, size_t bytes, const CannyAttention& p) {
        out[0] = grid.x * grid.y * grid.z, out[1] = p.warps, out[2] = p.groups, out[3] = int32_t(bytes);
        return true;
    });
}
