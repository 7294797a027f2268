// The plugin CannyFirst, whatever the TensorRT: the first convolution, of a latent in float to a map in half precision.
#pragma once

#include "../tensorrt/plugin.h"
#include "../tokens/map.h"
#include "kernel.h"

namespace canny {

struct FirstOp {
    struct Fields {
        // hint: whether one is added; repeat: how often the second output has the first one, 0 where there is none
        int32_t version = kFieldsVersion, hint = 0, repeat = 0;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyFirst";
    static constexpr std::array<Field, 3> fields{
        {{"version", false, offsetof(Fields, version)},
         {"hint", false, offsetof(Fields, hint)},
         {"repeat", false, offsetof(Fields, repeat)}}
    };
    static constexpr nvinfer1::DataType type = nvinfer1::DataType::kHALF;  // of its outputs

    static std::string fault(const Fields& f) {
        if (f.repeat < 0 || f.repeat == 1)
            return "repeat is " + std::to_string(f.repeat) + ", but must be 0, or 2 or more";
        return no_switch("hint", f.hint);
    }

    // x (N, C, h, w), C up to 8; weight (D / 64, 18 or 36, 128) as plugins.load.first_blocks makes it; bias (D), D a
    // multiple of 8; with hint (1 or N, D, h, w).
    static int32_t inputs(const Fields& f) { return 3 + f.hint; }

    // y (N, D, h, w) and, but without repeat, (repeat·N, D, h, w).
    static int32_t outputs(const Fields& f) { return f.repeat ? 2 : 1; }

    static nvinfer1::DimsExprs output(
        const Fields& f, int32_t i, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build
    ) {
        nvinfer1::DimsExprs y = in[0];
        if (i) y.d[0] = build.operation(nvinfer1::DimensionOperation::kPROD, *y.d[0], *build.constant(f.repeat));
        y.d[1] = in[2].d[0];
        return y;
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        return pos < 3 ? is_plain_float(tensors[pos]) : is_token_map(tensors[pos]);
    }

    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims &x = in[0].dims, &weight = in[1].dims, &bias = in[2].dims, &hint = in[3].dims;
        if (x.nbDims != 4 || x.d[1] > 8) return "x must have the shape (N, C, h, w), C up to 8";
        if (bias.nbDims != 1 || bias.d[0] % 8) return "the bias must have the shape (D), D a multiple of 8";
        int32_t pairs = x.d[1] <= 4 ? 18 : 36;
        if (weight.nbDims != 3 || weight.d[0] != (bias.d[0] + 63) / 64 || weight.d[1] != pairs || weight.d[2] != 128)
            return "the weight must have the shape (D / 64, " + std::to_string(pairs) + ", 128)";
        if (!f.hint) return "";
        bool fits = hint.nbDims == 4 && (hint.d[0] == 1 || hint.d[0] == x.d[0]) && hint.d[1] == bias.d[0] &&
                    hint.d[2] == x.d[2] && hint.d[3] == x.d[3];
        return fits ? "" : "the hint must have the shape of the result, or that of one sample";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* const* to, void*, cudaStream_t stream
    ) {
        auto input = [&](int32_t i) { return static_cast<const float*>(from[i]); };
        const nvinfer1::Dims& x = in[0].dims;
        CannyFirst call{input(0), input(1), input(2), f.hint ? from[3] : nullptr, to[0], f.repeat ? to[1] : nullptr};
        call.samples = int32_t(x.d[0]);
        call.channels = int32_t(x.d[1]);
        call.height = int32_t(x.d[2]);
        call.width = int32_t(x.d[3]);
        call.filters = int32_t(in[2].dims.d[0]);
        call.hint_batch = f.hint ? int32_t(in[3].dims.d[0]) : 0;
        call.repeat = f.repeat;
        return canny_first(&call, stream);
    }
};

}  // namespace canny
