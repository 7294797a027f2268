// What TensorRT's plugins share: their fields, and where they say what is wrong.
//
// A plugin is a type `Op` with a struct `Fields` whose first member is `version`, the table `fields` of its members,
// and functions of what TensorRT asks; plugin_v2.cpp and plugin_v3.cpp give it to TensorRT. It has one output, of the
// type of its first input, or of its own `type`. With a function `outputs` it has as many as that says, all of this
// type; `output` is then asked for each, and `enqueue` gets all their addresses.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>

#include <NvInferRuntime.h>

#include "../group_norm/kernel.h"

namespace canny {

constexpr char kPluginVersion[] = "1";
constexpr int32_t kFieldsVersion = 1;  // of what a plan holds; another one is refused
constexpr int32_t kMostTensors = 12;

// A field of a plugin: an int32, or a float where it is `real`.
struct Field {
    const char* name;
    bool real;
    size_t offset;
};

template <typename Op, typename = void>
constexpr bool kSeveralOutputs = false;
template <typename Op>
constexpr bool kSeveralOutputs<Op, std::void_t<decltype(&Op::outputs)>> = true;

template <typename Op>
int32_t outputs_of(const typename Op::Fields& fields) {
    if constexpr (kSeveralOutputs<Op>)
        return Op::outputs(fields);
    else
        return 1;
}

template <typename Op>
nvinfer1::DimsExprs output_of(
    const typename Op::Fields& fields, int32_t i, const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& build
) {
    if constexpr (kSeveralOutputs<Op>)
        return Op::output(fields, i, in, build);
    else
        return Op::output(fields, in, build);
}

template <typename Op, typename = void>
constexpr bool kOwnType = false;
template <typename Op>
constexpr bool kOwnType<Op, std::void_t<decltype(Op::type)>> = true;

// The type of the outputs, of those of the inputs.
template <typename Op>
nvinfer1::DataType type_of(const nvinfer1::DataType* inputs) {
    if constexpr (kOwnType<Op>)
        return Op::type;
    else
        return inputs[0];
}

// TensorRT's logger, which it names when it loads the library.
inline nvinfer1::ILoggerFinder* logger_finder = nullptr;

template <typename Op>
void complain(const std::string& sentence) {
    std::string text = std::string(Op::name) + ": " + sentence + ".";
    nvinfer1::ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } else {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
}

// What is wrong with the fields; empty where nothing is.
template <typename Op>
std::string fault(const typename Op::Fields& fields) {
    if (fields.version != kFieldsVersion)
        return "its fields are of version " + std::to_string(fields.version) + ", but this library reads version " +
               std::to_string(kFieldsVersion) + ": build library and engines from the same sources";
    return Op::fault(fields);
}

// "silu is 7, but must be 0 or 1"; empty where it is.
inline std::string no_switch(const char* name, int32_t value) {
    return value == 0 || value == 1 ? "" : std::string(name) + " is " + std::to_string(value) + ", but must be 0 or 1";
}

// "epsilon is -1.000000, but must be positive"; empty where it is, and finite.
inline std::string no_positive(const char* name, float value) {
    bool positive = value > 0.f && std::isfinite(value);
    return positive ? "" : std::string(name) + " is " + std::to_string(value) + ", but must be positive";
}

// Fields out of a collection that has each of them once and no other; returns what is wrong.
template <typename Op>
std::string read_fields(const nvinfer1::PluginFieldCollection* collection, typename Op::Fields& fields) {
    using Type = nvinfer1::PluginFieldType;
    std::array<bool, Op::fields.size()> seen{};
    for (int32_t i = 0; collection && i < collection->nbFields; i++) {
        const nvinfer1::PluginField& field = collection->fields[i];
        size_t k = 0;
        while (k < seen.size() && std::strcmp(Op::fields[k].name, field.name)) k++;
        if (k == seen.size()) return "it has no field " + std::string(field.name);
        Type type = Op::fields[k].real ? Type::kFLOAT32 : Type::kINT32;
        if (field.type != type || field.length > 1 || !field.data || seen[k])
            return "the field " + std::string(field.name) + " must be one " + (Op::fields[k].real ? "float" : "int32") +
                   ", given once";
        std::memcpy(reinterpret_cast<char*>(&fields) + Op::fields[k].offset, field.data, 4);
        seen[k] = true;
    }
    for (size_t k = 0; k < seen.size(); k++)
        if (!seen[k]) return "the field " + std::string(Op::fields[k].name) + " is missing";
    return fault<Op>(fields);
}

// The fields that a creator tells, or those of a plugin with their values.
template <typename Op>
struct Collection {
    nvinfer1::PluginField fields[Op::fields.size()];
    nvinfer1::PluginFieldCollection all{int32_t(Op::fields.size()), fields};

    explicit Collection(const typename Op::Fields* values = nullptr) {
        using Type = nvinfer1::PluginFieldType;
        for (size_t k = 0; k < Op::fields.size(); k++) {
            const Field& field = Op::fields[k];
            const char* value = values ? reinterpret_cast<const char*>(values) + field.offset : nullptr;
            fields[k] = {field.name, value, field.real ? Type::kFLOAT32 : Type::kINT32, 1};
        }
    }
    Collection(const Collection&) = delete;  // it points into itself
};

// Whether all dimensions of tensors are known.
inline bool known(const nvinfer1::PluginTensorDesc* tensors, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        for (int32_t k = 0; k < tensors[i].dims.nbDims; k++)
            if (tensors[i].dims.d[k] < 0) return false;
    return true;
}

// "its input 1 of 3 is empty, but no dimension may be 0"; empty where none is. Checks of shapes divide by them.
inline std::string no_numbers(const nvinfer1::PluginTensorDesc* tensors, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        for (int32_t k = 0; k < tensors[i].dims.nbDims; k++)
            if (tensors[i].dims.d[k] == 0)
                return "its input " + std::to_string(i + 1) + " of " + std::to_string(count) +
                       " is empty, but no dimension may be 0";
    return "";
}

// What is wrong with the inputs; empty where nothing is or not all dimensions are known yet.
template <typename Op>
std::string input_fault(const typename Op::Fields& fields, const nvinfer1::PluginTensorDesc* in, int32_t count) {
    if (count != Op::inputs(fields))
        return "it has " + std::to_string(count) + " inputs, but must have " + std::to_string(Op::inputs(fields));
    std::string wrong = no_numbers(in, count);
    return wrong.empty() && known(in, count) ? Op::shape_fault(fields, in) : wrong;
}

// Whether tensor `pos` may have its type and format, those before it having theirs; the outputs are the last.
template <typename Op>
bool supports(
    const typename Op::Fields& fields, int32_t pos, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
    int32_t outputs
) {
    return inputs == Op::inputs(fields) && outputs == outputs_of<Op>(fields) && pos >= 0 && pos < inputs + outputs &&
           Op::supports(fields, pos, tensors);
}

// Enqueue; returns 0 or, having said so, a cudaError_t.
template <typename Op>
int32_t enqueue(
    const typename Op::Fields& fields, int32_t& max_cluster, const nvinfer1::PluginTensorDesc* in,
    const void* const* from, void* const* to, void* workspace, cudaStream_t stream
) {
    if (!max_cluster) max_cluster = canny_max_cluster();
    int32_t error = 0;
    if constexpr (kSeveralOutputs<Op>)
        error = Op::enqueue(fields, max_cluster, in, from, to, workspace, stream);
    else
        error = Op::enqueue(fields, max_cluster, in, from, to[0], workspace, stream);
    if (error) complain<Op>("its kernel was not launched: " + std::string(cudaGetErrorString(cudaError_t(error))));
    return error;
}

}  // namespace canny
