// GroupNorm for TensorRT 10 and newer, as an IPluginV3.
#include "adapter.h"

#if NV_TENSORRT_MAJOR < 10
#error "plugin_v3.cpp is for TensorRT 10 and newer; plugin_v2.cpp is for 8.6"
#endif

namespace canny {
namespace {

using namespace nvinfer1;

class GroupNormV3 : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit GroupNormV3(const Fields& fields) : fields_(fields), stored_(&fields_) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
        return static_cast<IPluginV3OneRuntime*>(this);
    }

    IPluginV3* clone() noexcept override {
        auto* copy = new GroupNormV3(fields_);
        copy->cluster_ = cluster_;
        return copy;
    }

    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* out, int32_t, DataType const* in, int32_t) const noexcept override {
        out[0] = in[0];
        return 0;
    }

    int32_t getOutputShapes(
        DimsExprs const* in, int32_t, DimsExprs const*, int32_t, DimsExprs* out, int32_t, IExprBuilder&
    ) noexcept override {
        out[0] = in[0];
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t outputs
    ) noexcept override {
        return supports(fields_, pos, inputs, outputs, [&](int32_t i) -> PluginTensorDesc const& {
            return tensors[i].desc;
        });
    }

    int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t
    ) noexcept override {
        return checked(inputs, [&](int32_t i) -> PluginTensorDesc const& { return in[i].desc; });
    }

    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*, int32_t
    ) noexcept override {
        return checked(inputs, [&](int32_t i) -> PluginTensorDesc const& { return in[i]; });
    }

    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*, int32_t
    ) const noexcept override {
        PluginTensorDesc largest = in[0].desc;
        largest.dims = in[0].max;
        return workspace_bytes(fields_, largest);
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* from, void* const* to, void* workspace,
        cudaStream_t stream
    ) noexcept override {
        return canny::enqueue(fields_, cluster_, in, from, to, workspace, stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        cluster_ = canny_max_cluster();
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &stored_.all; }

private:
    template <typename Desc>
    int32_t checked(int32_t inputs, Desc desc) {
        std::string wrong = shape_fault(fields_, inputs, desc);
        if (!wrong.empty()) complain(wrong);
        return !wrong.empty();
    }

    Fields fields_;
    Collection stored_;
    int32_t cluster_ = 0;
};

class Creator : public IPluginCreatorV3One {
public:
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &names_.all; }

    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* collection, TensorRTPhase
    ) noexcept override {
        Fields fields;
        std::string wrong = read_fields(collection, fields);
        if (wrong.empty()) return new GroupNormV3(fields);
        complain(wrong);
        return nullptr;
    }

private:
    Collection names_;
};

}  // namespace
}  // namespace canny

// What TensorRT looks for when it loads a library; its own TENSORRTAPI exports nothing from other libraries.
CANNY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { canny::logger_finder = finder; }

CANNY_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static canny::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
