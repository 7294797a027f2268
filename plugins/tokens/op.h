// The plugins CannyLayerNorm, CannyGeglu, CannyAdd and CannyJoin, whatever the TensorRT. Tokens are the positions of a
// channels-last map.
#pragma once

#include "../tensorrt/plugin.h"
#include "kernel.h"
#include "map.h"

namespace canny {

struct LayerNormOp {
    struct Fields {
        int32_t version = kFieldsVersion;
        float epsilon = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyLayerNorm";
    static constexpr std::array<Field, 2> fields{
        {{"version", false, offsetof(Fields, version)}, {"epsilon", true, offsetof(Fields, epsilon)}}
    };

    static std::string fault(const Fields& f) {
        return no_positive("epsilon", f.epsilon);
    }

    static int32_t inputs(const Fields&) { return 3; }  // x, scale, bias

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&) {
        return in[0];
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        return pos == 0 || pos == 3 ? is_token_map(tensors[pos]) : is_plain_float(tensors[pos]);
    }

    static std::string shape_fault(const Fields&, const Tensor* in) {
        std::string wrong = token_map_fault(in[0].dims, 1);
        if (!wrong.empty()) return wrong;
        if (in[0].dims.d[1] > 2048) return "it has " + std::to_string(in[0].dims.d[1]) + " channels, at most 2048";
        for (int32_t i = 1; i < 3; i++)
            if (in[i].dims.nbDims != 1 || in[i].dims.d[0] != in[0].dims.d[1])
                return "scale and bias must have " + std::to_string(in[0].dims.d[1]) + " numbers";
        return "";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        const nvinfer1::Dims& x = in[0].dims;
        CannyLayerNorm call{from[0], static_cast<const float*>(from[1]), static_cast<const float*>(from[2]), to};
        call.tokens = int32_t(x.d[0] * x.d[2] * x.d[3]);
        call.channels = int32_t(x.d[1]);
        call.epsilon = f.epsilon;
        return canny_layer_norm(&call, stream);
    }
};

struct GegluOp {
    struct Fields {
        int32_t version = kFieldsVersion;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyGeglu";
    static constexpr std::array<Field, 1> fields{{{"version", false, offsetof(Fields, version)}}};

    static std::string fault(const Fields&) { return ""; }

    static int32_t inputs(const Fields&) { return 1; }  // (B, 2·C, h, w) → (B, C, h, w)

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        y.d[1] = build.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *y.d[1], *build.constant(2));
        return y;
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) { return is_token_map(tensors[pos]); }

    static std::string shape_fault(const Fields&, const Tensor* in) { return token_map_fault(in[0].dims, 2); }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields&, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        const nvinfer1::Dims& x = in[0].dims;
        CannyGeglu call{from[0], to, int32_t(x.d[0] * x.d[2] * x.d[3]), int32_t(x.d[1] / 2)};
        return canny_geglu(&call, stream);
    }
};

// A sum that TensorRT 8.6 cannot fuse with a convolution, for which it would then take a slower kernel.
struct AddOp {
    struct Fields {
        int32_t version = kFieldsVersion;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyAdd";
    static constexpr std::array<Field, 1> fields{{{"version", false, offsetof(Fields, version)}}};

    static std::string fault(const Fields&) { return ""; }

    static int32_t inputs(const Fields&) { return 2; }  // of one shape (B, C, h, w)

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&) {
        return in[0];
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) { return is_token_map(tensors[pos]); }

    static std::string shape_fault(const Fields&, const Tensor* in) {
        const nvinfer1::Dims &a = in[0].dims, &b = in[1].dims;
        return same_shape(a, b) ? token_map_fault(a, 1) : "its inputs must have one shape";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields&, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        CannyAdd call{from[0], from[1], to, 1};
        for (int32_t i = 0; i < 4; i++) call.count *= in[0].dims.d[i];
        return canny_add(&call, stream);
    }
};

// What the UNet's output half begins each block with: a skip and its residual of ControlNet behind x, which may have one.
struct JoinOp {
    struct Fields {
        // Lines of scales: of the skip's residual, and of x's, -1 without one.
        int32_t version = kFieldsVersion, index = 0, x_index = -1;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyJoin";
    static constexpr std::array<Field, 3> fields{
        {{"version", false, offsetof(Fields, version)},
         {"index", false, offsetof(Fields, index)},
         {"x_index", false, offsetof(Fields, x_index)}}
    };

    static std::string fault(const Fields& f) {
        if (f.index < 0) return "index is " + std::to_string(f.index) + ", but must not be negative";
        return f.x_index >= -1 ? "" : "x_index is " + std::to_string(f.x_index) + ", but must be -1 or more";
    }

    // x (B, C, h, w), skip and residual (B, D, h, w), scales (residuals, B or more) and, or not, x's residual
    // → (B, C + D, h, w).
    static int32_t inputs(const Fields& f) { return 4 + (f.x_index >= 0); }

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        y.d[1] = build.operation(nvinfer1::DimensionOperation::kSUM, *in[0].d[1], *in[1].d[1]);
        return y;
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        return pos == 3 ? is_plain_float(tensors[pos]) : is_token_map(tensors[pos]);
    }

    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims &x = in[0].dims, &skip = in[1].dims, &scales = in[3].dims;
        for (const nvinfer1::Dims& one : {x, skip}) {
            std::string wrong = token_map_fault(one, 1);
            if (!wrong.empty()) return wrong;
        }
        if (x.d[0] != skip.d[0] || x.d[2] != skip.d[2] || x.d[3] != skip.d[3])
            return "x and skip must be of one batch and size";
        if (!same_shape(in[2].dims, skip) || (f.x_index >= 0 && !same_shape(in[4].dims, x)))
            return "a residual must have the shape of what it is added to";
        int32_t last = f.index > f.x_index ? f.index : f.x_index;
        if (scales.nbDims != 2 || scales.d[0] <= last || scales.d[1] < x.d[0])
            return "scales must have the shape (more than " + std::to_string(last) + ", " + std::to_string(x.d[0]) +
                   " or more)";
        return "";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        CannyJoin call = call_of(f, in, from);
        call.y = to;
        return canny_join(&call, stream);
    }

    // The call without the address of y.
    static CannyJoin call_of(const Fields& f, const Tensor* in, const void* const* from) {
        const nvinfer1::Dims& x = in[0].dims;
        const float* scales = static_cast<const float*>(from[3]);
        CannyJoin call{from[0], from[1], from[2], scales + f.index * in[3].dims.d[1]};
        if (f.x_index >= 0) {
            call.x_residual = from[4];
            call.x_scales = scales + f.x_index * in[3].dims.d[1];
        }
        call.batch = int32_t(x.d[0]);
        call.positions = int32_t(x.d[2] * x.d[3]);
        call.first = int32_t(x.d[1]);
        call.second = int32_t(in[1].dims.d[1]);
        return call;
    }
};

}  // namespace canny
