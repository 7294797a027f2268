// What both TensorRT plugins of GroupNorm share: fields, formats, and the call of the kernel.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include <NvInferRuntime.h>

#include "kernel.h"

namespace canny {

constexpr char kName[] = "CannyGroupNorm";  // TensorRT has a GroupNorm of its own
constexpr char kPluginVersion[] = "1";
constexpr int kFields = 5;
constexpr int32_t kFieldsVersion = 1;  // of what a plan holds; another one is refused

struct Fields {
    int32_t version = kFieldsVersion, groups = 0, silu = 0, row = 0;
    float epsilon = 0.f;

    int32_t inputs() const { return 3 + row; }  // x, scale, bias and, or not, a row that is added before
};

// TensorRT's logger, which it names when it loads the library.
inline nvinfer1::ILoggerFinder* logger_finder = nullptr;

inline void complain(const std::string& sentence) {
    std::string text = std::string(kName) + ": " + sentence + ".";
    nvinfer1::ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } else {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
}

// What is wrong with the fields; empty where nothing is.
inline std::string fault(const Fields& fields) {
    if (fields.version != kFieldsVersion)
        return "its fields are of version " + std::to_string(fields.version) + ", but this library reads version " +
               std::to_string(kFieldsVersion) + ": build library and engines from the same sources";
    if (fields.groups < 1) return "groups is " + std::to_string(fields.groups) + ", but must be positive";
    if (!(fields.epsilon > 0.f) || !std::isfinite(fields.epsilon))
        return "epsilon is " + std::to_string(fields.epsilon) + ", but must be positive";
    if (fields.silu != 0 && fields.silu != 1) return "silu is " + std::to_string(fields.silu) + ", but must be 0 or 1";
    if (fields.row != 0 && fields.row != 1) return "row is " + std::to_string(fields.row) + ", but must be 0 or 1";
    return "";
}

// Fields out of a collection that has each of them once and no other; returns what is wrong.
inline std::string read_fields(const nvinfer1::PluginFieldCollection* collection, Fields& fields) {
    using Type = nvinfer1::PluginFieldType;
    const struct {
        const char* name;
        Type type;
        void* to;
    } known[] = {
        {"version", Type::kINT32, &fields.version},   {"groups", Type::kINT32, &fields.groups},
        {"epsilon", Type::kFLOAT32, &fields.epsilon}, {"silu", Type::kINT32, &fields.silu},
        {"row", Type::kINT32, &fields.row},
    };
    bool seen[kFields] = {};
    for (int32_t i = 0; collection && i < collection->nbFields; i++) {
        const nvinfer1::PluginField& field = collection->fields[i];
        int k = 0;
        while (k < kFields && std::strcmp(known[k].name, field.name)) k++;
        if (k == kFields) return "it has no field " + std::string(field.name);
        if (field.type != known[k].type || field.length > 1 || !field.data || seen[k])
            return "the field " + std::string(field.name) +
                   " must be one number, given once: epsilon a float, others int32";
        std::memcpy(known[k].to, field.data, 4);
        seen[k] = true;
    }
    for (int k = 0; k < kFields; k++)
        if (!seen[k]) return "the field " + std::string(known[k].name) + " is missing";
    return fault(fields);
}

// The fields that a creator tells, or those of a plugin with their values.
struct Collection {
    nvinfer1::PluginField fields[kFields];
    nvinfer1::PluginFieldCollection all{kFields, fields};

    explicit Collection(const Fields* values = nullptr) {
        using Type = nvinfer1::PluginFieldType;
        fields[0] = {"version", values ? &values->version : nullptr, Type::kINT32, 1};
        fields[1] = {"groups", values ? &values->groups : nullptr, Type::kINT32, 1};
        fields[2] = {"epsilon", values ? &values->epsilon : nullptr, Type::kFLOAT32, 1};
        fields[3] = {"silu", values ? &values->silu : nullptr, Type::kINT32, 1};
        fields[4] = {"row", values ? &values->row : nullptr, Type::kINT32, 1};
    }
    Collection(const Collection&) = delete;  // it points into itself
};

// The call for x and, or null, row; without addresses.
inline CannyGroupNorm call_of(
    const Fields& fields, const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc* row
) {
    CannyGroupNorm call{};
    call.batch = int32_t(x.dims.d[0]);
    call.channels = int32_t(x.dims.d[1]);
    call.positions = 1;
    for (int32_t i = 2; i < x.dims.nbDims; i++) call.positions *= int32_t(x.dims.d[i]);
    call.groups = fields.groups;
    call.row_batch = row ? int32_t(row->dims.d[0]) : 0;
    call.half = x.type == nvinfer1::DataType::kHALF;
    call.channels_last = x.format != nvinfer1::TensorFormat::kLINEAR;
    call.silu = fields.silu;
    call.epsilon = fields.epsilon;
    call.max_cluster = 1;
    return call;
}

// Whether tensor `pos` may have its type and format, those before it having theirs; `desc(i)` describes tensor i.
//
// x is half or float, in the order of its shape or channels-last (half by eights); scale, bias: float; the row and y:
// as x.
template <typename Desc>
bool supports(const Fields& fields, int32_t pos, int32_t inputs, int32_t outputs, Desc desc) {
    using nvinfer1::DataType;
    using nvinfer1::TensorFormat;
    if (inputs != fields.inputs() || outputs != 1 || pos < 0 || pos > inputs) return false;
    const nvinfer1::PluginTensorDesc &it = desc(pos), &x = desc(0);
    if (pos == inputs) return it.type == x.type && it.format == x.format;
    if (pos == 3) return it.type == x.type && it.format == TensorFormat::kLINEAR;
    if (pos > 0) return it.type == DataType::kFLOAT && it.format == TensorFormat::kLINEAR;
    if (it.dims.nbDims < 3) return false;
    bool half = it.type == DataType::kHALF,
         channels_last = it.format == (half ? TensorFormat::kHWC8 : TensorFormat::kHWC);
    if (!half && it.type != DataType::kFLOAT) return false;
    if (!channels_last) return it.format == TensorFormat::kLINEAR;
    if (it.dims.nbDims != 4) return false;
    for (int32_t i = 0; i < 4; i++)
        if (it.dims.d[i] < 1) return true;  // not known yet
    return plan_of(call_of(fields, it, nullptr)).path != Path::kNone;
}

// What is wrong with the shapes of the inputs; empty where nothing is or they are not known yet.
template <typename Desc>
std::string shape_fault(const Fields& fields, int32_t inputs, Desc desc) {
    if (inputs != fields.inputs())
        return "it has " + std::to_string(inputs) + " inputs, but with row " + std::to_string(fields.row) +
               " must have " + std::to_string(fields.inputs());
    const nvinfer1::Dims& x = desc(0).dims;
    for (int32_t i = 0; i < inputs; i++)
        for (int32_t k = 0; k < desc(i).dims.nbDims; k++)
            if (desc(i).dims.d[k] < 0) return "";
    auto channels = std::to_string(x.d[1]);
    if (x.d[1] % fields.groups)
        return channels + " channels are not divisible by " + std::to_string(fields.groups) + " groups";
    for (int32_t i = 1; i < 3; i++)
        if (desc(i).dims.nbDims != 1 || desc(i).dims.d[0] != x.d[1])
            return "scale and bias must have " + channels + " numbers";
    if (!fields.row) return "";
    const nvinfer1::Dims& row = desc(3).dims;
    if (row.nbDims != 2 || row.d[1] != x.d[1] || (row.d[0] != 1 && row.d[0] != x.d[0]))
        return "the row must have the shape (1, " + channels + ") or (" + std::to_string(x.d[0]) + ", " + channels +
               ")";
    return "";
}

// Bytes of workspace for x whatever its format will be.
inline size_t workspace_bytes(const Fields& fields, const nvinfer1::PluginTensorDesc& x) {
    CannyGroupNorm call = call_of(fields, x, nullptr);
    call.channels_last = 1;
    call.half = 1;
    call.force = -1;
    size_t half = canny_group_norm_workspace(&call);
    call.half = 0;
    size_t single = canny_group_norm_workspace(&call);
    return half > single ? half : single;
}

// Enqueue the kernel; `cluster` keeps what the GPU can do, 0 before it is known. Returns 0 or a cudaError_t.
inline int32_t enqueue(
    const Fields& fields, int32_t& cluster, const nvinfer1::PluginTensorDesc* in, const void* const* from,
    void* const* to, void* workspace, cudaStream_t stream
) {
    if (!cluster) cluster = canny_max_cluster();
    CannyGroupNorm call = call_of(fields, in[0], fields.row ? in + 3 : nullptr);
    call.x = from[0];
    call.gamma = static_cast<const float*>(from[1]);
    call.beta = static_cast<const float*>(from[2]);
    call.row = fields.row ? from[3] : nullptr;
    call.y = to[0];
    call.workspace = workspace;
    call.max_cluster = cluster;
    int32_t error = canny_group_norm(&call, stream);
    if (error) {
        std::string shape =
            std::to_string(call.batch) + "x" + std::to_string(call.channels) + "x" + std::to_string(call.positions);
        complain("the kernel for " + shape + " was not launched: " + cudaGetErrorString(cudaError_t(error)));
    }
    return error;
}

}  // namespace canny
