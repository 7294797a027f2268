// The plugin CannyGroupNorm, whatever the TensorRT.
#pragma once

#include "../tensorrt/plugin.h"
#include "kernel.h"

namespace canny {

struct GroupNormOp {
    struct Fields {
        int32_t version = kFieldsVersion, groups = 0, silu = 0, row = 0;
        float epsilon = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyGroupNorm";  // TensorRT has a GroupNorm of its own
    static constexpr std::array<Field, 5> fields{
        {{"version", false, offsetof(Fields, version)},
         {"groups", false, offsetof(Fields, groups)},
         {"silu", false, offsetof(Fields, silu)},
         {"row", false, offsetof(Fields, row)},
         {"epsilon", true, offsetof(Fields, epsilon)}}
    };

    static std::string fault(const Fields& f) {
        if (f.groups < 1) return "groups is " + std::to_string(f.groups) + ", but must be positive";
        std::string wrong = no_positive("epsilon", f.epsilon);
        return wrong.empty() ? no_switch("silu", f.silu) + no_switch("row", f.row) : wrong;
    }

    // x, scale, bias and, or not, a row that is added before.
    static int32_t inputs(const Fields& f) { return 3 + f.row; }

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&) {
        return in[0];
    }

    // Whether tensor `pos` may have its type and format, those before it having theirs. x is half or float, in the
    // order of its shape or channels-last (half by eights); scale and bias are float; the row and y as x.
    static bool supports(const Fields& f, int32_t pos, const Tensor* tensors) {
        using nvinfer1::DataType;
        using nvinfer1::TensorFormat;
        const Tensor &it = tensors[pos], &x = tensors[0];
        if (pos == inputs(f)) return it.type == x.type && it.format == x.format;
        if (pos == 3) return it.type == x.type && it.format == TensorFormat::kLINEAR;
        if (pos > 0) return it.type == DataType::kFLOAT && it.format == TensorFormat::kLINEAR;
        bool half = it.type == DataType::kHALF;
        if (it.dims.nbDims < 3 || (!half && it.type != DataType::kFLOAT)) return false;
        if (it.format != (half ? TensorFormat::kHWC8 : TensorFormat::kHWC)) return it.format == TensorFormat::kLINEAR;
        if (it.dims.nbDims != 4) return false;
        return !known(&it, 1) || plan_of(call_of(f, tensors, false)).path != Path::kNone;
    }

    // What is wrong with the shapes of the inputs; empty where nothing is.
    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims& x = in[0].dims;
        auto channels = std::to_string(x.d[1]);
        if (x.d[1] % f.groups)
            return channels + " channels are not divisible by " + std::to_string(f.groups) + " groups";
        for (int32_t i = 1; i < 3; i++)
            if (in[i].dims.nbDims != 1 || in[i].dims.d[0] != x.d[1])
                return "scale and bias must have " + channels + " numbers";
        const nvinfer1::Dims& row = in[3].dims;
        if (f.row && (row.nbDims != 2 || row.d[1] != x.d[1] || (row.d[0] != 1 && row.d[0] != x.d[0])))
            return "the row must have the shape (1 or " + std::to_string(x.d[0]) + ", " + channels + ")";
        return "";
    }

    // Bytes of workspace for x whatever its format will be.
    static size_t workspace(const Fields& f, const Tensor* in) {
        CannyGroupNorm call = call_of(f, in, false);
        call.channels_last = 1;
        call.half = 1;
        call.force = -1;
        size_t half = canny_group_norm_workspace(&call);
        call.half = 0;
        size_t single = canny_group_norm_workspace(&call);
        return half > single ? half : single;
    }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t max_cluster, const Tensor* in, const void* const* from, void* to, void* workspace,
        cudaStream_t stream
    ) {
        CannyGroupNorm call = call_of(f, in, f.row);
        call.x = from[0];
        call.gamma = static_cast<const float*>(from[1]);
        call.beta = static_cast<const float*>(from[2]);
        call.row = f.row ? from[3] : nullptr;
        call.y = to;
        call.workspace = workspace;
        call.max_cluster = max_cluster;
        call.overlap = 1;
        return canny_group_norm(&call, stream);
    }

private:
    // The call without addresses.
    static CannyGroupNorm call_of(const Fields& f, const Tensor* in, bool with_row) {
        const Tensor& x = in[0];
        CannyGroupNorm call{};
        call.batch = int32_t(x.dims.d[0]);
        call.channels = int32_t(x.dims.d[1]);
        call.positions = 1;
        for (int32_t i = 2; i < x.dims.nbDims; i++) call.positions *= int32_t(x.dims.d[i]);
        call.groups = f.groups;
        call.row_batch = with_row ? int32_t(in[3].dims.d[0]) : 0;
        call.half = x.type == nvinfer1::DataType::kHALF;
        call.channels_last = x.format != nvinfer1::TensorFormat::kLINEAR;
        call.silu = f.silu;
        call.epsilon = f.epsilon;
        call.max_cluster = 1;
        return call;
    }
};

}  // namespace canny
