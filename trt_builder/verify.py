"""Engines against their PyTorch twins, output by output, and how long each takes.

PyTorch and TensorRT may live in different interpreters, even on different machines: one writes a reference (.npz: the
inputs of every stage and the twin's outputs), the other runs the engines on these inputs and compares. The twins take K
and V; engines for which the text is multiplied out have what that makes of the same K and V.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins.load import text_columns
from runtime.engine import Engine
from runtime.manifest import EngineError, Manifest, write_whole
from runtime.tokenizer import END, START
from trt_builder.build import TIMINGS
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.flavour import Flavour
from trt_builder.text import cross_attentions, folded_texts

if TYPE_CHECKING:
    from cldm.cldm import ControlLDM

TOLERANCE = {"fp16": 2e-2, "fp32": 1e-3}  # on ‖a − b‖ / ‖b‖
VERDICT = "verified.json"
# Of a reference that is made before there are engines: it serves those that were built otherwise, too.
FOLDED = Options(attention="own", conv="own", layer_norm="folded", cross_attention="folded")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One output a of an engine against the twin's b.

    `error` is ‖a − b‖ / ‖b‖, `largest` max |a − b| / max |b|, `mean` is mean |a − b| / mean |b|; `bad` counts NaN
    and infinite values of a.
    """

    stage: str
    output: str
    error: float
    largest: float
    mean: float
    cosine: float
    bad: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the output is whole and within the tolerance."""
        return not self.bad and self.error <= self.tolerance


def input_shapes(
    stage: str, config: ModelConfig, shape: Shape, options: Options | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every input of a stage, as `cldm.stages` names them, or as engines of these options have it.

    Raises ValueError for an unknown stage.
    """
    n, b, h, w = shape.samples, shape.batch, shape.h, shape.w
    base, rows = stage.removesuffix("_cond"), n if stage.endswith("_cond") else b
    x = {"x": (n, config.unet.in_channels, h, w)}
    if base not in config.consumers():
        outside: dict[str, dict[str, tuple[int, ...]]] = {
            "clip": {"tokens": (b, config.clip.max_length)},
            "hint": {"edges": (1, config.hint_channels, shape.height, shape.width)},
            "time": {"timesteps": (shape.steps,)},
            "vae_decoder": {"x": (n, config.vae.embed_dim, h, w)},
            "vae_encoder": {"picture": (n, shape.height, shape.width, config.vae.in_channels)},
        }
        if stage not in outside:
            names = ", ".join([*outside, *config.consumers()])
            raise ValueError(f"there is no stage {stage!r}; the stages are {names}.")
        return outside[stage]
    shapes: dict[str, tuple[int, ...]] = dict(x)
    if base == "control":
        shapes["hint"] = (1, config.control.model_channels, h, w)
    if base == "unet_decoder":
        maps = [(rows, c, h // s, w // s) for c, s in zip(config.unet.channels, config.unet.scales, strict=True)]
        shapes |= {f"skip{i}": size for i, size in enumerate(maps)} | {"middle": maps[-1]}
        shapes |= {f"residual{i}": size for i, size in enumerate([*maps, maps[-1]])}
        shapes |= {"scales": (len(maps) + 1, b), "guidance": (1,), "coefficients": (4,)}
        shapes |= dict.fromkeys(["noise", "e1", "e2"] + ["difference"] * (rows < b), x["x"])
    shapes |= {f"row{i}": (1, layer.out_channels) for i, layer in enumerate(config.rows(base))}
    words, folded = config.clip.max_length, folded_texts(stage, config, shape, options) if options else {}
    for i, one in enumerate(cross_attentions(config, base)):
        if f"text{i}" in folded:
            shapes[f"text{i}"] = rows, text_columns(one.heads, one.channels), 1, words
        else:
            shapes |= {f"{kind}{i}": (rows, words, one.channels) for kind in "kv"}
    return shapes


def random_inputs(stage: str, config: ModelConfig, shape: Shape, seed: int, options: Options | None = None) -> Arrays:
    """Inputs of a stage as a picture would make them: unit normal features, text of random length, edges 0 or 1.

    Those of the twin, or of engines of these options.

    Everything is a number that float16 holds, so that rounding an input is no part of an engine's error.
    """
    draw = np.random.default_rng([seed, *stage.encode()])

    def one(name: str, size: tuple[int, ...]) -> np.ndarray:
        if name == "tokens":
            tokens = np.full(size, END, np.int32)
            for row in tokens:
                length = int(draw.integers(3, size[1] - 2))
                row[: length + 1] = [START, *draw.integers(0, START, length)]
            return tokens
        if name == "picture":
            return draw.integers(0, 256, size, np.uint8)
        if name == "timesteps":
            return np.sort(draw.integers(1, 1000, size)).astype(np.int32)[::-1].copy()
        if name == "edges":
            return np.repeat(draw.random((1, 1, *size[2:])) < 0.1, size[1], axis=1).astype(np.float32)
        numbers = {
            "guidance": lambda: np.full(size, 9.0),
            "coefficients": lambda: np.array([1.3125, -0.3125, 0.125, -0.0625]),
            "scales": lambda: 1 + 0.25 * draw.standard_normal(size),
        }
        return numbers.get(name, lambda: draw.standard_normal(size))().astype(np.float16).astype(np.float32)

    return {name: one(name, size) for name, size in input_shapes(stage, config, shape, options).items()}


def load_twin(manifest: Manifest, device: str) -> ControlLDM:
    """The PyTorch model of an engine folder in float32; raises FileNotFoundError or ValueError as `cldm` does."""
    import torch

    from cldm.canny2image import load_model
    from cldm.model import create_model
    from models import description
    from runtime.schedule import noise_schedule
    from trt_builder.random_weights import random_weights
    from trt_builder.weights import expected_shapes

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    kind, _, seed = manifest.weights.partition(":")
    if kind != "random":
        return load_model(manifest.model, manifest.weights, device)
    name = manifest.model
    constants = {key: value.shape for key, value in noise_schedule().items()}
    shapes = {**constants, **expected_shapes(ModelConfig.load(name))}
    model = create_model(description(name), "meta")
    arrays = random_weights(shapes, int(seed))
    tensors = {key: torch.from_numpy(arrays.pop(key)).to(device).float() for key in list(arrays)}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def twin_outputs(model: ControlLDM, stage: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """What a stage's PyTorch twin makes of the inputs."""
    import torch

    from cldm.stages import STAGES

    with torch.inference_mode():
        outputs = STAGES[stage](model, {name: torch.from_numpy(a).to(model.device) for name, a in inputs.items()})
    return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}


def case(model: ControlLDM, manifest: Manifest, stage: str, seed: int) -> tuple[Arrays, Arrays]:
    """Random inputs of a stage and its twin's outputs, and beside K and V each text that the engines have instead."""
    import torch

    from cldm.text import text_map, transformer_blocks

    config, shape = ModelConfig.load(manifest.model), shape_of(manifest)
    inputs = random_inputs(stage, config, shape, seed)
    outputs = twin_outputs(model, stage, inputs)
    arrays = outputs if stage == "clip" else inputs
    for name, (consumer, i) in folded_texts(stage, config, shape, options_of(manifest)).items():
        at, block = name.removesuffix(f"text{i}"), transformer_blocks(model, consumer)[i]
        k, v = (torch.from_numpy(arrays[f"{at}{kind}{i}"]).to(model.device) for kind in "kv")
        with torch.inference_mode():
            text = text_map(block, k, v, text_columns(block.attn2.heads, k.shape[2]))
        arrays[name] = text.half().cpu().numpy()  # as engines hold it
    return inputs, outputs


def make_reference(manifest: Manifest, path: Path, seed: int, device: str, tell: Callable[[str], None]) -> None:
    """Write the random inputs and the twin's outputs of every stage of an engine folder to a .npz file."""
    model = load_twin(manifest, device)
    arrays: Arrays = {"about": np.array(json.dumps(about(manifest)))}
    for stage in manifest.stages:
        tell(stage)
        inputs, outputs = case(model, manifest, stage, seed)
        arrays |= {f"{stage}/in/{name}": array for name, array in inputs.items()}
        arrays |= {f"{stage}/out/{name}": array for name, array in outputs.items()}
    temporary = path.with_name(f".{path.name}.partial.npz")
    try:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stored_reference(manifest: Manifest, path: Path) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Stage, inputs and outputs of a reference file; raises EngineError where it is for something else."""
    try:
        file = np.load(path, allow_pickle=False)
        facts = json.loads(str(file["about"]))
    except FileNotFoundError:
        raise EngineError(f"there is no reference {path}: {again(path)}") from None
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"{path} is no reference of `verify --make-reference` ({error}).") from None
    for name, value in about(manifest).items():
        if facts.get(name) != value:
            what = f"{path} is for {name} {facts.get(name)}, but the engines are for {value}"
            raise EngineError(f"{what}: {again(path)}")
    config, shape = ModelConfig.load(manifest.model), shape_of(manifest)
    for stage in manifest.stages:
        parts: dict[str, Arrays] = {"in": {}, "out": {}}
        for key in file.files:
            owner, _, rest = key.partition("/")
            if owner == stage:
                part, _, name = rest.partition("/")
                parts[part][name] = file[key]
        if not parts["out"]:
            raise EngineError(f"{path} lacks the stage {stage}: {again(path)}")
        for name in folded_texts(stage, config, shape, options_of(manifest)):
            if name not in parts["in"] | parts["out"]:
                raise EngineError(f"{path} lacks {name} of the stage {stage}: {again(path)}")
        yield stage, parts["in"], parts["out"]


def again(path: Path) -> str:
    """What to do about a reference that does not serve."""
    return f"write it where PyTorch is, with `python -m trt_builder verify DIR --make-reference {path}`."


def fresh_reference(manifest: Manifest, seed: int, device: str) -> Iterator[tuple[str, Arrays, Arrays]]:
    """Stage, inputs and the twin's outputs, made one after the other."""
    model = load_twin(manifest, device)
    for stage in manifest.stages:
        yield stage, *case(model, manifest, stage, seed)


def verify(
    manifest: Manifest, flavour: Flavour, reference: Iterable[tuple[str, Arrays, Arrays]]
) -> Iterator[Comparison]:
    """Compare every output of every stage; raises EngineError where an engine cannot run or has other outputs."""
    tolerance = TOLERANCE[options_of(manifest).precision]
    for stage, inputs, expected in reference:
        with Engine(manifest.plan_bytes(stage), flavour) as engine:
            outputs = engine.run({name: inputs[name] for name in engine.inputs if name in inputs})
        expected = of_engine(expected, outputs)
        if outputs.keys() != expected.keys():
            names = ", ".join(sorted(outputs.keys() ^ expected.keys()))
            raise EngineError(f"the engine {stage} and its PyTorch twin differ in their outputs: {names}.")
        for name, b in expected.items():
            yield compare(stage, name, outputs[name], b, tolerance)


def of_engine(expected: Arrays, outputs: Mapping[str, np.ndarray]) -> Arrays:
    """What is expected of an engine with these outputs: of each cross-attention the text, or else K and V."""
    others = set()
    for name in expected:
        if found := re.fullmatch(r"(\w+)\.text(\d+)", name):
            consumer, i = found.groups()
            others |= {f"{consumer}.k{i}", f"{consumer}.v{i}"} if name in outputs else {name}
    return {name: array for name, array in expected.items() if name not in others}


def compare(stage: str, output: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Comparison:
    """One output a against the expected b; raises EngineError where their shapes differ."""
    if a.shape != b.shape:
        raise EngineError(f"the output {output} of {stage} has the shape {a.shape} instead of {b.shape}.")
    a, b = a.astype(np.float64), b.astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(a)))
    difference = np.abs(a - b)
    tiny = np.finfo(np.float64).tiny  # so that an output of zeros does not divide by zero
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(difference) / max(np.linalg.norm(b), tiny)
        cosine = np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), tiny)
        largest, mean = (f(difference) / max(f(np.abs(b)), tiny) for f in (np.max, np.mean))
    return Comparison(stage, output, float(error), float(largest), float(mean), float(cosine), bad, tolerance)


def measure(manifest: Manifest, flavour: Flavour, seed: int, replays: int) -> Iterator[tuple[str, list[float]]]:
    """Stage and milliseconds of each graph replay on random inputs."""
    config, shape = ModelConfig.load(manifest.model), shape_of(manifest)
    for stage in manifest.stages:
        inputs = random_inputs(stage, config, shape, seed, options_of(manifest))
        with Engine(manifest.plan_bytes(stage), flavour) as engine:
            engine.upload({name: inputs[name] for name in engine.inputs if name in inputs})
            yield stage, engine.graph_times(replays)


def save_timings(manifest: Manifest, gpu: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Write timings.json, milliseconds by stage, into the engine folder; returns its content."""
    stages = {
        stage: {"median_ms": float(np.median(t)), "p90_ms": float(np.percentile(t, 90)), "replays": len(t)}
        for stage, t in times.items()
    }
    content = {"gpu": gpu, "flavour": manifest.flavour, "version": manifest.version, "stages": stages}
    write_whole(manifest.folder / TIMINGS, (json.dumps(content, indent=1) + "\n").encode())
    return content


def save_verdict(manifest: Manifest, rows: Iterable[Comparison]) -> None:
    """Write verified.json into the engine folder: that these plans were verified, and how far off they were."""
    plans = {stage: plan.sha256 for stage, plan in manifest.stages.items()}
    content = {"plans": plans, "comparisons": as_rows(rows)}
    write_whole(manifest.folder / VERDICT, (json.dumps(content, indent=1) + "\n").encode())


def saved_verdict(manifest: Manifest) -> list[Comparison]:
    """The comparisons of an earlier `save_verdict`, or none where it was of other plans or cannot be read."""
    try:
        content = json.loads((manifest.folder / VERDICT).read_text(encoding="utf-8"))
        if content["plans"] != {stage: plan.sha256 for stage, plan in manifest.stages.items()}:
            return []
        return [Comparison(**{key: row[key] for key in row if key != "passed"}) for row in content["comparisons"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # it only saves time


def about(manifest: Manifest) -> dict[str, Any]:
    """What a reference is for."""
    return {"model": Path(manifest.model).stem, "weights": manifest.weights_sha256, "shape": manifest.shape}


def shape_of(manifest: Manifest) -> Shape:
    """The shape that an engine folder was built for; raises EngineError where the manifest names none."""
    try:
        return Shape(**manifest.shape)
    except (TypeError, ValueError) as error:
        raise EngineError(f"{manifest.folder}: the manifest's shape {manifest.shape} is none ({error}).") from None


def options_of(manifest: Manifest) -> Options:
    """The options that an engine folder was built with; raises ValueError where the manifest has none such."""
    return Options(**manifest.options)  # type: ignore[arg-type]


def as_rows(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as JSON knows them."""
    return [asdict(one) | {"passed": one.passed} for one in comparisons]
