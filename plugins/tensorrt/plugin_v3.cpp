// The plugins for TensorRT 10 and newer, each an IPluginV3.
#include <algorithm>

#include "../attention/op.h"
#include "../conv/cross_op.h"
#include "../conv/op.h"
#include "../ends/first_op.h"
#include "../ends/last_op.h"
#include "../group_norm/join_op.h"
#include "../group_norm/op.h"
#include "../tokens/op.h"

#if NV_TENSORRT_MAJOR < 10
#error "plugin_v3.cpp is for TensorRT 10 and newer; plugin_v2.cpp is for 8.6"
#endif

namespace canny {
namespace {

using namespace nvinfer1;

template <typename Op>
class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    using Fields = typename Op::Fields;

    explicit Plugin(const Fields& fields) : fields_(fields), stored_(&fields_) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
        return static_cast<IPluginV3OneRuntime*>(this);
    }

    IPluginV3* clone() noexcept override {
        auto* copy = new Plugin(fields_);
        copy->cluster_ = cluster_;
        return copy;
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        cluster_ = canny_max_cluster();
        return clone();
    }

    AsciiChar const* getPluginName() const noexcept override { return Op::name; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    int32_t getNbOutputs() const noexcept override { return outputs_of<Op>(fields_); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &stored_.all; }

    int32_t getOutputDataTypes(DataType* out, int32_t, DataType const* in, int32_t) const noexcept override {
        std::fill_n(out, outputs_of<Op>(fields_), type_of<Op>(in));
        return 0;
    }

    int32_t getOutputShapes(
        DimsExprs const* in, int32_t, DimsExprs const*, int32_t, DimsExprs* out, int32_t, IExprBuilder& build
    ) noexcept override {
        for (int32_t i = 0; i < outputs_of<Op>(fields_); i++) out[i] = output_of<Op>(fields_, i, in, build);
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* all, int32_t inputs, int32_t outputs
    ) noexcept override {
        if (inputs + outputs > kMostTensors) return false;
        PluginTensorDesc tensors[kMostTensors] = {};
        for (int32_t i = 0; i <= pos; i++) tensors[i] = all[i].desc;
        return supports<Op>(fields_, pos, tensors, inputs, outputs);
    }

    int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t
    ) noexcept override {
        PluginTensorDesc tensors[kMostTensors] = {};
        for (int32_t i = 0; i < inputs && i < kMostTensors; i++) tensors[i] = in[i].desc;
        return onShapeChange(tensors, inputs, nullptr, 0);
    }

    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*, int32_t
    ) noexcept override {
        std::string wrong = input_fault<Op>(fields_, in, inputs);
        if (!wrong.empty()) complain<Op>(wrong);
        return !wrong.empty();
    }

    size_t getWorkspaceSize(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t
    ) const noexcept override {
        PluginTensorDesc largest[kMostTensors] = {};
        for (int32_t i = 0; i < inputs && i < kMostTensors; i++) {
            largest[i] = in[i].desc;
            largest[i].dims = in[i].max;
        }
        return Op::workspace(fields_, largest);
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* from, void* const* to, void* workspace,
        cudaStream_t stream
    ) noexcept override {
        return canny::enqueue<Op>(fields_, cluster_, in, from, to, workspace, stream);
    }

private:
    Fields fields_;
    Collection<Op> stored_;
    int32_t cluster_ = 0;
};

template <typename Op>
class Creator : public IPluginCreatorV3One {
public:
    AsciiChar const* getPluginName() const noexcept override { return Op::name; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &names_.all; }

    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* collection, TensorRTPhase
    ) noexcept override {
        typename Op::Fields fields;
        std::string wrong = read_fields<Op>(collection, fields);
        if (wrong.empty()) return new Plugin<Op>(fields);
        complain<Op>(wrong);
        return nullptr;
    }

private:
    Collection<Op> names_;
};

}  // namespace
}  // namespace canny

// What TensorRT looks for when it loads a library; its own TENSORRTAPI exports nothing from other libraries.
CANNY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { canny::logger_finder = finder; }

CANNY_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static canny::Creator<canny::GroupNormOp> group_norm;
    static canny::Creator<canny::AttentionOp> attention;
    static canny::Creator<canny::LayerNormOp> layer_norm;
    static canny::Creator<canny::GegluOp> geglu;
    static canny::Creator<canny::AddOp> add;
    static canny::Creator<canny::ConvOp> conv;
    static canny::Creator<canny::JoinOp> join;
    static canny::Creator<canny::JoinNormOp> join_norm;
    static canny::Creator<canny::LastOp> last;
    static canny::Creator<canny::CrossOp> cross;
    static canny::Creator<canny::FirstOp> first;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {
        &group_norm, &attention, &layer_norm, &geglu, &add, &conv, &join, &join_norm, &last, &cross, &first
    };
    count = 11;
    return creators;
}
