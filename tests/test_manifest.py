"""The engine folder: only what the manifest vouches for is handed out, and everything else is one clear sentence."""

import hashlib
import json
from pathlib import Path

import pytest

from runtime.manifest import EngineError, Manifest, StagePlan, folder_name, seal, write_whole

PLAN = bytes(range(256)) * 8
WEIGHTS = "a" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine folder with the one stage `hint`."""
    folder = tmp_path / "tiny-128x128-n1-fp16"
    folder.mkdir()
    write_whole(folder / "hint.plan", PLAN)
    manifest = Manifest(
        model="tiny", flavour="tensorrt", version="8.6.0", gpu="NVIDIA H200", capability="9.0", targets=[],
        weights="random:3", weights_sha256=WEIGHTS,
        shape={"height": 128, "width": 128, "samples": 1, "steps": 20}, options={"precision": "fp16"}, folder=folder,
    )  # fmt: skip
    manifest.with_stage("hint", StagePlan("k" * 64, hashlib.sha256(PLAN).hexdigest(), len(PLAN), 1.5)).save()
    return folder


def edit(folder: Path, change) -> None:
    """Change manifest.json as one who also makes its SHA-256 right."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    content["sha256"] = seal({n: v for n, v in content.items() if n not in ("made_by", "schema", "sha256")})
    (folder / "manifest.json").write_text(json.dumps(content))


def refused(action) -> str:
    """The sentence with which an action is refused."""
    with pytest.raises(EngineError) as error:
        action()
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


def test_a_saved_manifest_loads_as_it_was(folder):
    manifest = Manifest.load(folder)
    assert manifest.stages["hint"].seconds == 1.5 and manifest.folder == folder
    assert manifest.plan_bytes("hint") == PLAN
    before = (folder / "manifest.json").read_bytes()
    manifest.save()
    assert (folder / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["hint.plan", "manifest.json"]


def test_changed_truncated_and_missing_plans_are_refused(folder):
    manifest, plan = Manifest.load(folder), folder / "hint.plan"
    for place in (0, 1000, len(PLAN) - 1):
        flipped = bytearray(PLAN)
        flipped[place] ^= 1
        plan.write_bytes(flipped)
        assert "changed" in refused(lambda: manifest.plan_bytes("hint"))
    plan.write_bytes(PLAN[:-1])
    assert "2047 bytes instead of 2048" in refused(lambda: manifest.plan_bytes("hint"))
    plan.unlink()
    text = refused(lambda: manifest.plan_bytes("hint"))
    assert "cannot be read" in text and manifest.command() in text


def test_the_command_that_it_advises_builds_the_same(folder):
    manifest = Manifest.load(folder)
    assert manifest.command() == (
        "`python -m trt_builder build --model tiny --flavour tensorrt --random-weights 3 --height 128 --width 128 "
        f"--samples 1 --precision fp16 --output {folder.parent}`"
    )
    edit(folder, lambda c: c.update(targets=["sm86", "sm89"], weights="my weights.safetensors"))
    edit(folder, lambda c: c["options"].update(attention="plain", qkv="joined", shared_prefix=False))
    edit(folder, lambda c: c["options"].update(layer_norm="folded", cross_attention="folded"))
    assert "--attention plain --layer-norm folded --cross-attention folded" in Manifest.load(folder).command()
    edit(folder, lambda c: c["options"].update(layer_norm="apart", cross_attention="apart"))
    edit(folder, lambda c: c["shape"].update(steps=10))
    words = Manifest.load(folder).command()
    assert "--target sm86,sm89 --weights 'my weights.safetensors'" in words and "--qkv" not in words
    assert "--steps 10 --precision fp16 --attention plain --layer-norm apart --cross-attention apart" in words
    assert " --cross-attention apart --no-shared-prefix" in words


def test_a_plan_that_the_manifest_does_not_list_is_refused(folder):
    write_whole(folder / "clip.plan", PLAN)
    assert "no plan of the stage 'clip'" in refused(lambda: Manifest.load(folder).plan_bytes("clip"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(note="x"), "note is unknown"),
        (lambda c: c.pop("version"), "version is missing"),
        (lambda c: c.update(version=8.6), "version is 8.6"),
        (lambda c: c.update(targets="sm89"), "targets is 'sm89'"),
        (lambda c: c.update(targets=[89]), "targets is [89]"),
        (lambda c: c.update(schema=1), "schema is 1"),
        (lambda c: c.pop("made_by"), "did not write it"),
        (lambda c: c.update(shape={"height": "128"}), "shape is {'height': '128'}"),
        (lambda c: c["options"].update(precision=16), "options is {'precision': 16}"),
        (lambda c: c.update(stages=[]), "stages is []"),
        (lambda c: c["stages"].update({"../hint": c["stages"]["hint"]}), "'../hint' is no name"),
        (lambda c: c["stages"].update(clip=None), "stages.clip is None"),
        (lambda c: c["stages"]["hint"].update(bytes=True), "stages.hint.bytes is True"),
        (lambda c: c["stages"]["hint"].update(bytes="2048"), "stages.hint.bytes is '2048'"),
        (lambda c: c["stages"]["hint"].update(sha256="abc"), "stages.hint.sha256 is 'abc'"),
        (lambda c: c["stages"]["hint"].update(file="/bin/sh"), "stages.hint.file is unknown"),
        (lambda c: c["stages"]["hint"].pop("key"), "stages.hint.key is missing"),
        (lambda c: c["stages"]["hint"].update(seconds=10**400), "stages.hint.seconds is 1000"),
        (lambda c: c["stages"]["hint"].update(seconds=float("nan")), "stages.hint.seconds is nan"),
        (lambda c: c["stages"]["hint"].update(bytes=2**63), "stages.hint.bytes is 9223372036854775808"),
        (lambda c: c["stages"]["hint"].update(bytes=-1), "stages.hint.bytes is -1"),
        (lambda c: c["shape"].pop("steps"), "its shape is {'height': 128"),
        (lambda c: c["shape"].update(depth=3), "its shape is {'depth': 3"),
        (lambda c: c["shape"].update(width=0), "'width': 0"),
        (lambda c: c.update(weights="random:"), "its weights are 'random:'"),
        (lambda c: c.update(weights="random:1e3"), "its weights are 'random:1e3'"),
        (lambda c: c.update(model=["x" * 100_000]), "model is ['xxxx"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(folder, change, said):
    edit(folder, change)
    text = refused(lambda: Manifest.load(folder))
    assert said in text and "python -m trt_builder build" in text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert "cannot be used" in refused(lambda: Manifest.load(folder))


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    assert "holds no engines" in refused(lambda: Manifest.load(tmp_path))
    assert "holds no engines" in refused(lambda: Manifest.load(tmp_path / "nowhere"))


def test_other_tensorrt_gpu_or_weights_are_refused(folder):
    manifest = Manifest.load(folder)
    right = ("tensorrt", "8.6.0", "NVIDIA H200", "9.0")
    manifest.check(*right)
    manifest.check(*right, WEIGHTS)
    assert "but this is tensorrt 10.1" in refused(lambda: manifest.check("tensorrt", "10.1", *right[2:]))
    assert "tensorrt_rtx" in refused(lambda: manifest.check("tensorrt_rtx", "8.6.0", *right[2:]))
    assert "NVIDIA L4" in refused(lambda: manifest.check(*right[:2], "NVIDIA L4", "8.9"))
    assert "None" in refused(lambda: manifest.check(*right[:2], None, None))
    assert "other weights" in refused(lambda: manifest.check(*right, "b" * 64))


def test_listed_targets_stand_for_the_gpu(folder):
    edit(folder, lambda c: c.update(gpu=None, capability=None, targets=["sm86", "sm120"]))
    manifest = Manifest.load(folder)
    manifest.check("tensorrt", "8.6.0", "RTX 3090", "8.6")
    manifest.check("tensorrt", "8.6.0", "RTX 5090", "12.0")
    text = refused(lambda: manifest.check("tensorrt", "8.6.0", "RTX 4090", "8.9"))
    assert "sm86, sm120" in text and "8.9" in text
    assert "sm86" in refused(lambda: manifest.check("tensorrt", "8.6.0", None, None))


def test_names_of_engine_folders():
    assert folder_name("sd15", 256, 384, 1, "fp16") == "sd15-256x384-n1-fp16"
    assert folder_name("models/mine.yaml", 64, 128, 3, "fp32") == "mine-64x128-n3-fp32"
