"""Weights that are cut short, damaged, not finite or hold code: refused with a sentence, and nothing of them is run."""

import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

import compute_score  # noqa: E402
from cldm.canny2image import load_model  # noqa: E402
from cldm.cldm import WeightsError as TorchWeightsError  # noqa: E402
from cldm.model import load_state_dict  # noqa: E402
from trt_builder import __main__ as cli  # noqa: E402
from trt_builder.config import ModelConfig  # noqa: E402
from trt_builder.weights import Weights, WeightsError, expected_shapes  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny" / "tiny.safetensors"
PLACES = 50
NAMES = list(expected_shapes(ModelConfig.load("tiny")))


@pytest.fixture(autouse=True)
def no_inception(monkeypatch) -> None:
    """Scores are not looked at, and their network takes seconds to load."""
    monkeypatch.setattr("bench.perceptual.InceptionFeatures", lambda: None)


def build_reads(path: Path) -> None:
    """What a build does with weights before it begins."""
    Weights.open(path).check(ModelConfig.load("tiny"))


def refusal(action: Callable[[], object], of: type[ValueError]) -> str:
    """The text of the error with which an action is refused: one sentence."""
    with pytest.raises(of) as error:
        action()
    text = compute_score.sentence(error.value)
    assert len(text) < 2000 and "Traceback" not in text
    return text


def test_safetensors_cut_short(tmp_path, tally):
    one, draw = tally("a .safetensors cut short"), random.Random(1)
    path = tmp_path / "tiny.safetensors"
    shutil.copy(TINY, path)
    size = path.stat().st_size
    places = {0, 7, 8, 100, size - 1} | {draw.randrange(size) for _ in range(PLACES - 5)}
    for place in sorted(places, reverse=True):
        os.truncate(path, place)
        one.inject()
        said = refusal(lambda: build_reads(path), WeightsError)
        assert str(path) in said
        assert str(path) in refusal(lambda: load_state_dict(path), TorchWeightsError)
        one.survive(said)


def test_safetensors_with_a_damaged_header(tmp_path, tally):
    one, draw = tally("a .safetensors with a damaged header"), random.Random(2)
    path = tmp_path / "tiny.safetensors"
    whole = TINY.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole)
    for _ in range(200):
        place, by = draw.randrange(length), draw.randrange(1, 256)
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ by]))
            file.flush()
            one.inject()
            try:
                build_reads(path)
            except WeightsError as error:
                one.survive(error)
                if "does not fit" not in str(error):
                    refusal(lambda: load_state_dict(path), TorchWeightsError)
            else:  # the name of the program that wrote it, or of a weight that no engine holds
                one.survive("nothing: no weight's name, type, size or place was changed")
            file.seek(place)
            file.write(whole[place : place + 1])
    build_reads(path)


@pytest.mark.parametrize("header", [b"[" * 200_000, b"[]", b"{}" + b" " * 100, b'{"a": 3}', b'{"a": {"dtype": []}}'])
def test_safetensors_with_a_header_made_by_hand(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refusal(lambda: build_reads(path), WeightsError)
    refusal(lambda: load_model("tiny", path), TorchWeightsError)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_pth_cut_short(tmp_path, tally, kind):
    one, draw = tally(f"a .pth cut short ({kind})"), random.Random(3)
    path = tmp_path / "tiny.pth"
    torch.save({"state_dict": load_file(TINY)}, path, _use_new_zipfile_serialization=kind == "zip")
    load_model("tiny", path)
    size = path.stat().st_size
    places = {0, 1, 2, 10, 100, 1000, size - 1} | {draw.randrange(size) for _ in range(PLACES - 17)}
    places |= {draw.randrange(30_000) for _ in range(10)}  # among the names
    for place in sorted(places, reverse=True):
        os.truncate(path, place)
        one.inject()
        said = refusal(lambda: load_state_dict(path), TorchWeightsError)
        assert str(path) in said
        one.survive(said)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_pth_with_damaged_names(tmp_path, tally, kind):
    one, draw = tally(f"a .pth with a changed byte in its pickle ({kind})"), random.Random(4)
    path = tmp_path / "small.pth"
    torch.save(
        {"a.weight": torch.ones(3, 2), "b.bias": torch.zeros(4)}, path, _use_new_zipfile_serialization=kind == "zip"
    )
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        one.inject()
        try:
            load_state_dict(path)
        except TorchWeightsError as error:
            one.survive(error)
        else:
            one.survive(
                "nothing: a number or name was changed, which the model's names and the manifest's SHA-256 tell"
            )


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "pickle inside a zip"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, tally, name, kind):
    one = tally("a file of weights with code in it")
    canary, path = tmp_path / "canary", tmp_path / name
    code = {"state_dict": {"a": torch.ones(2), "b": Code(f"touch {canary}")}}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(code))
    elif kind == "pickle inside a zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(code, protocol=2))
            file.writestr("archive/version", "3\n")
    else:
        torch.save(code, path, _use_new_zipfile_serialization=kind == "zip")
    one.inject()
    said = refusal(lambda: load_state_dict(path), TorchWeightsError)
    refusal(lambda: build_reads(path), WeightsError)
    assert compute_score.main(["--weights", str(path), "--output", str(tmp_path / "score")]) == 2
    assert cli.main(["build", "--weights", str(path), "--output", str(tmp_path / "engines")]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [name], "the code in the file was run"
    one.survive(said)
    pickle.loads(pickle.dumps(code))  # the canary can die
    assert canary.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, tally, capsys, dtype, value):
    one = tally("weights with NaN or infinity")
    weights = {name: tensor.to(dtype) if "." in name else tensor for name, tensor in load_file(TINY).items()}
    names = [name for name in NAMES][5:17]
    for name in names:
        weights[name].view(-1)[-1] = value
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    one.inject()
    with pytest.raises(WeightsError) as error:
        build_reads(path)
    for name in names[:10]:
        assert f"{name}," in str(error.value)
    assert "12 with NaN or infinity" in str(error.value) and names[10] not in str(error.value)
    text = refusal(lambda: load_model("tiny", path), TorchWeightsError)
    assert "12 weights with NaN or infinity" in text and sum(name in text for name in names) == 10
    torch.save(weights, tmp_path / "w.pth")
    assert "12 weights with NaN" in refusal(lambda: load_state_dict(tmp_path / "w.pth"), TorchWeightsError)
    for program, command in ((compute_score.main, []), (cli.main, ["build"])):
        assert program([*command, "--weights", str(path), "--output", str(tmp_path / "out")]) == 2
        assert "NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    one.survive(text)


def test_finite_weights_pass():
    build_reads(TINY)
    assert all(np.isfinite(array).all() for array in Weights.open(TINY).values())
