// Tokens as the positions of a channels-last map, which is how convolutions hand them on.
#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace canny {

// Whether a tensor is a map (B, C, h, w) whose positions are rows of halves in memory: no padding.
inline bool is_token_map(const nvinfer1::PluginTensorDesc& x) {
    return x.type == nvinfer1::DataType::kHALF && x.format == nvinfer1::TensorFormat::kHWC8 && x.dims.nbDims == 4;
}

// Whether a tensor is floats in the order of its shape.
inline bool is_plain_float(const nvinfer1::PluginTensorDesc& x) {
    return x.type == nvinfer1::DataType::kFLOAT && x.format == nvinfer1::TensorFormat::kLINEAR;
}

inline bool same_shape(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
    bool same = a.nbDims == b.nbDims;
    for (int32_t i = 0; same && i < a.nbDims; i++) same = a.d[i] == b.d[i];
    return same;
}

// What is wrong with the shape of a map of tokens; empty where nothing is.
inline std::string token_map_fault(const nvinfer1::Dims& x, int32_t parts) {
    if (x.nbDims == 4 && x.d[1] % (8 * parts) == 0) return "";
    return "its first input must have the shape (B, C, h, w), C a multiple of " + std::to_string(8 * parts);
}

}  // namespace canny
