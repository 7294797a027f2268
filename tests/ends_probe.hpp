// The plugins CannyFirst and CannyLast as TensorRT calls them: a part of plugin_probe.cpp.
#pragma once

// Tensors of one plugin, all to be described anew for each question.
struct Tensors {
    Plugin& plugin;
    int32_t inputs, outputs;
    std::vector<Desc> all{size_t(inputs + outputs)};

    void is(int i, Dims shape, DataType type, TensorFormat format) {
        inner(all[i]) = {};
        inner(all[i]).type = type;
        inner(all[i]).format = format;
        resize(i, shape);
    }
    void map(int i, Dims shape) { is(i, shape, DataType::kHALF, TensorFormat::kHWC8); }
    void floats(int i, Dims shape) { is(i, shape, DataType::kFLOAT, TensorFormat::kLINEAR); }
    void resize(int i, Dims shape) {
        inner(all[i]).dims = shape;
#if NV_TENSORRT_MAJOR > 8
        all[i].min = all[i].opt = all[i].max = shape;
#endif
    }
    bool fit() {
        for (int32_t i = 0; i < inputs + outputs; i++)
            if (!build_side(plugin).supportsFormatCombination(i, all.data(), inputs, outputs)) return false;
        return true;
    }
    // Whether the plugin takes tensor i in this type and format alone.
    bool only(int i, DataType type, TensorFormat format) {
        for (auto other : {DataType::kHALF, DataType::kFLOAT, DataType::kINT8})
            for (auto way : {TensorFormat::kLINEAR, TensorFormat::kHWC8, TensorFormat::kHWC, TensorFormat::kCHW16}) {
                inner(all[i]).type = other;
                inner(all[i]).format = way;
                if (fit() != (other == type && way == format)) return false;
            }
        inner(all[i]).type = type;
        inner(all[i]).format = format;
        return true;
    }
    void refuses(int i, std::initializer_list<Dims> shapes) {
        Dims kept = inner(all[i]).dims;
        for (Dims shape : shapes) {
            resize(i, shape);
            configure(plugin, all, false, inputs);
        }
        resize(i, kept);
        configure(plugin, all, true, inputs);
    }
};

inline void probe_first(Creator& creator) {
    MUST(!std::strcmp(creator.getPluginName(), "CannyFirst") && creator.getFieldNames()->nbFields == 3);
    auto half = DataType::kHALF, single = DataType::kFLOAT;
    auto last8 = TensorFormat::kHWC8, linear = TensorFormat::kLINEAR;
    int32_t hint = 0, repeat = 0;
    Given fields;
    fields.fields = {
        {"version", &fields.version, PluginFieldType::kINT32, 1},
        {"hint", &hint, PluginFieldType::kINT32, 1},
        {"repeat", &repeat, PluginFieldType::kINT32, 1}
    };
    Plugin* alone = create(creator, fields);
    hint = 1, repeat = 2;
    Plugin* both = create(creator, fields);
    MUST(alone && both && outputs(*alone, single, half) == 1 && outputs(*both, single, half) == 2);
    for (int32_t wrong : {-1, 1}) {
        repeat = wrong;
        MUST(!create(creator, fields));
    }
    repeat = 0, hint = 2;
    MUST(!create(creator, fields));

    Tensors some{*both, 4, 2};
    some.floats(0, dims({2, 4, 5, 7}));
    some.floats(1, dims({5, 18, 128}));
    some.floats(2, dims({320}));
    some.map(3, dims({1, 320, 5, 7}));
    some.map(4, dims({2, 320, 5, 7}));
    some.map(5, dims({4, 320, 5, 7}));
    MUST(some.fit());
    for (int i = 0; i < 6; i++) MUST(some.only(i, i < 3 ? single : half, i < 3 ? linear : last8));
    some.refuses(0, {dims({2, 5, 5, 7}), dims({2, 9, 5, 7}), dims({2, 4, 35}), dims({2, 4, 7, 5})});
    some.refuses(1, {dims({5, 36, 128}), dims({4, 18, 128}), dims({5, 18, 64}), dims({5, 18, 32, 4})});
    some.refuses(2, {dims({324}), dims({384}), dims({1, 320})});
    some.refuses(3, {dims({3, 320, 5, 7}), dims({1, 312, 5, 7}), dims({1, 320, 5, 6}), dims({1, 320, 35})});
    some.resize(3, dims({2, 320, 5, 7}));  // a hint for each sample
    configure(*both, some.all, true, 4);
    MUST(workspace(*both, some.all.data(), 4) == 0);
    Tensors fewer{*alone, 4, 1, some.all};
    MUST(!fewer.fit());  // it has no hint

    // The second output is as many times larger as it says.
    Sizes sizes;
    Size all[4][4];
    DimsExprs in[4];
    for (int i = 0; i < 4; i++) {
        in[i].nbDims = i == 1 ? 3 : i == 2 ? 1 : 4;
        for (int k = 0; k < 4; k++) in[i].d[k] = &all[i][k];
    }
    for (int i = 0; i < 2; i++) {
        DimsExprs made = shape_of(*both, in, 4, sizes, i);
        MUST(made.nbDims == 4 && (i == 0 ? made.d[0] == &all[0][0] : !made.d[0] && sizes.last == 2));  // a product
        MUST(made.d[1] == &all[2][0] && made.d[2] == &all[0][2] && made.d[3] == &all[0][3]);
    }
    end(alone);
    end(both);
}

inline void probe_last(Creator& creator) {
    MUST(!std::strcmp(creator.getPluginName(), "CannyLast") && creator.getFieldNames()->nbFields == 2);
    auto half = DataType::kHALF, single = DataType::kFLOAT;
    auto last8 = TensorFormat::kHWC8, linear = TensorFormat::kLINEAR;
    int32_t cond = 0;
    Given fields;
    fields.fields = {
        {"version", &fields.version, PluginFieldType::kINT32, 1}, {"cond", &cond, PluginFieldType::kINT32, 1}
    };
    Plugin* whole = create(creator, fields);
    cond = 1;
    Plugin* prompt = create(creator, fields);
    MUST(whole && prompt && outputs(*whole, single) == 3 && outputs(*prompt, single) == 2);
    cond = 2;
    MUST(!create(creator, fields));

    for (bool alone : {false, true}) {
        Plugin* plugin = alone ? prompt : whole;
        Tensors some{*plugin, alone ? 10 : 9, alone ? 2 : 3};
        for (int i : {0, 5, 6, 7, 9, 10, 11}) some.floats(i, dims({2, 4, 5, 7}));
        some.map(1, dims({alone ? 2 : 4, 320, 5, 7}));
        some.is(2, dims({9, 4, 320}), half, linear);
        some.floats(3, dims({4}));
        some.floats(4, dims({1}));
        some.floats(8, dims({4}));
        MUST(some.fit());
        for (int i = 0; i < 12; i++) MUST(some.only(i, i == 1 || i == 2 ? half : single, i == 1 ? last8 : linear));
        some.refuses(0, {dims({2, 9, 5, 7}), dims({1, 4, 5, 7}), dims({2, 4, 35}), dims({2, 3, 5, 7})});
        some.refuses(1, {dims({3, 320, 5, 7}), dims({alone ? 4 : 2, 320, 5, 7}), dims({alone ? 2 : 4, 324, 5, 7}),
                         dims({alone ? 2 : 4, 320, 7, 5}), dims({alone ? 2 : 4, 320, 35})});
        some.refuses(2, {dims({9, 4, 312}), dims({9, 8, 320}), dims({4, 9, 320}), dims({36, 320})});
        some.refuses(3, {dims({8}), dims({1, 4})});
        some.refuses(4, {dims({2})});
        for (int i : {5, 6, 7}) some.refuses(i, {dims({2, 4, 5, 6}), dims({1, 4, 5, 7})});
        some.refuses(8, {dims({3})});
        if (alone) some.refuses(9, {dims({4, 4, 5, 7})});
        MUST(workspace(*plugin, some.all.data(), some.inputs) == 0);
        Tensors others{alone ? *whole : *prompt, some.inputs, some.outputs, some.all};
        MUST(!others.fit());
    }
    end(whole);
    end(prompt);
}
