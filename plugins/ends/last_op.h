// The plugin CannyLast, whatever the TensorRT: the last convolution, guidance and the update of x.
#pragma once

#include "../tensorrt/plugin.h"
#include "../tokens/map.h"
#include "kernel.h"

namespace canny {

struct LastOp {
    struct Fields {
        int32_t version = kFieldsVersion, cond = 0;  // cond: of the prompt's half alone
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyLast";
    static constexpr std::array<Field, 2> fields{
        {{"version", false, offsetof(Fields, version)}, {"cond", false, offsetof(Fields, cond)}}
    };

    static std::string fault(const Fields& f) { return no_switch("cond", f.cond); }

    // x (N, F, h, w), F up to 8; h (2·N, C, h, w), or cond's (N, C, h, w), C a multiple of 8; weight (9, F, C) as
    // plugins.load.last_rows makes it; bias (F), guidance (1), e1, e2 and noise as x, coefficients (4); with cond the
    // last difference, as x.
    static int32_t inputs(const Fields& f) { return 9 + f.cond; }

    // e, x_next and, but with cond, difference, as x.
    static int32_t outputs(const Fields& f) { return 3 - f.cond; }

    static nvinfer1::DimsExprs output(
        const Fields&, int32_t, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&
    ) {
        return in[0];
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        const Tensor& it = tensors[pos];
        if (pos == 1) return is_token_map(it);
        if (pos != 2) return is_plain_float(it);
        return it.type == nvinfer1::DataType::kHALF && it.format == nvinfer1::TensorFormat::kLINEAR;
    }

    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims &x = in[0].dims, &h = in[1].dims, &weight = in[2].dims;
        auto is_row = [&](int32_t i, int64_t count) { return in[i].dims.nbDims == 1 && in[i].dims.d[0] == count; };
        if (x.nbDims != 4 || x.d[1] > 8) return "x must have the shape (N, F, h, w), F up to 8";
        auto rows = (2 - f.cond) * x.d[0];
        if (h.nbDims != 4 || h.d[0] != rows || h.d[1] % 8 || h.d[2] != x.d[2] || h.d[3] != x.d[3])
            return "its second input must have the size of x, " + std::to_string(rows) +
                   " rows and a multiple of 8 channels";
        if (weight.nbDims != 3 || weight.d[0] != 9 || weight.d[1] != x.d[1] || weight.d[2] != h.d[1])
            return "the weight must have the shape (9, " + std::to_string(x.d[1]) + ", " + std::to_string(h.d[1]) + ")";
        if (!is_row(3, x.d[1])) return "the bias must have " + std::to_string(x.d[1]) + " numbers";
        for (int32_t i : {5, 6, 7, 9})
            if (i < inputs(f) && !same_shape(in[i].dims, x))
                return "e1, e2, noise and difference must have the shape of x";
        if (!is_row(4, 1)) return "guidance must have the shape (1)";
        return is_row(8, 4) ? "" : "coefficients must have the shape (4)";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* const* to, void*, cudaStream_t stream
    ) {
        auto input = [&](int32_t i) { return static_cast<const float*>(from[i]); };
        auto output = [&](int32_t i) { return static_cast<float*>(to[i]); };
        const nvinfer1::Dims& x = in[0].dims;
        CannyLast call{from[1], from[2], input(3), input(0), input(4), input(5), input(6), input(7), input(8)};
        call.kept = f.cond ? input(9) : nullptr;
        call.e = output(0);
        call.x_next = output(1);
        call.difference = f.cond ? nullptr : output(2);
        call.samples = int32_t(x.d[0]);
        call.channels = int32_t(in[1].dims.d[1]);
        call.height = int32_t(x.d[2]);
        call.width = int32_t(x.d[3]);
        call.filters = int32_t(x.d[1]);
        return canny_last(&call, stream);
    }
};

}  // namespace canny
