// The plugin CannyJoinNorm, whatever the TensorRT: CannyJoin, and GroupNorm of what it makes.
#pragma once

#include "../tokens/op.h"
#include "op.h"

namespace canny {

struct JoinNormOp {
    struct Fields {
        int32_t version = kFieldsVersion, index = 0, x_index = -1, groups = 0, silu = 0;
        float epsilon = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyJoinNorm";
    static constexpr std::array<Field, 6> fields{
        {{"version", false, offsetof(Fields, version)},
         {"index", false, offsetof(Fields, index)},
         {"x_index", false, offsetof(Fields, x_index)},
         {"groups", false, offsetof(Fields, groups)},
         {"silu", false, offsetof(Fields, silu)},
         {"epsilon", true, offsetof(Fields, epsilon)}}
    };

    static std::string fault(const Fields& f) {
        std::string wrong = JoinOp::fault(join_of(f));
        return wrong.empty() ? GroupNormOp::fault({f.version, f.groups, f.silu, 0, f.epsilon}) : wrong;
    }

    // Those of CannyJoin, and GroupNorm's scale and bias.
    static int32_t inputs(const Fields& f) { return JoinOp::inputs(join_of(f)) + 2; }

    static int32_t outputs(const Fields&) { return 2; }  // what is joined, and GroupNorm of it

    static nvinfer1::DimsExprs output(
        const Fields& f, int32_t, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build
    ) {
        return JoinOp::output(join_of(f), in, build);
    }

    static bool supports(const Fields& f, int32_t pos, const Tensor* tensors) {
        int32_t scale = inputs(f) - 2;
        bool row = pos == scale || pos == scale + 1;
        return row ? is_plain_float(tensors[pos]) : JoinOp::supports(join_of(f), pos, tensors);
    }

    // What is wrong with the shapes of the inputs; empty where nothing is.
    static std::string shape_fault(const Fields& f, const Tensor* in) {
        std::string wrong = JoinOp::shape_fault(join_of(f), in);
        if (!wrong.empty()) return wrong;
        auto channels = in[0].dims.d[1] + in[1].dims.d[1];
        for (int32_t i = inputs(f) - 2; i < inputs(f); i++)
            if (in[i].dims.nbDims != 1 || in[i].dims.d[0] != channels)
                return "scale and bias must have " + std::to_string(channels) + " numbers";
        if (plan_of(norm_of(call_of(f, in))).path != Path::kNone) return "";
        return "there is no kernel for " + std::to_string(channels) + " channels in " + std::to_string(f.groups) +
               " groups";
    }

    // Bytes of workspace, whatever the GPU.
    static size_t workspace(const Fields& f, const Tensor* in) {
        CannyJoinNorm call = call_of(f, in);
        return canny_join_norm_workspace(&call);
    }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t max_cluster, const Tensor* in, const void* const* from, void* const* to,
        void* workspace, cudaStream_t stream
    ) {
        CannyJoinNorm call = call_of(f, in);
        CannyJoin join = JoinOp::call_of(join_of(f), in, from);
        const void* const* scale = from + inputs(f) - 2;
        call.x = join.x;
        call.skip = join.skip;
        call.residual = join.residual;
        call.scales = join.scales;
        call.x_residual = join.x_residual;
        call.x_scales = join.x_scales;
        call.joined = to[0];
        call.gamma = static_cast<const float*>(scale[0]);
        call.beta = static_cast<const float*>(scale[1]);
        call.y = to[1];
        call.workspace = workspace;
        call.max_cluster = max_cluster;
        return canny_join_norm(&call, stream);
    }

private:
    static JoinOp::Fields join_of(const Fields& f) { return {f.version, f.index, f.x_index}; }

    // The call without addresses.
    static CannyJoinNorm call_of(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims& x = in[0].dims;
        CannyJoinNorm call{};
        call.batch = int32_t(x.d[0]);
        call.positions = int32_t(x.d[2] * x.d[3]);
        call.first = int32_t(x.d[1]);
        call.second = int32_t(in[1].dims.d[1]);
        call.groups = f.groups;
        call.silu = f.silu;
        call.epsilon = f.epsilon;
        call.max_cluster = 1;
        return call;
    }
};

}  // namespace canny
