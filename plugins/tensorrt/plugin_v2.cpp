// The plugins for TensorRT 8.6, each an IPluginV2DynamicExt.
#include "../attention/op.h"
#include "../conv/cross_op.h"
#include "../conv/op.h"
#include "../ends/first_op.h"
#include "../ends/last_op.h"
#include "../group_norm/join_op.h"
#include "../group_norm/op.h"
#include "../tokens/op.h"

#if NV_TENSORRT_MAJOR != 8
#error "plugin_v2.cpp is for TensorRT 8.6; plugin_v3.cpp is for 10 and newer"
#endif

namespace canny {
namespace {

using namespace nvinfer1;

template <typename Op>
class Plugin : public IPluginV2DynamicExt {
public:
    using Fields = typename Op::Fields;

    explicit Plugin(const Fields& fields) : fields_(fields) {}

    AsciiChar const* getPluginType() const noexcept override { return Op::name; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    int32_t getNbOutputs() const noexcept override { return outputs_of<Op>(fields_); }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(AsciiChar const* space) noexcept override { namespace_ = space; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    DataType getOutputDataType(int32_t, DataType const* types, int32_t) const noexcept override {
        return type_of<Op>(types);
    }
    size_t getSerializationSize() const noexcept override { return sizeof fields_; }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &fields_, sizeof fields_); }

    int32_t initialize() noexcept override {
        cluster_ = canny_max_cluster();
        return 0;
    }

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new Plugin(fields_);
        copy->namespace_ = namespace_;
        copy->cluster_ = cluster_;
        return copy;
    }

    DimsExprs getOutputDimensions(int32_t i, DimsExprs const* in, int32_t, IExprBuilder& build) noexcept override {
        return output_of<Op>(fields_, i, in, build);
    }

    bool supportsFormatCombination(
        int32_t pos, PluginTensorDesc const* tensors, int32_t inputs, int32_t outputs
    ) noexcept override {
        return supports<Op>(fields_, pos, tensors, inputs, outputs);
    }

    void configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*, int32_t
    ) noexcept override {
        PluginTensorDesc tensors[kMostTensors] = {};
        for (int32_t i = 0; i < inputs && i < kMostTensors; i++) tensors[i] = in[i].desc;
        std::string wrong = input_fault<Op>(fields_, tensors, inputs);
        if (!wrong.empty()) complain<Op>(wrong);
    }

    size_t getWorkspaceSize(
        PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t
    ) const noexcept override {
        return Op::workspace(fields_, in);
    }

    int32_t enqueue(
        PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* from, void* const* to, void* workspace,
        cudaStream_t stream
    ) noexcept override {
        return canny::enqueue<Op>(fields_, cluster_, in, from, to, workspace, stream);
    }

private:
    Fields fields_;
    int32_t cluster_ = 0;
    std::string namespace_;
};

template <typename Op>
class Creator : public IPluginCreator {
public:
    using Fields = typename Op::Fields;

    AsciiChar const* getPluginName() const noexcept override { return Op::name; }
    AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &names_.all; }
    void setPluginNamespace(AsciiChar const* space) noexcept override { namespace_ = space; }
    AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* collection) noexcept override {
        Fields fields;
        std::string wrong = read_fields<Op>(collection, fields);
        return made(wrong, fields);
    }

    IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t size) noexcept override {
        Fields fields;
        std::string wrong = "its part of the plan has " + std::to_string(size) + " bytes instead of ";
        if (size != sizeof fields) return made(wrong + std::to_string(sizeof fields), fields);
        std::memcpy(&fields, data, sizeof fields);
        return made(fault<Op>(fields), fields);
    }

private:
    IPluginV2* made(const std::string& wrong, const Fields& fields) noexcept {
        if (!wrong.empty()) {
            complain<Op>(wrong);
            return nullptr;
        }
        auto* plugin = new Plugin<Op>(fields);
        plugin->setPluginNamespace(namespace_.c_str());
        return plugin;
    }

    Collection<Op> names_;
    std::string namespace_;
};

}  // namespace
}  // namespace canny

// What TensorRT looks for when it loads a library; its own TENSORRTAPI exports nothing from other libraries.
CANNY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { canny::logger_finder = finder; }

CANNY_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
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
    static nvinfer1::IPluginCreator* const creators[] = {
        &group_norm, &attention, &layer_norm, &geglu, &add, &conv, &join, &join_norm, &last, &cross, &first
    };
    count = 11;
    return creators;
}
