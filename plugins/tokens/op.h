// The plugins CannyLayerNorm, CannyGeglu, CannyAdd and CannyJoin, whatever the TensorRT. Tokens are the positions of a
// channels-last map.
#pragma once

#include <cmath>

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
        return f.epsilon > 0.f && std::isfinite(f.epsilon)
                   ? ""
                   : "epsilon is " + std::to_string(f.epsilon) + ", but must be positive";
    }

    static int32_t inputs(const Fields&) { return 3; }  // x, scale, bias

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&) {
        return in[0];
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        if (pos == 0 || pos == 3) return is_token_map(tensors[pos]);
        return tensors[pos].type == nvinfer1::DataType::kFLOAT &&
               tensors[pos].format == nvinfer1::TensorFormat::kLINEAR;
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
        bool same = a.nbDims == b.nbDims;
        for (int32_t i = 0; same && i < a.nbDims; i++) same = a.d[i] == b.d[i];
        return same ? token_map_fault(a, 1) : "its inputs must have one shape";
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

// What the UNet's output half begins each block with: a skip with ControlNet's residual behind x.
struct JoinOp {
    struct Fields {
        int32_t version = kFieldsVersion, index = 0;  // index: of the residual's line of scales
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyJoin";
    static constexpr std::array<Field, 2> fields{
        {{"version", false, offsetof(Fields, version)}, {"index", false, offsetof(Fields, index)}}
    };

    static std::string fault(const Fields& f) {
        return f.index >= 0 ? "" : "index is " + std::to_string(f.index) + ", but must not be negative";
    }

    // x (B, C, h, w), skip and residual (B, D, h, w), scales (residuals, B) → (B, C + D, h, w).
    static int32_t inputs(const Fields&) { return 4; }

    static nvinfer1::DimsExprs output(const Fields&, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        y.d[1] = build.operation(nvinfer1::DimensionOperation::kSUM, *in[0].d[1], *in[1].d[1]);
        return y;
    }

    static bool supports(const Fields&, int32_t pos, const Tensor* tensors) {
        if (pos != 3) return is_token_map(tensors[pos]);
        return tensors[pos].type == nvinfer1::DataType::kFLOAT &&
               tensors[pos].format == nvinfer1::TensorFormat::kLINEAR;
    }

    static std::string shape_fault(const Fields& f, const Tensor* in) {
        for (int32_t i = 0; i < 3; i++) {
            std::string wrong = token_map_fault(in[i].dims, 1);
            if (!wrong.empty()) return wrong;
            for (int32_t k = 0; k < 4; k++)
                if (in[i].dims.d[k] != in[k == 1 && i == 2 ? 1 : 0].dims.d[k] && !(k == 1 && i == 1))
                    return "x, skip and residual must be of one batch and size, and the residual of the skip's channels";
        }
        const nvinfer1::Dims& scales = in[3].dims;
        if (scales.nbDims != 2 || scales.d[0] <= f.index || scales.d[1] != in[0].dims.d[0])
            return "scales must have the shape (more than " + std::to_string(f.index) + ", " +
                   std::to_string(in[0].dims.d[0]) + ")";
        return "";
    }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        const nvinfer1::Dims &x = in[0].dims, &skip = in[1].dims;
        CannyJoin call{from[0], from[1], from[2], static_cast<const float*>(from[3]) + f.index * x.d[0], to};
        call.batch = int32_t(x.d[0]);
        call.positions = int32_t(x.d[2] * x.d[3]);
        call.first = int32_t(x.d[1]);
        call.second = int32_t(skip.d[1]);
        return canny_join(&call, stream);
    }
};

}  // namespace canny
