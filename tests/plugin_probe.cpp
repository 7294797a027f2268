// Calls the plugins as TensorRT does, without TensorRT and without a GPU; compiled with 8.6's headers or
// newer.
#include <dlfcn.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

#define MUST(condition)                                             \
    if (!(condition)) {                                             \
        std::printf("line %d: not so: %s\n", __LINE__, #condition); \
        std::exit(1);                                               \
    }

struct Logger : ILogger {
    void log(Severity, AsciiChar const* text) noexcept override { std::printf("%s\n", text); }
};

struct Finder : ILoggerFinder {
    Logger logger;
    ILogger* findLogger() override { return &logger; }
};

// The plugin's fields, to be changed for what must be refused.
struct Given {
    int32_t version = 1, groups = 32, silu = 1, row = 1;
    float epsilon = 1e-5f;
    std::vector<PluginField> fields{
        {"version", &version, PluginFieldType::kINT32, 1},   {"groups", &groups, PluginFieldType::kINT32, 1},
        {"silu", &silu, PluginFieldType::kINT32, 1},         {"row", &row, PluginFieldType::kINT32, 1},
        {"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1},
    };
    PluginFieldCollection all{};

    PluginFieldCollection const* collection() {
        all.nbFields = int32_t(fields.size());
        all.fields = fields.data();
        return &all;
    }
};

#if NV_TENSORRT_MAJOR == 8

using Plugin = IPluginV2DynamicExt;
using Creator = IPluginCreator;
using Desc = PluginTensorDesc;
constexpr char kEntry[] = "getPluginCreators";

PluginTensorDesc& inner(Desc& desc) { return desc; }
Plugin* create(Creator& creator, Given& given) {
    return static_cast<Plugin*>(creator.createPlugin("norm", given.collection()));
}
Plugin& build_side(Plugin& plugin) { return plugin; }
size_t workspace(Plugin& plugin, Desc* in, int32_t inputs = 4) {
    return plugin.getWorkspaceSize(in, inputs, in + inputs, 1);
}
// How many there are, all of the type `made` where the first input has this type.
int32_t outputs(Plugin& plugin, DataType type, DataType made) {
    int32_t count = plugin.getNbOutputs();
    for (int32_t i = 0; i < count; i++) MUST(plugin.getOutputDataType(i, &type, 1) == made);
    return count;
}
void end(Plugin* plugin) { plugin->destroy(); }

void serialise(Creator& creator, Plugin& plugin) {
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    auto* again = static_cast<Plugin*>(creator.deserializePlugin("norm", bytes.data(), bytes.size()));
    MUST(again && again->getSerializationSize() == bytes.size());
    std::vector<char> twice(bytes.size());
    auto* copy = again->clone();
    copy->serialize(twice.data());
    MUST(twice == bytes);
    end(copy);
    end(again);
    MUST(!creator.deserializePlugin("norm", bytes.data(), bytes.size() - 1));
    bytes[0] = 2;  // the version comes first
    MUST(!creator.deserializePlugin("norm", bytes.data(), bytes.size()));
}

void configure(Plugin& plugin, std::vector<Desc>& in, bool, int32_t inputs = 4) {
    std::vector<DynamicPluginTensorDesc> all(in.size());
    for (size_t i = 0; i < in.size(); i++) all[i].desc = in[i];
    plugin.configurePlugin(all.data(), inputs, all.data() + inputs, 1);  // what is wrong is only logged
}

#else

using Plugin = IPluginV3;
using Creator = IPluginCreatorV3One;
using Desc = DynamicPluginTensorDesc;
constexpr char kEntry[] = "getCreators";

PluginTensorDesc& inner(Desc& desc) { return desc.desc; }
Plugin* create(Creator& creator, Given& given) {
    return creator.createPlugin("norm", given.collection(), TensorRTPhase::kBUILD);
}
IPluginV3OneBuild& build_side(Plugin& plugin) {
    return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}
size_t workspace(Plugin& plugin, Desc* in, int32_t inputs = 4) {
    return build_side(plugin).getWorkspaceSize(in, inputs, in + inputs, 1);
}
// How many there are, all of the type `made` where the first input has this type.
int32_t outputs(Plugin& plugin, DataType type, DataType made) {
    int32_t count = build_side(plugin).getNbOutputs();
    std::vector<DataType> types(count);
    MUST(build_side(plugin).getOutputDataTypes(types.data(), count, &type, 1) == 0);
    for (DataType one : types) MUST(one == made);
    return count;
}
void end(Plugin* plugin) { delete plugin; }

void serialise(Creator& creator, Plugin& plugin) {
    auto* copy = plugin.clone();
    auto* run = static_cast<IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto* core = static_cast<IPluginV3OneCore*>(copy->getCapabilityInterface(PluginCapabilityType::kCORE));
    MUST(!std::strcmp(core->getPluginName(), "CannyGroupNorm") && !std::strcmp(core->getPluginVersion(), "1"));
    PluginFieldCollection const* fields = run->getFieldsToSerialize();
    MUST(fields->nbFields == 5);
    auto* again = creator.createPlugin("norm", fields, TensorRTPhase::kRUNTIME);
    MUST(again);
    run = static_cast<IPluginV3OneRuntime*>(again->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* twice = run->getFieldsToSerialize();
    for (int32_t i = 0; i < 5; i++) {
        MUST(!std::strcmp(fields->fields[i].name, twice->fields[i].name));
        MUST(!std::memcmp(fields->fields[i].data, twice->fields[i].data, 4));
    }
    Plugin* attached = run->attachToContext(nullptr);
    MUST(attached);
    end(attached);
    end(again);
    end(copy);
}

void configure(Plugin& plugin, std::vector<Desc>& in, bool good, int32_t inputs = 4) {
    MUST((build_side(plugin).configurePlugin(in.data(), inputs, in.data() + inputs, 1) == 0) == good);
}

#endif

int32_t outputs(Plugin& plugin, DataType type) { return outputs(plugin, type, type); }

Dims dims(std::initializer_list<int> sizes) {
    Dims made{};
    for (int size : sizes) made.d[made.nbDims++] = size;
    return made;
}

// Whether a plugin's fields are refused with a change of them.
template <typename Fields>
auto refusing(Creator& creator) {
    return [&creator](auto change) {
        Fields wrong;
        change(wrong);
        return create(creator, wrong) == nullptr;
    };
}

#include "cross_probe.hpp"
#include "ends_probe.hpp"

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) std::printf("%s\n", dlerror());
    MUST(library);
    auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    MUST(set_finder);
    static Finder finder;
    set_finder(&finder);
#if NV_TENSORRT_MAJOR == 8
    auto entry = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(dlsym(library, kEntry));
#else
    auto entry = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, kEntry));
#endif
    MUST(entry);
    int32_t count = 0;
    auto& creator = *static_cast<Creator*>(entry(count)[0]);
    MUST(count == 11 && !std::strcmp(creator.getPluginName(), "CannyGroupNorm"));
    MUST(!std::strcmp(creator.getPluginVersion(), "1") && creator.getFieldNames()->nbFields == 5);

    Given given;
    Plugin* plugin = create(creator, given);
    MUST(plugin);
    serialise(creator, *plugin);

    auto half = DataType::kHALF, single = DataType::kFLOAT;
    auto last8 = TensorFormat::kHWC8, last = TensorFormat::kHWC, linear = TensorFormat::kLINEAR;
    std::vector<Desc> tensors(5);
    auto describe = [&](int i, Dims shape, DataType type, TensorFormat format) {
        inner(tensors[i]).dims = shape;
        inner(tensors[i]).type = type;
        inner(tensors[i]).format = format;
#if NV_TENSORRT_MAJOR > 8
        tensors[i].min = tensors[i].opt = tensors[i].max = shape;
#endif
    };
    auto takes = [&](DataType type, TensorFormat format) {
        describe(0, dims({2, 320, 32, 48}), type, format);
        describe(1, dims({320}), single, linear);
        describe(2, dims({320}), single, linear);
        describe(3, dims({1, 320}), type, linear);
        describe(4, dims({2, 320, 32, 48}), type, format);
        for (int32_t i = 0; i < 5; i++)
            if (!build_side(*plugin).supportsFormatCombination(i, tensors.data(), 4, 1)) return false;
        return true;
    };
    MUST(takes(half, last8) && takes(half, linear) && takes(single, last) && takes(single, linear));
    MUST(!takes(half, last) && !takes(single, last8) && !takes(DataType::kINT8, linear));
    MUST(
        !takes(half, TensorFormat::kCHW2) && !takes(half, TensorFormat::kCHW16) && !takes(single, TensorFormat::kCHW32)
    );
    MUST(takes(half, last8));
    MUST(!build_side(*plugin).supportsFormatCombination(0, tensors.data(), 3, 1));  // it has a row
    describe(4, inner(tensors[4]).dims, half, linear);
    MUST(!build_side(*plugin).supportsFormatCombination(4, tensors.data(), 4, 1));  // y as x
    describe(3, inner(tensors[3]).dims, single, linear);
    MUST(!build_side(*plugin).supportsFormatCombination(3, tensors.data(), 4, 1));  // the row as x
    describe(2, inner(tensors[2]).dims, half, linear);
    MUST(!build_side(*plugin).supportsFormatCombination(2, tensors.data(), 4, 1));  // bias in float
    MUST(takes(half, last8));
    describe(0, dims({2, 2 * 10007, 4, 4}), half, last8);
    MUST(!build_side(*plugin).supportsFormatCombination(0, tensors.data(), 4, 1));  // 32 groups do not divide it

    MUST(takes(half, last8));
    MUST(workspace(*plugin, tensors.data()) > 0);
    configure(*plugin, tensors, true);
    describe(3, dims({3, 320}), half, linear);
    configure(*plugin, tensors, false);
    describe(3, dims({1, 320}), half, linear);
    describe(1, dims({319}), single, linear);
    configure(*plugin, tensors, false);
    describe(0, dims({0, 320, 32, 48}), half, last8);
    configure(*plugin, tensors, false);
    describe(0, dims({0, 320, -1, 48}), half, last8);  // whatever its height will be
    configure(*plugin, tensors, false);

    DataType types[] = {half, single, single, half}, made = single;
#if NV_TENSORRT_MAJOR == 8
    made = plugin->getOutputDataType(0, types, 4);
#else
    MUST(build_side(*plugin).getOutputDataTypes(&made, 1, types, 4) == 0);
#endif
    MUST(made == half);
    end(plugin);

    auto refused = refusing<Given>(creator);
    MUST(refused([](Given& g) { g.version = 2; }));
    MUST(refused([](Given& g) { g.groups = 0; }));
    MUST(refused([](Given& g) { g.epsilon = NAN; }));
    MUST(refused([](Given& g) { g.silu = 7; }));
    MUST(refused([](Given& g) { g.row = 2; }));
    MUST(refused([](Given& g) { g.fields.pop_back(); }));
    MUST(refused([](Given& g) { g.fields.push_back({"colour", &g.row, PluginFieldType::kINT32, 1}); }));
    MUST(refused([](Given& g) { g.fields[4] = {"epsilon", &g.epsilon, PluginFieldType::kFLOAT64, 1}; }));

    auto& attention = *static_cast<Creator*>(entry(count)[1]);
    MUST(!std::strcmp(attention.getPluginName(), "CannyAttention") && attention.getFieldNames()->nbFields == 5);
    struct Heads : Given {
        int32_t heads = 8, joined = 1, causal = 0;
        float scale = 0.125f;
        Heads() {
            fields = {
                {"version", &version, PluginFieldType::kINT32, 1},
                {"heads", &heads, PluginFieldType::kINT32, 1},
                {"joined", &joined, PluginFieldType::kINT32, 1},
                {"causal", &causal, PluginFieldType::kINT32, 1},
                {"scale", &scale, PluginFieldType::kFLOAT32, 1}
            };
        }
    };
    Heads joined, apart, wrong;
    apart.joined = 0;
    Plugin *one = create(attention, joined), *three = create(attention, apart);
    MUST(one && three);
    // The first input and the output are maps, what lies between are rows.
    auto fits = [&](Plugin* which, DataType type, TensorFormat format, int32_t inputs) {
        describe(0, dims({2, 960, 8, 12}), type, format);
        for (int i = 1; i < inputs; i++) describe(i, dims({2, 77, 960}), half, linear);
        describe(inputs, dims({2, 960, 8, 12}), type, format);
        for (int32_t i = 0; i < inputs + 1; i++)
            if (!build_side(*which).supportsFormatCombination(i, tensors.data(), inputs, 1)) return false;
        return true;
    };
    MUST(fits(one, half, last8, 1) && fits(three, half, last8, 3));
    MUST(!fits(one, half, last8, 3) && !fits(one, single, last8, 1) && !fits(three, half, linear, 3));
    fits(three, half, last8, 3);
    describe(2, dims({2, 77, 960}), half, last8);
    MUST(!build_side(*three).supportsFormatCombination(2, tensors.data(), 3, 1));
    describe(0, dims({2, 960, 8, 12}), half, last8);
    configure(*one, tensors, true, 1);
    describe(0, dims({2, 959, 8, 12}), half, last8);
    configure(*one, tensors, false, 1);
    describe(0, dims({2, 960, 96}), half, last8);
    configure(*one, tensors, false, 1);
    describe(0, dims({2, 960, 8, 12}), half, last8);
    configure(*three, tensors, false, 3);  // heads of 120
    auto cross = [&](int32_t queries, int32_t rows, int32_t values) {
        describe(0, dims({queries, 640, 8, 12}), half, last8);
        describe(1, dims({rows, 77, 640}), half, linear);
        describe(2, dims({rows, values, 640}), half, linear);
    };
    cross(2, 2, 77);
    configure(*three, tensors, true, 3);
    cross(1, 2, 77);
    configure(*three, tensors, true, 3);
    cross(2, 3, 77);
    configure(*three, tensors, false, 3);
    cross(0, 2, 77);
    configure(*three, tensors, false, 3);
    cross(2, 2, 76);
    configure(*three, tensors, false, 3);
    for (int i = 0; i < 4; i++) describe(i, dims({2, 640, 8, 12}), half, last8);
    for (int32_t i = 0; i < 4; i++) MUST(build_side(*three).supportsFormatCombination(i, tensors.data(), 3, 1));
    configure(*three, tensors, true, 3);
    describe(2, dims({2, 640, 8, 11}), half, last8);
    configure(*three, tensors, false, 3);
    describe(2, dims({2, 640, 8, 12}), half, linear);
    MUST(!build_side(*three).supportsFormatCombination(2, tensors.data(), 3, 1));
    Heads masked;
    masked.causal = 1, masked.joined = 0;
    Plugin* behind = create(attention, masked);
    auto causal = [&](int32_t channels, int32_t keys) {
        describe(0, dims({2, channels, 1, 77}), half, last8);
        for (int i : {1, 2}) describe(i, dims({2, keys, channels}), half, linear);
    };
    causal(512, 77);
    configure(*behind, tensors, true, 3);
    causal(512, 76);
    configure(*behind, tensors, false, 3);
    causal(640, 77);
    configure(*behind, tensors, false, 3);
    masked.joined = 1;
    Plugin* together = create(attention, masked);
    describe(0, dims({2, 1536, 1, 77}), half, last8);
    configure(*together, tensors, true, 1);
    for (Plugin* each : {one, three, behind, together}) end(each);
    wrong.causal = 2;
    MUST(!create(attention, wrong));
    wrong.causal = 0, wrong.heads = 0;
    MUST(!create(attention, wrong));
    wrong.heads = 8, wrong.joined = 3;
    MUST(!create(attention, wrong));
    wrong.joined = 1, wrong.scale = -1.f;
    MUST(!create(attention, wrong));
    wrong.fields = given.fields;
    MUST(!create(attention, wrong));

    auto& layer_norm = *static_cast<Creator*>(entry(count)[2]);
    auto& geglu = *static_cast<Creator*>(entry(count)[3]);
    auto& sum = *static_cast<Creator*>(entry(count)[4]);
    MUST(!std::strcmp(sum.getPluginName(), "CannyAdd"));
    MUST(!std::strcmp(layer_norm.getPluginName(), "CannyLayerNorm"));
    MUST(!std::strcmp(geglu.getPluginName(), "CannyGeglu"));
    Given fields;
    fields.fields = {given.fields[0], given.fields[4]};
    Plugin* norm = create(layer_norm, fields);
    fields.epsilon = 0.f;
    fields.fields = {given.fields[0], {"epsilon", &fields.epsilon, PluginFieldType::kFLOAT32, 1}};
    MUST(norm && !create(layer_norm, fields));
    fields.fields = {given.fields[0]};
    Plugin* gate = create(geglu, fields);
    MUST(gate && !create(layer_norm, fields));
    for (int i : {0, 3}) describe(i, dims({2, 320, 8, 12}), half, last8);
    for (int i : {1, 2}) describe(i, dims({320}), single, linear);
    for (int32_t i = 0; i < 4; i++) MUST(build_side(*norm).supportsFormatCombination(i, tensors.data(), 3, 1));
    configure(*norm, tensors, true, 3);
    describe(2, dims({319}), single, linear);
    configure(*norm, tensors, false, 3);
    describe(0, dims({2, 4096, 8, 12}), half, last8);
    configure(*norm, tensors, false, 3);
    describe(0, dims({2, 320, 8, 12}), half, linear);
    MUST(!build_side(*norm).supportsFormatCombination(0, tensors.data(), 3, 1));
    for (int i : {0, 1}) describe(i, dims({2, 320, 8, 12}), half, last8);
    for (int32_t i = 0; i < 2; i++) MUST(build_side(*gate).supportsFormatCombination(i, tensors.data(), 1, 1));
    configure(*gate, tensors, true, 1);
    describe(0, dims({2, 24, 8, 12}), half, last8);
    configure(*gate, tensors, false, 1);
    Plugin* plus = create(sum, fields);
    MUST(plus);
    for (int i : {0, 1, 2}) describe(i, dims({2, 320, 8, 12}), half, last8);
    for (int32_t i = 0; i < 3; i++) MUST(build_side(*plus).supportsFormatCombination(i, tensors.data(), 2, 1));
    configure(*plus, tensors, true, 2);
    describe(1, dims({1, 320, 8, 12}), half, last8);
    configure(*plus, tensors, false, 2);
    end(plus);
    auto& convolution = *static_cast<Creator*>(entry(count)[5]);
    MUST(!std::strcmp(convolution.getPluginName(), "CannyConv") && convolution.getFieldNames()->nbFields == 10);
    int32_t size = 3, stride = 2, residual = 1, normed = 0, second = 0, gated = 0, beside = 0, up = 0;
    fields.fields = {
        given.fields[0],
        {"size", &size, PluginFieldType::kINT32, 1},
        {"stride", &stride, PluginFieldType::kINT32, 1},
        {"residual", &residual, PluginFieldType::kINT32, 1},
        {"norm", &normed, PluginFieldType::kINT32, 1},
        {"second", &second, PluginFieldType::kINT32, 1},
        {"gate", &gated, PluginFieldType::kINT32, 1},
        {"beside", &beside, PluginFieldType::kINT32, 1},
        {"up", &up, PluginFieldType::kINT32, 1},
        {"epsilon", &fields.epsilon, PluginFieldType::kFLOAT32, 1}
    };
    Plugin* conv = create(convolution, fields);
    MUST(conv);
    auto filters = [&](int32_t channels, int32_t blocks, int32_t count, int32_t rows) {
        describe(0, dims({2, channels, 9, 12}), half, last8);
        describe(1, dims({5, blocks, 64, 64}), half, linear);
        describe(2, dims({count}), single, linear);
        describe(3, dims({rows, 320, 5, 6}), half, last8);
        describe(4, dims({2, 320, 5, 6}), half, last8);
    };
    filters(128, 18, 320, 1);
    for (int32_t i = 0; i < 5; i++) MUST(build_side(*conv).supportsFormatCombination(i, tensors.data(), 4, 1));
    configure(*conv, tensors, true, 4);
    describe(1, dims({5, 18, 64, 64}), single, linear);
    MUST(!build_side(*conv).supportsFormatCombination(1, tensors.data(), 4, 1));
    for (auto wrong : {std::array<int32_t, 4>{120, 18, 320, 1}, {128, 9, 320, 1}, {128, 18, 384, 1}, {128, 18, 320, 3},
                       {128, 18, 320, 0}}) {
        filters(wrong[0], wrong[1], wrong[2], wrong[3]);
        configure(*conv, tensors, false, 4);
    }
    second = 1;
    MUST(!create(convolution, fields));  // of stride 2
    stride = 1;
    Plugin* of_both = create(convolution, fields);
    MUST(of_both);
    std::vector<Desc> kept = tensors;
    tensors.resize(6);
    auto maps = [&](std::initializer_list<int> beside, int32_t blocks, int32_t rows) {
        describe(0, dims({2, 128, 9, 12}), half, last8);
        describe(1, dims({5, blocks, 64, 64}), half, linear);
        describe(2, dims({320}), single, linear);
        describe(3, dims(beside), half, last8);
        describe(4, dims({rows, 320, 9, 12}), half, last8);
        describe(5, dims({2, 320, 9, 12}), half, last8);
    };
    maps({2, 192, 9, 12}, 21, 1);
    for (int32_t i = 0; i < 6; i++) MUST(build_side(*of_both).supportsFormatCombination(i, tensors.data(), 5, 1));
    MUST(!build_side(*of_both).supportsFormatCombination(0, tensors.data(), 4, 1));  // it has a second map
    configure(*of_both, tensors, true, 5);
    for (auto wrong : {std::array<int32_t, 6>{1, 192, 9, 12, 21, 1}, {2, 96, 9, 12, 19, 1}, {2, 192, 5, 6, 21, 1},
                       {2, 192, 9, 12, 18, 1}, {2, 192, 9, 12, 21, 3}}) {
        maps({wrong[0], wrong[1], wrong[2], wrong[3]}, wrong[4], wrong[5]);
        configure(*of_both, tensors, false, 5);
    }
    maps({2, 192, 9, 12}, 21, 1);
    describe(3, dims({2, 192, 9, 12}), half, linear);
    MUST(!build_side(*of_both).supportsFormatCombination(3, tensors.data(), 5, 1));
    end(of_both);
    tensors = kept;
    size = 1, normed = 1, fields.epsilon = 1e-5f;
    MUST(!create(convolution, fields));
    normed = 0, second = 2;
    MUST(!create(convolution, fields));
    second = 0, size = 5;
    MUST(!create(convolution, fields));
    size = 3, stride = 3;
    MUST(!create(convolution, fields));
    stride = 1, residual = 2;
    MUST(!create(convolution, fields));
    residual = 0, gated = 1;
    MUST(!create(convolution, fields));  // of size 3
    size = 1, residual = 1;
    MUST(!create(convolution, fields));  // with a residual
    residual = 0, gated = 2;
    MUST(!create(convolution, fields));
    size = 3, gated = 0, residual = 1, normed = 1, fields.epsilon = 1e-5f;
    MUST(!create(convolution, fields));  // of size 3
    size = 1, fields.epsilon = 0.f;
    MUST(!create(convolution, fields));
    fields.epsilon = 1e-5f, normed = 2;
    MUST(!create(convolution, fields));
    normed = 1;
    Plugin* after_norm = create(convolution, fields);
    MUST(after_norm);
    tensors.resize(6);
    auto sums = [&](int32_t count, DataType type) {
        for (int i : {0, 4, 5}) describe(i, dims({2, 320, 8, 12}), half, last8);
        describe(1, dims({5, 5, 64, 64}), half, linear);
        describe(2, dims({320}), single, linear);
        describe(3, dims({count}), type, linear);
    };
    sums(320, single);
    for (int32_t i = 0; i < 6; i++) MUST(build_side(*after_norm).supportsFormatCombination(i, tensors.data(), 5, 1));
    configure(*after_norm, tensors, true, 5);
    sums(319, single);
    configure(*after_norm, tensors, false, 5);
    sums(320, half);
    MUST(!build_side(*after_norm).supportsFormatCombination(3, tensors.data(), 5, 1));
    end(after_norm);
    gated = 1, residual = 0;
    Plugin* with_gate = create(convolution, fields);
    MUST(with_gate);
    sums(320, single);
    describe(4, dims({2, 160, 8, 12}), half, last8);
    for (int32_t i = 0; i < 5; i++) MUST(build_side(*with_gate).supportsFormatCombination(i, tensors.data(), 4, 1));
    configure(*with_gate, tensors, true, 4);
    end(with_gate);
    tensors = kept;
    size = 3, gated = 0, normed = 0, up = 2;
    MUST(!create(convolution, fields));
    up = 1, residual = 1;
    MUST(!create(convolution, fields));
    residual = 0, size = 1;
    MUST(!create(convolution, fields));
    size = 3;
    Plugin* doubled = create(convolution, fields);
    MUST(doubled);
    auto phases = [&](int32_t tiles, int32_t blocks) {
        describe(0, dims({2, 128, 8, 12}), half, last8);
        describe(1, dims({tiles, blocks, 64, 64}), half, linear);
        describe(2, dims({320}), single, linear);
        describe(3, dims({2, 320, 16, 24}), half, last8);
    };
    phases(20, 8);
    for (int32_t i = 0; i < 4; i++) MUST(build_side(*doubled).supportsFormatCombination(i, tensors.data(), 3, 1));
    configure(*doubled, tensors, true, 3);
    for (auto wrong : {std::array<int32_t, 2>{5, 8}, {20, 18}}) {
        phases(wrong[0], wrong[1]);
        configure(*doubled, tensors, false, 3);
    }
    end(doubled);
    tensors = kept;
    end(conv);
    auto& join = *static_cast<Creator*>(entry(count)[6]);
    MUST(!std::strcmp(join.getPluginName(), "CannyJoin"));
    int32_t index = 3, x_index = -1;
    fields.fields = {
        given.fields[0],
        {"index", &index, PluginFieldType::kINT32, 1},
        {"x_index", &x_index, PluginFieldType::kINT32, 1}
    };
    Plugin* skips = create(join, fields);
    MUST(skips);
    describe(0, dims({2, 640, 8, 12}), half, last8);
    for (int i : {1, 2}) describe(i, dims({2, 320, 8, 12}), half, last8);
    describe(3, dims({13, 2}), single, linear);
    describe(4, dims({2, 960, 8, 12}), half, last8);
    for (int32_t i = 0; i < 5; i++) MUST(build_side(*skips).supportsFormatCombination(i, tensors.data(), 4, 1));
    configure(*skips, tensors, true, 4);
    describe(3, dims({13, 4}), single, linear);
    configure(*skips, tensors, true, 4);  // those of more rows than there are here
    for (auto wrong : {dims({3, 2}), dims({13, 1})}) {
        describe(3, wrong, single, linear);
        configure(*skips, tensors, false, 4);
    }
    describe(3, dims({13, 2}), single, linear);
    describe(2, dims({2, 640, 8, 12}), half, last8);
    configure(*skips, tensors, false, 4);
    end(skips);
    x_index = 12;
    Plugin* both = create(join, fields);
    MUST(both);
    kept = tensors;
    tensors.resize(6);
    describe(2, dims({2, 320, 8, 12}), half, last8);
    describe(4, dims({2, 640, 8, 12}), half, last8);
    describe(5, dims({2, 960, 8, 12}), half, last8);
    for (int32_t i = 0; i < 6; i++) MUST(build_side(*both).supportsFormatCombination(i, tensors.data(), 5, 1));
    configure(*both, tensors, true, 5);
    describe(3, dims({12, 2}), single, linear);
    configure(*both, tensors, false, 5);
    describe(3, dims({13, 2}), single, linear);
    describe(4, dims({2, 320, 8, 12}), half, last8);
    configure(*both, tensors, false, 5);
    describe(1, dims({2, 320, 8, 6}), half, last8);
    configure(*both, tensors, false, 5);
    end(both);
    auto& join_norm = *static_cast<Creator*>(entry(count)[7]);
    MUST(!std::strcmp(join_norm.getPluginName(), "CannyJoinNorm") && join_norm.getFieldNames()->nbFields == 6);
    auto of_join = fields.fields;
    fields.epsilon = 1e-5f;
    fields.fields.insert(fields.fields.end(), {given.fields[1], given.fields[2], given.fields[4]});
    Plugin* in_one = create(join_norm, fields);
    MUST(in_one && outputs(*in_one, half) == 2);
    tensors.resize(9);
    auto parts = [&](int32_t first, int32_t second, int32_t scale) {
        describe(0, dims({2, first, 32, 48}), half, last8);
        for (int i : {1, 2}) describe(i, dims({2, second, 32, 48}), half, last8);
        describe(3, dims({13, 2}), single, linear);
        describe(4, dims({2, first, 32, 48}), half, last8);
        for (int i : {5, 6}) describe(i, dims({scale}), single, linear);
        for (int i : {7, 8}) describe(i, dims({2, first + second, 32, 48}), half, last8);
    };
    parts(640, 320, 960);
    for (int32_t i = 0; i < 9; i++) MUST(build_side(*in_one).supportsFormatCombination(i, tensors.data(), 7, 2));
    MUST(!build_side(*in_one).supportsFormatCombination(0, tensors.data(), 7, 1));
    configure(*in_one, tensors, true, 7);
    MUST(workspace(*in_one, tensors.data(), 7) > 0);  // where there are no clusters
    parts(640, 320, 640);
    configure(*in_one, tensors, false, 7);
    parts(640, 312, 952);
    configure(*in_one, tensors, false, 7);  // 32 groups do not divide it
    parts(640, 320, 960);
    describe(8, inner(tensors[8]).dims, half, linear);
    MUST(!build_side(*in_one).supportsFormatCombination(8, tensors.data(), 7, 2));
    describe(5, dims({960}), half, linear);
    MUST(!build_side(*in_one).supportsFormatCombination(5, tensors.data(), 7, 2));
    end(in_one);
    int32_t none = 0;
    fields.fields[3] = {"groups", &none, PluginFieldType::kINT32, 1};
    MUST(!create(join_norm, fields));
    fields.fields = of_join;
    MUST(!create(join_norm, fields));
    tensors = kept;
    x_index = -2;
    MUST(!create(join, fields));
    index = -1, x_index = -1;
    MUST(!create(join, fields));
    end(norm);
    end(gate);
    probe_last(*static_cast<Creator*>(entry(count)[8]));
    probe_cross(*static_cast<Creator*>(entry(count)[9]));
    probe_first(*static_cast<Creator*>(entry(count)[10]));
    std::printf("all as it must be\n");
}
