// The GroupNorm kernels of plugins/group_norm, as they are written, on a CPU.
#define EMULATE_CUDA
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

extern "C" uint64_t group_norm_workspace(const CannyGroupNorm* call) { return canny::plan_of(*call).workspace; }

extern "C" void group_norm_plan(const CannyGroupNorm* call, int32_t out[7]) {
    canny::Plan plan = canny::plan_of(*call);
    int32_t facts[] = {int32_t(plan.path), plan.threads, plan.slices, plan.tiles, call->batch, plan.batches, int32_t(plan.shared)};
    std::copy(facts, facts + 7, out);
}
