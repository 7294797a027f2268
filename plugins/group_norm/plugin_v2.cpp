// GroupNorm for TensorRT 8.6, as an IPluginV2DynamicExt.
#include "adapter.h"

#if NV_TENSORRT_MAJOR != 8
#error "plugin_v2.cpp is for TensorRT 8.6; plugin_v3.cpp is for 10 and newer"
#endif

namespace canny {
namespace {

using namespace nvinfer1;

class GroupNormV2 : public IPluginV2DynamicExt {
public:
    explicit GroupNormV2(const Fields& fields) : fields_(fields) {}

    AsciiChar const* getPluginType() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t initialize() noexcept override {
        cluster_ = canny_max_cluster();
        return 0;
    }

    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(AsciiChar const* space) noexcept override { namespace_ = space; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    DataType getOutputDataType(int32_t, DataType const* types, int32_t) const noexcept override { return types[0]; }

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new GroupNormV2(fields_);
        copy->namespace_ = namespace_;
        copy->cluster_ = cluster_;
        return copy;
    }

    size_t getSerializationSize() const noexcept override { return sizeof fields_; }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &fields_, sizeof fields_); }

    DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t, IExprBuilder&) noexcept override {
        return inputs[0];
    }

    bool supportsFormatCombination(
        int32_t pos, PluginTensorDesc const* tensors, int32_t inputs, int32_t outputs
    ) noexcept override {
        return supports(fields_, pos, inputs, outputs, [&](int32_t i) -> PluginTensorDesc const& {
            return tensors[i];
        });
    }

    void configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t
    ) noexcept override {
        std::string wrong =
            shape_fault(fields_, inputs, [&](int32_t i) -> PluginTensorDesc const& { return in[i].desc; });
        if (!wrong.empty()) complain(wrong);
    }

    size_t getWorkspaceSize(
        PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t
    ) const noexcept override {
        return workspace_bytes(fields_, in[0]);
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* from, void* const* to, void* workspace,
        cudaStream_t stream
    ) noexcept override {
        return canny::enqueue(fields_, cluster_, in, from, to, workspace, stream);
    }

private:
    Fields fields_;
    int32_t cluster_ = 0;
    std::string namespace_;
};

class Creator : public IPluginCreator {
public:
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &names_.all; }
    void setPluginNamespace(AsciiChar const* space) noexcept override { namespace_ = space; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* collection) noexcept override {
        Fields fields;
        return made(read_fields(collection, fields), fields);
    }

    IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t size) noexcept override {
        Fields fields;
        if (size != sizeof fields)
            return made(
                "its part of the plan has " + std::to_string(size) + " bytes instead of " +
                    std::to_string(sizeof fields),
                fields
            );
        std::memcpy(&fields, data, sizeof fields);
        return made(fault(fields), fields);
    }

private:
    IPluginV2* made(const std::string& wrong, const Fields& fields) noexcept {
        if (!wrong.empty()) {
            complain(wrong);
            return nullptr;
        }
        auto* plugin = new GroupNormV2(fields);
        plugin->setPluginNamespace(namespace_.c_str());
        return plugin;
    }

    Collection names_;
    std::string namespace_;
};

}  // namespace
}  // namespace canny

// What TensorRT looks for when it loads a library; its own TENSORRTAPI exports nothing from other libraries.
CANNY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { canny::logger_finder = finder; }

CANNY_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    static canny::Creator creator;
    static nvinfer1::IPluginCreator* const creators[] = {&creator};
    count = 1;
    return creators;
}
