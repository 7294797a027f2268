// The GroupNorm kernels of plugins/group_norm, as they are written, on a CPU.
#define EMULATE_CUDA
#include <cstdio>

#include "kernel.cuh"

// Do one GroupNorm; 0, 1 where it has no plan, 2 for what the emulator found wrong.
extern "C" int emulate_group_norm(const CannyGroupNorm* call, int order) {
    try {
        bool done = canny::run(*call, [&](auto kernel, dim3 grid, int32_t cluster, const canny::Params& p) {
            emulator::launch<const canny::Params>(kernel, grid, cluster, p.plan.threads, p.plan.shared, p, order);
            return true;
        });
        return done ? 0 : 1;
    } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}

extern "C" uint64_t canny_group_norm_workspace(const CannyGroupNorm* call) { return canny::plan_of(*call).workspace; }

extern "C" void canny_group_norm_plan(const CannyGroupNorm* call, int32_t out[7]) { canny::plan_facts(*call, out); }
