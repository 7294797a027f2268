// The plugin CannyUpdate, whatever the TensorRT: guidance and the update of x, the end of a step.
#pragma once

#include "../tensorrt/plugin.h"
#include "kernel.h"
#include "map.h"

namespace canny {

struct UpdateOp {
    struct Fields {
        int32_t version = kFieldsVersion, cond = 0;  // cond: of the prompt's half alone
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyUpdate";
    static constexpr std::array<Field, 2> fields{
        {{"version", false, offsetof(Fields, version)}, {"cond", false, offsetof(Fields, cond)}}
    };

    static std::string fault(const Fields& f) { return no_switch("cond", f.cond); }

    // x (N, C, h, w), both (2·N, C, h, w), or cond (N, C, h, w), guidance (1), e1, e2 and noise as x, coefficients (4);
    // with cond the last difference, as x.
    static int32_t inputs(const Fields& f) { return 7 + f.cond; }

    // e, x_next and, but with cond, difference, as x.
    static int32_t outputs(const Fields& f) { return 3 - f.cond; }

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&) {
        return in[0];
    }

    // The second as a convolution leaves it, which TensorRT would else convert; all others in float.
    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        const Tensor& it = tensors[pos];
        bool half = it.type == nvinfer1::DataType::kHALF && it.format == nvinfer1::TensorFormat::kLINEAR;
        return is_plain_float(it) || (pos == 1 && (half || is_token_map(it)));
    }

    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims& x = in[0].dims;
        nvinfer1::Dims made = x;
        made.d[0] *= 2 - f.cond;
        if (x.nbDims != 4) return "x must have the shape (N, C, h, w)";
        if (!same_shape(in[1].dims, made))
            return "its second input must have the shape of x, with " + std::to_string(made.d[0]) + " rows";
        for (int32_t i : {3, 4, 5, 7})
            if (i < inputs(f) && !same_shape(in[i].dims, x))
                return "e1, e2, noise and difference must have the shape of x";
        if (in[2].dims.nbDims != 1 || in[2].dims.d[0] != 1) return "guidance must have the shape (1)";
        return in[6].dims.nbDims == 1 && in[6].dims.d[0] == 4 ? "" : "coefficients must have the shape (4)";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* const* to, void*, cudaStream_t stream
    ) {
        auto input = [&](int32_t i) { return static_cast<const float*>(from[i]); };
        auto output = [&](int32_t i) { return static_cast<float*>(to[i]); };
        const nvinfer1::Dims& x = in[0].dims;
        CannyUpdate call{input(0), from[1], input(2), input(3), input(4), input(5), input(6)};
        call.kept = f.cond ? input(7) : nullptr;
        call.e = output(0);
        call.x_next = output(1);
        call.difference = f.cond ? nullptr : output(2);
        call.samples = int32_t(x.d[0]);
        call.channels = int32_t(x.d[1]);
        call.positions = int32_t(x.d[2] * x.d[3]);
        call.half = in[1].type == nvinfer1::DataType::kHALF;
        call.pitch = is_token_map(in[1]) ? (call.channels + 7) / 8 * 8 : 0;
        return canny_update(&call, stream);
    }
};

}  // namespace canny
