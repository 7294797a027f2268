// The plugin CannyCross as TensorRT calls it: a part of plugin_probe.cpp.
#pragma once

// Its fields, to be changed for what must be refused.
struct Halves : Given {
    int32_t values = 0, heads = 8, beside = 0;
    Halves() {
        fields = {
            {"version", &version, PluginFieldType::kINT32, 1}, {"values", &values, PluginFieldType::kINT32, 1},
            {"heads", &heads, PluginFieldType::kINT32, 1},     {"beside", &beside, PluginFieldType::kINT32, 1},
            {"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1}
        };
    }
};

// TensorRT's arithmetic of sizes, of which each is one that was given, or the last constant that was asked for.
struct Size : IDimensionExpr {};
struct Sizes : apiv::VExprBuilder {
#if NV_TENSORRT_MAJOR == 8
    using Number = int32_t;
#else
    using Number = int64_t;
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
#endif
    Number last = 0;
    Size size;
    IDimensionExpr const* constant(Number value) override {
        last = value;
        return &size;
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
};
struct Arithmetic : IExprBuilder {
    explicit Arithmetic(Sizes& sizes) { mImpl = &sizes; }
};

// Of output i of at most three.
inline DimsExprs shape_of(Plugin& plugin, DimsExprs const* in, int32_t inputs, Sizes& sizes, int32_t i = 0) {
    Arithmetic arithmetic(sizes);
#if NV_TENSORRT_MAJOR == 8
    return plugin.getOutputDimensions(i, in, inputs, arithmetic);
#else
    DimsExprs made[3]{};
    MUST(build_side(plugin).getOutputShapes(in, inputs, nullptr, 0, made, 3, arithmetic) == 0);
    return made[i];
#endif
}

inline void probe_cross(Creator& creator) {
    MUST(!std::strcmp(creator.getPluginName(), "CannyCross") && creator.getFieldNames()->nbFields == 5);
    auto refused = refusing<Halves>(creator);
    MUST(refused([](Halves& g) { g.version = 2; }));
    MUST(refused([](Halves& g) { g.values = 2; }));
    MUST(refused([](Halves& g) { g.beside = 3; }));
    for (int32_t heads : {0, 6, 68}) MUST(refused([&](Halves& g) { g.heads = heads; }));
    for (float epsilon : {0.f, -1.f, NAN, INFINITY}) MUST(refused([&](Halves& g) { g.epsilon = epsilon; }));
    MUST(refused([](Halves& g) { g.fields.pop_back(); }));
    MUST(refused([](Halves& g) { g.fields.push_back({"words", &g.heads, PluginFieldType::kINT32, 1}); }));

    Halves of_scores, of_values;
    of_values.values = 1;
    Plugin *scores = create(creator, of_scores), *values = create(creator, of_values);
    MUST(scores && values && outputs(*scores, DataType::kHALF) == 1);

    std::vector<Desc> tensors;
    auto is = [&](int i, Dims shape) {
        inner(tensors[i]).dims = shape;
#if NV_TENSORRT_MAJOR > 8
        tensors[i].min = tensors[i].opt = tensors[i].max = shape;
#endif
    };
    auto has = [&](int i, DataType type, TensorFormat format) {
        inner(tensors[i]).type = type;
        inner(tensors[i]).format = format;
    };
    auto half = DataType::kHALF, single = DataType::kFLOAT;
    auto last8 = TensorFormat::kHWC8, linear = TensorFormat::kLINEAR;
    auto fits = [&](Plugin* which, int32_t inputs) {
        for (int32_t i = 0; i <= inputs; i++)
            if (!build_side(*which).supportsFormatCombination(i, tensors.data(), inputs, 1)) return false;
        return true;
    };

    // x, text, y: maps, of halves by eights.
    auto maps = [&] {
        tensors.assign(3, {});
        for (int i = 0; i < 3; i++) has(i, half, last8);
        is(0, dims({1, 320, 8, 12})), is(1, dims({2, 5128, 1, 77})), is(2, dims({2, 640, 8, 12}));
    };
    maps();
    MUST(fits(scores, 2) && !fits(scores, 1));
    MUST(workspace(*scores, tensors.data(), 2) == 0);
    configure(*scores, tensors, true, 2);
    for (int i = 0; i < 3; i++)
        for (auto format : {linear, TensorFormat::kHWC, TensorFormat::kCHW16}) {
            maps();
            has(i, half, format);
            MUST(!fits(scores, 2));
            has(i, single, linear);
            MUST(!fits(scores, 2));
        }
    for (auto x : {dims({1, 328, 8, 12}), dims({1, 320, 96}), dims({4, 320, 8, 12}), dims({1, 384, 8, 12}),
                   dims({0, 320, 8, 12})}) {
        maps();
        is(0, x);
        configure(*scores, tensors, false, 2);
    }
    for (auto text : {dims({2, 5120, 1, 77}), dims({2, 5132, 1, 77}), dims({2, 5128, 1, 81}), dims({2, 5128, 77, 1}),
                      dims({2, 5128, 77})}) {
        maps();
        is(1, text);
        configure(*scores, tensors, false, 2);
    }

    // The weights of words, text, bias, residual, y: all maps but the bias.
    auto more = [&] {
        tensors.assign(5, {});
        for (int i = 0; i < 5; i++) has(i, half, last8);
        has(2, single, linear);
        is(0, dims({2, 640, 8, 12})), is(1, dims({2, 5128, 1, 77})), is(2, dims({320})), is(3, dims({1, 320, 8, 12}));
        is(4, dims({2, 320, 8, 12}));
    };
    more();
    MUST(fits(values, 4) && !fits(values, 3) && !fits(scores, 4));
    configure(*values, tensors, true, 4);
    for (int i = 0; i < 5; i++) {
        more();
        i == 2 ? has(i, half, linear) : has(i, half, TensorFormat::kLINEAR);
        MUST(!fits(values, 4));
        i == 2 ? has(i, single, TensorFormat::kHWC) : has(i, single, linear);
        MUST(!fits(values, 4));
    }
    auto wrong = [&](int i, Dims shape) {
        more();
        is(i, shape);
        configure(*values, tensors, false, 4);
    };
    for (auto x : {dims({2, 704, 8, 12}), dims({4, 640, 8, 12}), dims({2, 640, 8, 11})}) wrong(0, x);
    for (auto text : {dims({2, 5120, 1, 77}), dims({4, 5128, 1, 77}), dims({2, 5128, 1, 81})}) wrong(1, text);
    for (auto bias : {dims({384}), dims({328}), dims({1, 320})}) wrong(2, bias);
    for (auto rest : {dims({1, 320, 8, 11}), dims({1, 384, 8, 12}), dims({3, 320, 8, 12}), dims({1, 320, 96}),
                      dims({0, 320, 8, 12})})
        wrong(3, rest);
    more();
    is(3, dims({2, 320, 8, 12}));
    configure(*values, tensors, true, 4);

    // y has the batch of the text, and 80 columns for each head or the channels of the bias.
    Sizes sizes;
    Size all[4][4];
    DimsExprs in[4];
    for (int i = 0; i < 4; i++) {
        in[i].nbDims = i == 2 ? 1 : 4;
        for (int k = 0; k < 4; k++) in[i].d[k] = &all[i][k];
    }
    DimsExprs made = shape_of(*scores, in, 2, sizes);
    MUST(made.nbDims == 4 && made.d[0] == &all[1][0] && made.d[1] == &sizes.size && sizes.last == 640);
    MUST(made.d[2] == &all[0][2] && made.d[3] == &all[0][3]);
    made = shape_of(*values, in, 4, sizes);
    MUST(made.nbDims == 4 && made.d[0] == &all[1][0] && made.d[1] == &all[2][0]);
    MUST(made.d[2] == &all[0][2] && made.d[3] == &all[0][3]);
    end(scores);
    end(values);
}
