"""Random weights: the same numbers everywhere, and of a size that keeps every stage near 1."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from runtime.schedule import Schedule, noise_schedule
from trt_builder.config import ModelConfig, Shape
from trt_builder.random_weights import identity, random_weights, statistics, write_random_weights
from trt_builder.verify import random_inputs
from trt_builder.weights import Weights, expected_shapes

YAML = Path(__file__).resolve().parent.parent / "models" / "tiny" / "tiny.yaml"
TINY = ModelConfig.load("tiny")
SHAPES = expected_shapes(TINY)


def digest(weights: dict[str, np.ndarray]) -> str:
    joined = hashlib.sha256()
    for name in sorted(weights):
        joined.update(name.encode() + weights[name].tobytes())
    return joined.hexdigest()


def test_the_numbers_are_the_same_in_every_interpreter():
    # Found with CPython 3.10 and numpy 2.2, and with CPython 3.12 and numpy 2.4.
    shapes = {"a.weight": (3, 5, 3, 3), "b.norm.weight": (7,), "b.norm.bias": (7,)}
    assert digest(random_weights(shapes, 0)) == EXPECTED


EXPECTED = "53519fabd14e10f354d05cb455f9afda559fd83fcfd74ab16d750b5da8e0312e"


def test_a_subset_and_any_number_of_threads_give_the_same_numbers():
    everything = random_weights(SHAPES, 5, threads=3)
    some = dict(list(SHAPES.items())[100:140])
    for name, array in random_weights(some, 5, threads=1).items():
        np.testing.assert_array_equal(array, everything[name])


def test_seeds_and_names_give_other_numbers():
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64)}
    one, two = random_weights(shapes, 1), random_weights(shapes, 2)
    assert abs(np.corrcoef(one["a.weight"].ravel(), one["b.weight"].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(one["a.weight"].ravel(), two["a.weight"].ravel())[0, 1]) < 0.1
    assert identity(shapes, 1) != identity(shapes, 2) != identity({"a.weight": (64, 64)}, 2)


def test_mean_and_deviation_are_those_meant():
    for name in ("control_model.zero_convs.1.0.weight", "control_model.middle_block.0.in_layers.0.weight"):
        shape = (256, 256, 1, 1) if "zero" in name else (65536,)
        array = random_weights({name: shape}, 0)[name].astype(np.float64)
        mean, std = statistics(name, shape)
        assert array.std() == pytest.approx(std, rel=0.02)
        assert array.mean() == pytest.approx(mean, abs=0.02 * std)


def test_nothing_is_zero_and_everything_fits_the_model():
    weights = random_weights(SHAPES, 0)
    Weights.from_dict(weights).check(TINY)
    for name, array in weights.items():
        assert array.dtype == np.float16 and np.isfinite(array).all(), name
        assert np.count_nonzero(array) > 0.9 * array.size, name


def test_a_written_file_holds_the_same_numbers(tmp_path):
    some = dict(list(SHAPES.items())[:30])
    told: list[int] = []
    write_random_weights(tmp_path / "w.safetensors", some, 4, told.append)
    read, made = Weights.open(tmp_path / "w.safetensors"), random_weights(some, 4)
    assert set(read) == {*some, *noise_schedule()} and len(told) == len(some)
    for name in some:
        np.testing.assert_array_equal(read[name], made[name])
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    load_file = pytest.importorskip("safetensors.numpy").load_file
    np.testing.assert_array_equal(load_file(tmp_path / "w.safetensors")["betas"], read["betas"])


def test_refusals():
    with pytest.raises(ValueError, match="cannot be negative"):
        random_weights({"a.weight": (1,)}, -1)
    with pytest.raises(ValueError, match="'a.running_mean'"):
        random_weights({"a.running_mean": (1,)}, 0)


@pytest.fixture(scope="module")
def model():
    """The tiny model with random weights, in PyTorch on one thread: its layers are too small for more."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    from cldm.model import create_model

    shapes = {**{name: value.shape for name, value in noise_schedule().items()}, **SHAPES}
    made = create_model(YAML, "meta")
    arrays = random_weights(shapes, 0)
    made.load_state_dict({name: torch.from_numpy(array).float() for name, array in arrays.items()}, assign=True)
    yield made.requires_grad_(False)
    torch.set_num_threads(threads)


def test_the_schedule_constants_are_those_of_the_model(model):
    from cldm.model import create_model

    fresh = create_model(YAML).state_dict()
    for name in noise_schedule():
        np.testing.assert_allclose(model.state_dict()[name], fresh[name], rtol=1e-6)


@pytest.mark.parametrize("stage", ["clip", "hint", "time", "control", "unet_encoder", "unet_decoder", "vae_encoder"])
def test_the_outputs_of_every_stage_are_near_1(model, stage):
    from trt_builder.verify import twin_outputs

    inputs = random_inputs(stage, TINY, Shape(128, 192, 1), 0)
    guidance = 9.0 if stage == "unet_decoder" else 1.0  # it takes apart two halves that have nothing in common here
    for name, array in twin_outputs(model, stage, inputs).items():
        rms = float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))
        assert 0.1 < rms < 10 * guidance, f"{stage}.{name} {rms}"


def test_a_picture_uses_most_of_its_range(model):
    from trt_builder.verify import twin_outputs

    picture = twin_outputs(model, "vae_decoder", random_inputs("vae_decoder", TINY, Shape(128, 128), 0))["picture"]
    assert 20 < picture.std() < 110 and np.mean((picture == 0) | (picture == 255)) < 0.2


def test_a_loop_of_20_steps_stays_finite(model):
    from trt_builder.verify import twin_outputs

    shape = Shape(64, 64)
    start = {stage: random_inputs(stage, TINY, shape, 0) for stage in ("clip", "hint", "time", "unet_decoder")}
    updates = Schedule.parse("full", 20).updates()
    start["time"]["timesteps"] = np.array([update.evaluation.timestep for update in updates], np.int32)
    once = twin_outputs(model, "clip", start["clip"]) | twin_outputs(model, "time", start["time"])
    hint, x = twin_outputs(model, "hint", start["hint"]), start["unet_decoder"]["x"]

    def feed(stage: str, step: int) -> dict[str, np.ndarray]:
        mine = {name.split(".")[1]: array for name, array in once.items() if name.startswith(f"{stage}.")}
        return {name: array[step : step + 1] if name.startswith("row") else array for name, array in mine.items()}

    for i, update in enumerate(updates):
        made = twin_outputs(model, "control", {"x": x, **hint, **feed("control", i)})
        made |= twin_outputs(model, "unet_encoder", {"x": x, **feed("unet_encoder", i)})
        largest = max(float(np.abs(array).max()) for array in made.values())
        assert largest < 1000, f"step {i}: {largest}"  # float16 ends at 65504
        rest = dict.fromkeys(["noise", "e1", "e2"], np.zeros_like(x))
        rest |= {"x": x, "coefficients": np.array([update.a, *update.b], np.float32)}
        rest |= {name: start["unet_decoder"][name] for name in ("scales", "guidance")}
        x = twin_outputs(model, "unet_decoder", made | feed("unet_decoder", i) | rest)["x_next"]
    assert np.isfinite(x).all() and 0.1 < x.std() < 100
