// The plugin CannyCross, whatever the TensorRT: one half of a cross-attention over a text that is multiplied out.
#pragma once

#include "../tensorrt/plugin.h"
#include "../tokens/map.h"
#include "kernel.h"
#include "plan.h"

namespace canny {

struct CrossOp {
    struct Fields {
        int32_t version = kFieldsVersion, values = 0, heads = 0, beside = 0;
        float epsilon = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyCross";
    static constexpr std::array<Field, 5> fields{
        {{"version", false, offsetof(Fields, version)},
         {"values", false, offsetof(Fields, values)},
         {"heads", false, offsetof(Fields, heads)},
         {"beside", false, offsetof(Fields, beside)},
         {"epsilon", true, offsetof(Fields, epsilon)}}
    };

    static std::string fault(const Fields& f) {
        std::string wrong = no_switch("values", f.values);
        if (wrong.empty()) wrong = no_switch("beside", f.beside);
        if (wrong.empty() && (f.heads < 4 || f.heads > 64 || f.heads % 4))
            wrong = "heads is " + std::to_string(f.heads) + ", but must be a multiple of 4, up to 64";
        return wrong.empty() ? no_positive("epsilon", f.epsilon) : wrong;
    }

    // x (b, C, h, w) and text (B, P, 1, S), see `text_weight` of trt_builder/text.py: the words' weights (B, heads·80, h, w).
    // With values: those, text, bias (C) and a residual (b, C, h, w): the sum of values (B, C, h, w). Either takes the b
    // rows in turn.
    static int32_t inputs(const Fields& f) { return f.values ? 4 : 2; }

    static nvinfer1::DimsExprs output(const Fields& f, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        y.d[0] = in[1].d[0];
        y.d[1] = f.values ? in[2].d[0] : build.constant(f.heads * kConvWords);
        return y;
    }

    static bool supports(const Fields& f, int32_t pos, const Tensor* tensors) {
        return f.values && pos == 2 ? is_plain_float(tensors[pos]) : is_token_map(tensors[pos]);
    }

    // What is wrong with the shapes of the inputs; empty where nothing is.
    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims &x = in[0].dims, &text = in[1].dims;
        if (x.nbDims != 4 || x.d[1] % 64) return "its first input must have the shape (B, C, h, w), C a multiple of 64";
        int32_t columns = f.heads * kConvWords;
        if (f.values) {
            const nvinfer1::Dims &bias = in[2].dims, &residual = in[3].dims;
            bool same = residual.nbDims == 4 && residual.d[2] == x.d[2] && residual.d[3] == x.d[3];
            if (x.d[1] != columns) return "its first input must have " + std::to_string(columns) + " channels";
            if (bias.nbDims != 1 || bias.d[0] % 64) return "the bias must have the shape (C), C a multiple of 64";
            if (!same || residual.d[1] != bias.d[0] || x.d[0] % residual.d[0])
                return "the residual must have the shape of the result, or that of a part of the batch";
        }
        int32_t channels = int32_t(f.values ? in[2].dims.d[0] : x.d[1]), least = (2 * channels + 1) * f.heads;
        bool fits = text.nbDims == 4 && text.d[2] == 1 && text.d[1] % 8 == 0 && text.d[1] >= least;
        if (!fits || text.d[3] > kConvWords || text.d[0] % x.d[0])
            return "the text must have the shape (B, P, 1, S), P at least " + std::to_string(least) + ", S at most " +
                   std::to_string(kConvWords);
        return f.values && text.d[0] != x.d[0] ? "the text must have the batch of the words' weights" : "";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        const nvinfer1::Dims &x = in[0].dims, &text = in[1].dims;
        CannyConv call{from[0], from[1]};
        call.bias = f.values ? static_cast<const float*>(from[2]) : nullptr;
        call.residual = f.values ? from[3] : nullptr;
        call.y = to;
        call.batch = int32_t(text.d[0]);
        call.height = int32_t(x.d[2]);
        call.width = int32_t(x.d[3]);
        call.channels = int32_t(x.d[1]);
        call.filters = f.values ? int32_t(in[2].dims.d[0]) : f.heads * kConvWords;
        call.size = call.stride = 1;
        call.residual_batch = f.values ? int32_t(in[3].dims.d[0]) : 0;
        call.epsilon = f.epsilon;
        call.beside = f.beside;
        call.cross = 1 + f.values;
        call.x_batch = int32_t(x.d[0]);
        call.words = int32_t(text.d[3]);
        call.text_pitch = int32_t(text.d[1]);
        return canny_conv(&call, stream);
    }
};

}  // namespace canny
