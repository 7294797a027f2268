// The plugin CannyConv, whatever the TensorRT.
#pragma once

#include "../tensorrt/plugin.h"
#include "../tokens/map.h"
#include "kernel.h"

namespace canny {

struct ConvOp {
    struct Fields {
        int32_t version = kFieldsVersion, size = 0, stride = 0, residual = 0, norm = 0, second = 0, gate = 0, beside = 0;
        int32_t up = 0;
        float epsilon = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyConv";
    static constexpr std::array<Field, 10> fields{
        {{"version", false, offsetof(Fields, version)},
         {"size", false, offsetof(Fields, size)},
         {"stride", false, offsetof(Fields, stride)},
         {"residual", false, offsetof(Fields, residual)},
         {"norm", false, offsetof(Fields, norm)},
         {"second", false, offsetof(Fields, second)},
         {"gate", false, offsetof(Fields, gate)},
         {"beside", false, offsetof(Fields, beside)},
         {"up", false, offsetof(Fields, up)},
         {"epsilon", true, offsetof(Fields, epsilon)}}
    };

    static std::string fault(const Fields& f) {
        if (f.size != 1 && f.size != 3) return "size is " + std::to_string(f.size) + ", but must be 1 or 3";
        if (f.stride != 1 && f.stride != 2) return "stride is " + std::to_string(f.stride) + ", but must be 1 or 2";
        std::string wrong = no_switch("residual", f.residual);
        if (wrong.empty()) wrong = no_switch("norm", f.norm);
        if (wrong.empty()) wrong = no_switch("second", f.second);
        if (wrong.empty() && f.second && (f.stride != 1 || f.norm))
            return "second is 1, but only convolutions of stride 1 without a LayerNorm take a second map";
        if (wrong.empty()) wrong = no_switch("gate", f.gate);
        if (wrong.empty()) wrong = no_switch("beside", f.beside);
        if (wrong.empty() && f.gate && (f.size != 1 || f.residual))
            wrong = "gate is 1, but only convolutions of size 1 without a residual take one";
        if (wrong.empty()) wrong = no_switch("up", f.up);
        if (wrong.empty() && f.up && (f.size != 3 || f.stride != 1 || f.residual || f.second))
            wrong = "up is 1, but only convolutions of size 3 and stride 1 without a residual or second map take a doubled one";
        if (!wrong.empty() || !f.norm) return wrong;
        if (f.size != 1) return "norm is 1, but only convolutions of size 1 take a LayerNorm before them";
        return no_positive("epsilon", f.epsilon);
    }

    // x (B, C, h, w), weight (D / 64, C / 64 · size·size, 64, 64) as plugins.load.conv_blocks makes it, bias (D) and
    // perhaps, where x is normalised first, the sums of the filters' weights (D), a second map (B, E, h, w), which adds
    // E / 64 to the weight's second axis, and a residual (1 or B, D, h / stride, w / stride). With gate the filters are 8 of
    // a, 8 of b, 8 of a, …, and the result is a · GELU(b) (B, D / 2, …). With up the result is (B, D, 2·h, 2·w), and the
    // weight (4·D / 64, C / 64 · 4, 64, 64), of what plugins.load.up_phases makes.
    static int32_t inputs(const Fields& f) { return 3 + f.norm + f.second + f.residual; }

    static nvinfer1::DimsExprs output(const Fields& f, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        auto divide = nvinfer1::DimensionOperation::kCEIL_DIV, times = nvinfer1::DimensionOperation::kPROD;
        y.d[1] = f.gate ? build.operation(divide, *in[2].d[0], *build.constant(2)) : in[2].d[0];
        for (int32_t i = 2; i < 4; i++)
            y.d[i] = build.operation(f.up ? times : divide, *y.d[i], *build.constant(f.up ? 2 : f.stride));
        return y;
    }

    static bool supports(const Fields& f, int32_t pos, const Tensor* tensors) {
        if (pos == 0 || pos >= 3 + f.norm) return is_token_map(tensors[pos]);
        auto type = pos == 1 ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kFLOAT;
        return tensors[pos].type == type && tensors[pos].format == nvinfer1::TensorFormat::kLINEAR;
    }

    // What is wrong with the shapes of the inputs; empty where nothing is.
    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims &x = in[0].dims, &weight = in[1].dims, &bias = in[2].dims;
        const nvinfer1::Dims &sums = in[3].dims, &second = in[3].dims, &residual = in[3 + f.norm + f.second].dims;
        auto has_size_of_y = [&](const nvinfer1::Dims& map) {
            bool same = map.nbDims == 4;
            for (int32_t i = 2; i < 4; i++) same = same && map.d[i] == (x.d[i] + f.stride - 1) / f.stride;
            return same;
        };
        if (x.nbDims != 4 || x.d[1] % 64) return "its first input must have the shape (B, C, h, w), C a multiple of 64";
        if (f.second && (!has_size_of_y(second) || second.d[0] != x.d[0] || second.d[1] % 64))
            return "the second map must have the shape (B, E, h, w), E a multiple of 64";
        int32_t taps = f.up ? 4 : f.size * f.size, phases = f.up ? 4 : 1;
        int32_t stages = (taps * int32_t(x.d[1]) + (f.second ? int32_t(second.d[1]) : 0)) / 64;
        bool fits = weight.nbDims == 4 && weight.d[1] == stages && weight.d[2] == 64 && weight.d[3] == 64;
        if (!fits || bias.nbDims != 1 || phases * bias.d[0] != 64 * weight.d[0])
            return std::string("the weight must have the shape (") + (f.up ? "4·" : "") + "D / 64, " +
                   std::to_string(stages) + ", 64, 64) and the bias (D)";
        if (f.norm && (sums.nbDims != 1 || sums.d[0] != bias.d[0]))
            return "the sums of the filters' weights must have the shape (" + std::to_string(bias.d[0]) + ")";
        if (!f.residual) return "";
        bool same = has_size_of_y(residual) && x.d[0] % residual.d[0] == 0 && residual.d[1] == bias.d[0];
        return same ? "" : "the residual must have the shape of the result, or that of a part of the batch";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*,
        cudaStream_t stream
    ) {
        const nvinfer1::Dims& x = in[0].dims;
        CannyConv call{from[0], from[1], static_cast<const float*>(from[2])};
        call.residual = f.residual ? from[3 + f.norm + f.second] : nullptr;
        call.weight_sums = f.norm ? static_cast<const float*>(from[3]) : nullptr;
        call.second = f.second ? from[3] : nullptr;
        call.y = to;
        call.batch = int32_t(x.d[0]);
        call.height = int32_t(x.d[2]);
        call.width = int32_t(x.d[3]);
        call.channels = int32_t(x.d[1]);
        call.filters = int32_t(in[2].dims.d[0]);
        call.size = f.size;
        call.stride = f.stride;
        call.residual_batch = f.residual ? int32_t(in[3 + f.norm + f.second].dims.d[0]) : 0;
        call.second_channels = f.second ? int32_t(in[3].dims.d[1]) : 0;
        call.epsilon = f.epsilon;
        call.gate = f.gate;
        call.beside = f.beside;
        call.up = f.up;
        return canny_conv(&call, stream);
    }
};

}  // namespace canny
