"""How TensorRT's own words are read, outputs compared and progress added up; no engine is built."""

import json

import numpy as np
import pytest

from trt_builder.build import Phases
from trt_builder.inspect import inspected_layers, logged_layers
from trt_builder.verify import Comparison, compare


def test_the_inspector_of_tensorrt_8_is_understood():
    text = json.dumps({"Layers": [
        {"Name": "a/conv", "LayerType": "CaskConvolution", "ParameterType": "Convolution", "TacticName": "sm80_f32",
         "Inputs": [{"Name": "x", "Dimensions": [2, 4, 8, 8], "Format/Datatype": "Row major linear FP32"}],
         "Outputs": [{"Name": "y", "Dimensions": [2, 8, 8, 8], "Format/Datatype": "Row major linear FP32"}]},
        {"Name": "Reformatting CopyNode for Input Tensor 0 to a/conv", "LayerType": "Reformat",
         "Inputs": [{"Name": "x", "Dimensions": [2, 4, 8, 8], "Format/Datatype": "Row major linear FP16 format"}],
         "Outputs": [{"Name": "y", "Dimensions": [2, 4, 8, 8],
                      "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]},
        {"Name": "_gemm_mha_v2_myl0_3", "LayerType": "kgen", "Inputs": [], "Outputs": []},
        "{ForeignNode[attn1:scores...attn1:values]}",
        "named only",
    ]})  # fmt: skip
    layers = inspected_layers(text)
    assert [x.fp32_convolution for x in layers] == [True, False, False, False, False]
    assert [x.reformat for x in layers] == [False, True, False, False, False]
    assert [x.attention for x in layers] == [False, False, True, False, False]
    assert [x.region for x in layers] == [False, False, False, True, False]
    assert layers[1].outputs[0].dtype == "HALF" and layers[0].tactic == "sm80_f32"
    assert inspected_layers("{}") == []


def test_the_log_of_tensorrt_rtx_is_understood():
    tensor = ("{{ Name: {}, Dimensions: [2,32,8], Strides: [256,8,1], StrideOrder: [2,1,0], Datatype: {}, "
              "Format: (Linear) Row major linear format }}")  # fmt: skip
    x, y, w = tensor.format("x", "Float"), tensor.format("y [Act]", "Half"), tensor.format("w", "Half")
    text = (
        f"Layers:\nName: conv (a) [b], LayerType: correlation, Inputs: [ {x}, {w}], Constants: [ {w}], "
        f"Outputs: [ {y}], TacticName: __myl_Tran_0x1, StreamId: 0, Metadata: \nsomething else\n"
        "Name: bare, LayerType: barrier, Inputs: [], Outputs: [], StreamId: 0, Metadata: \n"
    )
    conv, bare = logged_layers(text)
    assert (conv.name, conv.type, conv.tactic) == ("conv (a) [b]", "correlation", "__myl_Tran_0x1")
    assert [t.name for t in conv.inputs] == ["x", "w"] and conv.inputs[0].shape == [2, 32, 8]
    assert conv.outputs[0].name == "y [Act]" and conv.fp32_convolution and conv.reformat
    assert (bare.name, bare.inputs, bare.tactic) == ("bare", [], "")


def test_comparisons():
    b = np.array([3.0, 4.0], np.float32)
    same = compare("hint", "hint", b.copy(), b, 1e-3)
    assert (same.error, same.largest, same.mean, same.bad) == (0, 0, 0, 0) and same.passed
    assert same.cosine == pytest.approx(1)
    off = compare("hint", "hint", np.array([3.0, 4.5]), b, 0.02)
    assert off.error == pytest.approx(0.1) and off.largest == pytest.approx(0.125) and not off.passed
    assert compare("hint", "hint", np.array([3.0, 4.05]), b, 0.02).passed
    assert compare("hint", "hint", np.array([3.0, np.nan]), b, 0.02).bad == 1
    assert not Comparison("a", "b", 0.0, 0, 0, 1, 1, 0.02).passed
    assert not compare("hint", "hint", np.array([3.0, np.inf]), b, 0.02).passed
    assert not compare("hint", "hint", np.zeros(2), b, 0.02).passed
    assert compare("hint", "hint", np.zeros(2), np.zeros(2), 0.02).passed
    with pytest.raises(ValueError, match="shape"):
        compare("hint", "hint", np.zeros(3), b, 0.02)


def test_progress_rises_to_the_whole():
    phases, shares = Phases(), []
    phases.start("all", None, 2)
    for part in ("first", "second"):
        phases.start(part, "all", 4)
        shares += [phases.step(part, i) for i in range(4)]
        phases.finish(part)
        shares.append(phases.step("all", 0 if part == "first" else 1))
    assert shares == sorted(shares) and shares[0] == 0.125 and shares[4] == 0.5 and shares[-1] == 1.0
