// The GroupNorm kernels of plugins/group_norm, as they are written, on a CPU.
#define EMULATE_CUDA
#include "kernel.cuh"
#include "tokens/kernel.cuh"

namespace {

int launches = 0;  // of the last call

// What launches a kernel of GroupNorm.
auto launcher(int order) {
    return [order](auto kernel, dim3 grid, int32_t cluster, const auto& p) {
        using P = std::decay_t<decltype(p)>;
        emulator::launch<const P>(kernel, grid, cluster, p.plan.threads, p.plan.shared, p, order);
        launches++;
        return true;
    };
}

template <typename Run>
int emulate(Run run) {
    launches = 0;
    return emulator::status(run);
}

#ifndef EMULATE_JOINS
bool join(const CannyJoin& call, int order) {
    bool done = canny::run_join(call, emulator::launcher(order));
    launches += done;
    return done;
}
#endif

}  // namespace

// To compile kernels takes longest: EMULATE_JOINS asks for those of a join and a GroupNorm in one launch alone.
#ifdef EMULATE_JOINS
extern "C" int emulate_join_norm(const CannyJoinNorm* call, int order, int) {
    auto absent = [](const auto&) -> bool { throw std::logic_error("its kernels were not compiled"); };
    return emulate([&] { return canny::run(*call, launcher(order), absent, absent); });
}
#else
// Do one GroupNorm; 0, 1 where it has no plan, 2 for what the emulator found wrong.
extern "C" int emulate_group_norm(const CannyGroupNorm* call, int order) {
    return emulate([&] { return canny::run(*call, launcher(order)); });
}

// The same of a join and a GroupNorm; `apart`: whatever they could be.
extern "C" int emulate_join_norm(const CannyJoinNorm* call, int order, int apart) {
    auto first = [&](const CannyJoin& part) { return join(part, order); };
    auto second = [&](const CannyGroupNorm& part) { return canny::run(part, launcher(order)); };
    return emulate([&] {
        return apart ? first(canny::join_of(*call)) && second(canny::norm_of(*call))
                     : canny::run(*call, launcher(order), first, second);
    });
}
#endif

extern "C" int emulated_launches() { return launches; }

extern "C" uint64_t canny_join_norm_workspace(const CannyJoinNorm* call) {
    return canny::plan_of(canny::norm_of(*call)).workspace;
}

extern "C" uint64_t canny_group_norm_workspace(const CannyGroupNorm* call) { return canny::plan_of(*call).workspace; }

extern "C" void canny_group_norm_plan(const CannyGroupNorm* call, int32_t out[7]) { canny::plan_facts(*call, out); }
