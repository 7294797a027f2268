// The plugin CannyAttention, whatever the TensorRT.
#pragma once

#include "../tensorrt/plugin.h"
#include "../tokens/map.h"
#include "kernel.h"

namespace canny {

struct AttentionOp {
    struct Fields {
        int32_t version = kFieldsVersion, heads = 0, joined = 0, causal = 0;
        float scale = 0.f;
    };
    using Tensor = nvinfer1::PluginTensorDesc;

    static constexpr char name[] = "CannyAttention";
    static constexpr std::array<Field, 5> fields{
        {{"version", false, offsetof(Fields, version)},
         {"heads", false, offsetof(Fields, heads)},
         {"joined", false, offsetof(Fields, joined)},
         {"causal", false, offsetof(Fields, causal)},
         {"scale", true, offsetof(Fields, scale)}}
    };

    static std::string fault(const Fields& f) {
        if (f.heads < 1) return "heads is " + std::to_string(f.heads) + ", but must be positive";
        std::string wrong = no_positive("scale", f.scale);
        if (wrong.empty()) wrong = no_switch("joined", f.joined);
        return wrong.empty() ? no_switch("causal", f.causal) : wrong;
    }

    // q (B, C, h, w), k and v (k·B, S, C) or as q, or all side by side (B, 3·C, h, w); the result is a map like q, of k·B rows.
    // With `causal` the query at position i has the keys 0 to i alone.
    static int32_t inputs(const Fields& f) { return f.joined ? 1 : 3; }

    static nvinfer1::DimsExprs output(const Fields& f, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build) {
        nvinfer1::DimsExprs y = in[0];
        if (f.joined)
            y.d[1] = build.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *y.d[1], *build.constant(3));
        else
            y.d[0] = in[1].d[0];
        return y;
    }

    // Maps are channels-last, which makes their positions tokens in rows; k and v are rows as they are, or maps.
    static bool supports(const Fields& f, int32_t pos, const Tensor* tensors) {
        if (pos == 0 || pos == inputs(f) || tensors[pos].dims.nbDims == 4) return is_token_map(tensors[pos]);
        return tensors[pos].type == nvinfer1::DataType::kHALF && tensors[pos].format == nvinfer1::TensorFormat::kLINEAR;
    }

    // What is wrong with the shapes of the inputs; empty where nothing is.
    static std::string shape_fault(const Fields& f, const Tensor* in) {
        const nvinfer1::Dims& q = in[0].dims;
        int32_t parts = f.joined ? 3 : 1, size = q.nbDims == 4 ? int32_t(q.d[1]) : 0;
        if (size < 1 || size % (parts * f.heads))
            return "its first input must have the shape (B, " + std::string(f.joined ? "3 * " : "") +
                   "heads * width, h, w) with " + std::to_string(f.heads) + " heads";
        int32_t width = size / parts / f.heads;
        if (width != 40 && width != 64 && width != 80 && width != 160)
            return "its heads are " + std::to_string(width) + " wide, but must be 40, 64, 80 or 160";
        if (f.causal && width != 64)
            return "its heads are " + std::to_string(width) + " wide, but must be 64 where causal is 1";
        for (int32_t i = 1; i < inputs(f); i++) {
            const nvinfer1::Dims &k = in[i].dims, &first = in[1].dims;
            int32_t channels = k.nbDims == 3 ? int32_t(k.d[2]) : k.nbDims == 4 ? int32_t(k.d[1]) : 0;
            if (channels != size || k.d[0] % q.d[0] || k.d[0] != first.d[0] || keys(k) != keys(first))
                return "k and v must have the shape (a multiple of " + std::to_string(q.d[0]) + ", S, " +
                       std::to_string(size) + "), or be maps of " + std::to_string(size) + " channels";
        }
        int32_t queries = int32_t(q.d[2] * q.d[3]);
        if (f.causal && !f.joined && keys(in[1].dims) != queries)
            return "causal is 1, but " + std::to_string(queries) + " queries have " +
                   std::to_string(keys(in[1].dims)) + " keys: they must be of one number";
        return "";
    }

    // How many rows each batch of k, tokens or a map, has.
    static int32_t keys(const nvinfer1::Dims& k) { return int32_t(k.nbDims == 4 ? k.d[2] * k.d[3] : k.d[1]); }

    static size_t workspace(const Fields&, const Tensor*) { return 0; }

    // Enqueue the kernel; returns 0 or a cudaError_t.
    static int32_t enqueue(
        const Fields& f, int32_t, const Tensor* in, const void* const* from, void* to, void*, cudaStream_t stream
    ) {
        const nvinfer1::Dims& q = in[0].dims;
        CannyAttention call{};
        call.query_batch = int32_t(q.d[0]);
        call.batch = f.joined ? call.query_batch : int32_t(in[1].dims.d[0]);
        call.heads = f.heads;
        call.tokens = int32_t(q.d[2] * q.d[3]);
        call.keys = f.joined ? call.tokens : keys(in[1].dims);
        call.q_stride = call.kv_stride = int32_t(q.d[1]);
        call.y_stride = f.joined ? call.q_stride / 3 : call.q_stride;
        call.width = call.y_stride / f.heads;
        call.scale = f.scale;
        call.causal = f.causal;
        call.q = from[0];
        call.k = f.joined ? static_cast<const uint16_t*>(from[0]) + call.y_stride : from[1];
        call.v = f.joined ? static_cast<const uint16_t*>(from[0]) + 2 * call.y_stride : from[2];
        call.y = to;
        return canny_attention(&call, stream);
    }
};

}  // namespace canny
