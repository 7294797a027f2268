"""The PyTorch reference: names and shapes of the real checkpoint, models from yaml, weights from files."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from cldm.canny2image import load_model
from cldm.cldm import ControlLDM, WeightsError
from cldm.model import create_model, load_state_dict

ROOT = Path(__file__).resolve().parents[1]
FULL, TINY = ROOT / "models/cldm_v15.yaml", ROOT / "models/tiny/tiny.yaml"
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, list[int]]:
    return json.loads((ROOT / "tests/data/control_sd15_canny.json").read_text())


@pytest.fixture(scope="module")
def tiny() -> ControlLDM:
    torch.manual_seed(0)
    return create_model(TINY)


def test_names_and_shapes_are_the_checkpoints(checkpoint: dict[str, list[int]]) -> None:
    ours = {name: list(value.shape) for name, value in create_model(FULL, "meta").state_dict().items()}
    del checkpoint[POSITION_IDS]
    assert ours == checkpoint


def test_meta_construction_takes_no_memory() -> None:
    assert all(value.is_meta for value in create_model(FULL, "meta").state_dict().values())


@pytest.mark.parametrize("with_ids", [True, False])
def test_position_ids_may_be_there_or_not(tiny: ControlLDM, with_ids: bool) -> None:
    weights = tiny.state_dict() | ({POSITION_IDS: torch.arange(77)[None]} if with_ids else {})
    create_model(TINY, "meta").load_state_dict(weights, assign=True)


def test_a_yaml_of_the_controlnet_repository_works() -> None:
    config = OmegaConf.load(FULL)
    params = config.model.params
    params.update(num_timesteps_cond=1, first_stage_key="jpg", conditioning_key="crossattn", use_ema=False)
    params.unet_config.params.update(image_size=32, use_checkpoint=True, legacy=False, use_spatial_transformer=True)
    params.first_stage_config.target = "ldm.models.autoencoder.AutoencoderKL"
    params.first_stage_config.params.lossconfig = {"target": "torch.nn.Identity"}
    params.cond_stage_config.target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    path = Path(os.environ["PYTEST_TMP"]) / "original.yaml"
    OmegaConf.save(config, path)
    assert create_model(path, "meta").state_dict().keys() == create_model(FULL, "meta").state_dict().keys()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "no valid YAML"),
        ("x: 1", "no `model`"),
        ("model: {target: os.system, params: {}}", "unknown target 'os.system'"),
        ("model: {target: ldm.clip.FrozenCLIPEmbedder}", "must be ControlLDM"),
        ("model: {target: ldm.clip.FrozenCLIPEmbedder, params: {depth: 3}}", "unexpected keyword argument 'depth'"),
    ],
)
def test_a_bad_yaml_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("`", ".")):
        create_model(path, "meta")
    with pytest.raises(FileNotFoundError):
        create_model(tmp_path / "none.yaml")


def test_misfits_are_named_ten_at_most(tiny: ControlLDM) -> None:
    weights = dict(tiny.state_dict())
    names = [name for name in weights if name.startswith("control_model.")]
    for name in names[:12]:
        del weights[name]
    weights[names[12]] = torch.zeros(3)
    weights["stranger"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        tiny.load_state_dict(weights)
    text = str(caught.value)
    assert "12 missing" in text and "1 surplus: stranger" in text and "1 wrong-shaped" in text
    assert all(name in text for name in names[:10]) and names[10] not in text and names[12] in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_every_kind_of_file(tmp_path: Path, suffix: str, nested: bool) -> None:
    weights = {"a": torch.randn(3, 4), "b.c": torch.randn(2).half()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if nested else weights, path)
    loaded = load_state_dict(path, "cpu")
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["PYTEST_TMP"] + "/executed",)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    path = tmp_path / "bomb.pth"
    if plain:
        path.write_bytes(pickle.dumps({"w": Bomb()}))
    else:
        torch.save({"w": Bomb()}, path)
    with pytest.raises(WeightsError, match="could run code|cannot be read"):
        load_state_dict(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_weights_are_refused(tmp_path: Path, tiny: ControlLDM) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, whole)
    data = whole.read_bytes()
    for name, content in {"cut.safetensors": data[: len(data) // 2], "empty.pth": b"", "text.ckpt": b"hello"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            load_state_dict(path)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="no dictionary of tensors"):
        load_state_dict(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        load_state_dict(tmp_path / "none.pth")


def test_load_model_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_model("tiny", tmp_path / "none.safetensors")
    (tmp_path / "mine.yaml").write_text(Path(TINY).read_text())
    with pytest.raises(FileNotFoundError, match=r"mine\{.safetensors,.pth,.ckpt\}; name their file with --weights"):
        load_model(tmp_path / "mine.yaml")


def test_public_names(tiny: ControlLDM) -> None:
    ids = torch.full((2, 77), 49407)
    hint, context = torch.rand(2, 3, 64, 64), tiny.get_learned_conditioning(["a bird", ""])
    assert tiny.cond_stage_model.transformer(input_ids=ids).last_hidden_state.shape == context.shape
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 951])
    residuals = tiny.control_model(x=x, hint=hint, timesteps=t, context=context)
    assert len(residuals) == len(tiny.control_scales)
    assert tiny.apply_model(x, t, {"c_concat": [hint], "c_crossattn": [context]}).shape == x.shape
    assert tiny.apply_model(x, t, {"c_concat": None, "c_crossattn": [context]}).shape == x.shape
    assert tiny.decode_first_stage(x).shape == hint.shape
    assert tiny.first_stage_model.encode(hint).mean.shape == x.shape
