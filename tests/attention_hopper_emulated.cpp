// The attention kernels of plugins/attention/hopper.cuh, as they are written, on a CPU.
#define EMULATE_CUDA
#include "hopper.cuh"

// Do one attention; 0, 1 where there is no such kernel for it, 2 for what the emulator found wrong.
extern "C" int emulate_attention(const CannyAttention* call, int order) {
    return emulator::status([&] {
        auto launch = [&](auto kernel, dim3 grid, int cluster, int threads, int bytes, const canny::HopperWork& work) {
            emulator::launch<const canny::HopperWork>(kernel, grid, cluster, threads, bytes, work, order);
            return true;
        };
        return canny::run_hopper_attention(*call, launch);
    });
}

// How a call is cut: blocks, warpgroups of a block, blocks of a cluster, bytes of shared memory; false where there is
// no such kernel for it.
extern "C" bool attention_cut(const CannyAttention* call, int32_t* out) {
    auto launch = [&](auto, dim3 grid, int, int, int bytes, const canny::HopperWork& work) {
        out[0] = grid.x * grid.y * grid.z, out[1] = work.groups, out[2] = work.splits, out[3] = bytes;
        return true;
    };
    return canny::run_hopper_attention(*call, launch);
}
