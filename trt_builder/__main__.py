"""Build, inspect and verify the TensorRT engines: `python -m trt_builder build | inspect | verify | random-weights`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from rich.logging import RichHandler

from models import find_weights
from plugins.load import CONV_CAPABILITY, require
from runtime.command_line import Parser, escape_output, sentence, stop
from runtime.engine import Engine, gpu
from runtime.manifest import EngineError, Manifest, StagePlan, folder_name
from runtime.steps import COND
from trt_builder import build as building
from trt_builder import verify as verifying
from trt_builder.build import BuildError, Built, Request
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.flavour import Flavour, get_flavour
from trt_builder.inspect import Report, inspected_layers, profile, read_report, save_profile
from trt_builder.random_weights import identity, random_weights, write_random_weights
from trt_builder.stages import STAGES, USUAL
from trt_builder.terminal import (
    ERRORS,
    Bar,
    attentions_text,
    build_table,
    inspect_table,
    kinds_table,
    layer_table,
    output,
    slowest_table,
    tensors_text,
    timings_table,
    verify_table,
)
from trt_builder.weights import Weights, expected_shapes

SIZES = {"tiny": (128, 128)}
USUAL_SIZE = (256, 384)

INSPECT = """Show what is inside the engines of a folder and, where they run here, how long every layer takes. Layers
are timed one after the other, which takes longer in all than the engine does: see verify --time."""

TWO_INTERPRETERS = """Compare the engines of a folder with PyTorch, output by output, on the same random inputs.

  verify DIR                              PyTorch and TensorRT are in this interpreter
  verify DIR --make-reference REF.npz     PyTorch only: write the inputs and what PyTorch makes of them;
                                          of DIR only manifest.json is read, so that it can be another machine
  verify DIR --reference REF.npz          TensorRT only: run the engines on these inputs and compare
  verify --make-reference REF.npz --model sd15 --weights FILE …    the reference before there are engines
  verify DIR --time                       TensorRT only: the median of 50 CUDA graph replays, into DIR/timings.json
"""


def parser() -> Parser:
    """Every command and option."""
    make = Parser(prog="trt_builder", description=__doc__, allow_abbrev=False)
    commands = make.add_subparsers(dest="command", required=True, parser_class=Parser)

    add = commands.add_parser("build", help="build the engines of a model", allow_abbrev=False).add_argument
    add_model(add)
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="(%(default)s)")
    add("--flavour", choices=("tensorrt", "tensorrt_rtx"), help="which TensorRT (the first one installed)")
    add("--target", default="", help="what tensorrt_rtx builds for, such as sm86,sm89 (the GPU here; without one, all)")
    add("--stages", default=",".join(USUAL), help="(%(default)s)")
    add("--cond", action="store_true", help=f"{', '.join(COND)}, too: for schedules with evaluate-cond")
    add("--attention", choices=("auto", "fused", "plain", "own"), default="auto", help="(%(default)s)")
    add("--qkv", choices=("joined", "apart"), default="joined", help="of self-attentions (%(default)s)")
    add("--no-shared-prefix", action="store_true", help="compute what is common to both halves of the batch twice")
    add("--boundary", choices=("channels-last", "linear"), default="channels-last", help="of maps (%(default)s)")
    add("--residual", choices=("auto", "fused", "own"), default="auto", help="of ResBlocks (%(default)s)")
    add("--group-norm", choices=("auto", "own", "builtin", "native"), default="auto", help="(%(default)s)")
    add("--conv", choices=("auto", "builtin", "own"), default="auto", help="of small maps (%(default)s)")
    for name in ("--layer-norm", "--cross-attention", "--upsample"):
        add(name, choices=("auto", "apart", "folded"), default="auto", help="(%(default)s)")
    add("--output", type=Path, default=Path("engines"), help="the engine folder is made in here (%(default)s)")

    add = commands.add_parser(
        "inspect", help="what is inside the engines", description=INSPECT, allow_abbrev=False
    ).add_argument
    add("folder", type=Path, help="an engine folder")
    add("--stage", choices=STAGES, help="this stage alone: its inputs, outputs, attentions and layers")
    add("--bindings", action="store_true", help="list the inputs and outputs of every stage, too")
    add("--slowest", type=int, metavar="N", help="list the N layers that take the longest")
    add("--json", type=Path, metavar="FILE", help="write every layer with its time")

    verify = commands.add_parser(
        "verify", help="compare the engines with PyTorch", description=TWO_INTERPRETERS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = verify.add_argument
    add("folder", type=Path, nargs="?", help="an engine folder; --make-reference can do without, given --model")
    add("--make-reference", type=Path, metavar="FILE.npz", help="write what PyTorch makes of random inputs")
    add("--reference", type=Path, metavar="FILE.npz", help="compare with such a file, without PyTorch")
    add("--time", action="store_true", help="time the engines as CUDA graphs; add --reference to compare, too")
    add("--replays", type=int, default=50, help="for --time (%(default)s)")
    add("--seed", type=int, default=0, help="of the random inputs (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where PyTorch runs (%(default)s)")
    add_model(add)

    add = commands.add_parser("random-weights", help="write seeded random weights", allow_abbrev=False).add_argument
    add("--model", default="sd15", help="sd15, tiny or a .yaml file (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--write", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")
    return make


def add_model(add: Callable[..., object]) -> None:
    """The options that say which model, weights and size."""
    add("--model", help="sd15, tiny or a .yaml file (tiny)")
    add("--weights", type=Path, help="a .safetensors file (the model's usual place)")
    add("--random-weights", type=int, metavar="SEED", help="random weights instead")
    add("--height", type=int, help="in pixels, a multiple of 64 (256; tiny 128)")
    add("--width", type=int, help="in pixels, a multiple of 64 (384; tiny 128)")
    add("--samples", type=int, default=1, help="pictures at once (%(default)s)")
    add("--steps", type=int, default=20, help="timesteps that the stage `time` embeds (%(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0, 1 where verify finds an output over its tolerance, 2 for bad input, 130 when stopped.
    """
    escape_output()
    handler = RichHandler(console=ERRORS, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    commands = {"build": build, "inspect": inspect, "verify": verify, "random-weights": write_weights}
    try:
        options = parser().parse(argv)
        return commands[options.command](options)
    except KeyboardInterrupt:
        print("trt_builder: stopped; of a build, what was finished is kept and the next continues.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"trt_builder: {sentence(error)}", file=sys.stderr)
        return 2


def build(options: argparse.Namespace) -> int:
    """Build the engines and say what was done."""
    wanted = request(options, facts(options))
    if not wanted.manifest.weights.startswith("random:"):
        wanted.load()  # that they fit is worth knowing before anything is written
    show = Bar(wanted.stages)
    rows: list[Built] = building.build(wanted, show)
    output().print(build_table(wanted.manifest, rows))
    if any(row.warnings for row in rows):
        show.say(f"TensorRT's warnings are in {wanted.manifest.folder / building.LOG}.")
    return 0


def request(options: argparse.Namespace, wanted: Manifest) -> Request:
    """What the options of `build` ask for; BuildError or FlavourError where it cannot be had here.

    wanted: the model, weights and shape, as `facts` gives them.
    """
    config, shape = ModelConfig.load(wanted.model), Shape(**wanted.shape)
    stages = tuple(dict.fromkeys([*names(options.stages), *(COND if options.cond else ())]))
    unknown = [name for name in stages if name not in STAGES]
    if unknown or not stages:
        raise BuildError(f"there is no stage {', '.join(unknown) or 'named'}: take some of {','.join(STAGES)}.")
    flavour = get_flavour(options.flavour)
    name, capability, targets = place(flavour, names(options.target.lower()))
    chosen = switches(options, flavour, capability)
    manifest = replace(
        wanted,
        flavour=flavour.name, version=flavour.trt.__version__, gpu=name, capability=capability, targets=targets,
        options=chosen.as_dict(), plugins=flavour.load_plugins(chosen),
        folder=options.output / folder_name(wanted.model, shape.height, shape.width, shape.samples, chosen.precision),
    )  # fmt: skip

    @cache  # it reads all of them, to see that they are finite
    def load() -> Weights:
        return weights_of(manifest, config)

    return Request(manifest, config, shape, chosen, flavour, stages, load)


def names(text: str) -> list[str]:
    """The parts of a list written with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def facts(options: argparse.Namespace) -> Manifest:
    """Model, weights and shape as the command line names them, as a manifest without engines."""
    model = options.model or "tiny"
    config = ModelConfig.load(model)
    height, width = SIZES.get(model, USUAL_SIZE)
    shape = Shape(options.height or height, options.width or width, options.samples, options.steps)
    if options.random_weights is not None:
        if options.weights:
            raise BuildError("--weights and --random-weights exclude each other.")
        if options.random_weights < 0:
            raise BuildError(f"--random-weights is {options.random_weights}, but a seed cannot be negative.")
        weights = f"random:{options.random_weights}"
        digest = identity(expected_shapes(config), options.random_weights)
    else:
        try:
            path = find_weights(model, options.weights)
        except FileNotFoundError as error:
            raise BuildError(f"{error}, or take --random-weights 0.") from None
        with ERRORS.status(f"reading {path}"):
            weights, digest = str(path), file_sha256(path)
    sizes = {"height": shape.height, "width": shape.width, "samples": shape.samples, "steps": shape.steps}
    return Manifest(model, "", "", None, None, [], weights, digest, sizes, verifying.FOLDED.as_dict())


def switches(options: argparse.Namespace, flavour: Flavour, capability: str | None) -> Options:
    """How the networks are defined; what is "auto" is our plugin where it wins."""
    own = flavour.plugins_win(options.precision, capability)

    def usual(asked: Any, otherwise: Any, wins: bool = own, ours: str = "own") -> Any:
        return (ours if wins else otherwise) if asked == "auto" else asked

    attention = usual(options.attention, "fused")
    conv = usual(options.conv, "builtin", own and capability == CONV_CAPABILITY)
    layer_norm = usual(options.layer_norm, "apart", attention == conv == "own", "folded")
    return Options(
        options.precision, attention, options.qkv, not options.no_shared_prefix, options.boundary,
        usual(options.residual, "fused"), usual(options.group_norm, "auto"), conv, layer_norm,
        usual(options.cross_attention, layer_norm, wins=False), usual(options.upsample, "apart", ours="folded"),
    )  # fmt: skip


def place(flavour: Flavour, targets: list[str]) -> tuple[str | None, str | None, list[str]]:
    """GPU name, compute capability and targets to build for; BuildError where the flavour cannot."""
    here, known = gpu(), flavour.targets()
    if flavour.needs_gpu:
        if targets:
            raise BuildError(f"{flavour.label} builds for the GPU of this machine only: leave --target out.")
        if here is None:
            what = f"{flavour.label} builds on the GPU that it builds for, and cuda-python sees none here"
            raise BuildError(f"{what}: use --flavour tensorrt_rtx, which needs none.")
        return here.name, here.capability, []
    if not targets and here is not None:
        targets = [f"sm{here.capability.replace('.', '')}"]
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise BuildError(f"{flavour.label} cannot build for {', '.join(unknown)}: it knows {', '.join(known)}.")
    return None, None, sorted(set(targets or known))


def weights_of(manifest: Manifest, config: ModelConfig) -> Weights:
    """The weights that a manifest names; WeightsError where they do not fit the model."""
    kind, _, seed = manifest.weights.partition(":")
    if kind == "random":
        with ERRORS.status("making random weights"):
            weights = Weights.from_dict(random_weights(expected_shapes(config), int(seed)))
    else:
        weights = Weights.open(manifest.weights)
    weights.check(config)
    return weights


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def inspect(options: argparse.Namespace) -> int:
    """Show what is inside the engines."""
    manifest, console = Manifest.load(options.folder), output()
    if options.stage and options.stage not in manifest.stages:
        manifest.plan_bytes(options.stage)  # says what to run
    if options.slowest is not None and options.slowest < 1:
        raise BuildError(f"--slowest is {options.slowest}, but the least is 1.")
    stages = [options.stage] if options.stage else list(manifest.stages)
    reports: dict[str, Report | None] = {stage: read_report(options.folder, stage) for stage in manifest.stages}
    times: dict[str, dict[str, float]] = {}
    try:
        flavour = ready(manifest)
    except ValueError as error:
        if options.slowest or options.json:
            raise
        console.print(f"No times, only what the build wrote down: {sentence(error)}", markup=False, soft_wrap=True)
    else:
        for stage in stages:
            with Engine(manifest.plan_bytes(stage), flavour) as engine:
                times[stage] = engine.layer_times()
                if (report := reports[stage]) and not report.layers:
                    reports[stage] = replace(report, layers=inspected_layers(engine.layers_json()))
    timed = profile(reports, times)
    if options.json:
        here = gpu()
        save_profile(options.json, manifest, here.name if here else "", timed)
    for stage in stages if options.stage or options.bindings else []:
        if (report := reports[stage]) is not None:
            console.print(tensors_text(stage, report), markup=False, soft_wrap=True)
    if options.stage:
        report = reports[options.stage]
        if report is None:
            what = f"the build left no list of the layers of {options.stage}"
            raise EngineError(f"{what}: delete {manifest.plan_path(options.stage)} and build again.")
        console.print(attentions_text(report), markup=False, soft_wrap=True)
        console.print(layer_table(options.stage, report.layers, times.get(options.stage, {})))
    else:
        console.print(inspect_table(manifest, reports))
    if times:
        console.print(kinds_table(timed))
    if options.slowest:
        console.print(slowest_table(timed, options.slowest))
    return 0


def ready(manifest: Manifest) -> Flavour:
    """The flavour of an engine folder, once it is sure that its engines run here; else a ValueError."""
    here = gpu()
    if here is None:
        raise EngineError(f"{manifest.flavour} runs engines on an NVIDIA GPU only, and cuda-python sees none here.")
    flavour = get_flavour(manifest.flavour)
    manifest.check(flavour.name, flavour.trt.__version__, here.name, here.capability)
    require(manifest.plugins, flavour.trt)
    return flavour


def verify(options: argparse.Namespace) -> int:
    """Compare the engines with PyTorch, write a reference, or take times."""
    named = options.model or options.weights or options.random_weights is not None
    if options.make_reference:
        if bool(options.folder) == bool(options.model):
            raise BuildError("--make-reference needs either an engine folder or --model, and not both.")
        manifest = Manifest.load(options.folder) if options.folder else facts(options)
        if options.folder and options.weights:  # they may lie elsewhere on this machine
            manifest = replace(manifest, weights=str(options.weights))
            if file_sha256(options.weights) != manifest.weights_sha256:
                raise EngineError(f"{options.folder} was not built from {options.weights}: name those that it was.")
        if not options.folder:
            manifest = replace(manifest, stages=dict.fromkeys(STAGES, StagePlan("", "", 0, 0.0)))
        say = Bar(list(manifest.stages)).say
        verifying.make_reference(manifest, options.make_reference, options.seed, device(options), say)
        return 0
    if not options.folder or named:
        raise BuildError("verify takes an engine folder, which knows its model and weights.")
    manifest = Manifest.load(options.folder)
    flavour, status = ready(manifest), 0
    if options.reference or not options.time:
        if options.reference:
            reference = verifying.stored_reference(manifest, options.reference)
        else:
            reference = verifying.fresh_reference(manifest, options.seed, device(options))
        rows = list(verifying.verify(manifest, flavour, reference))
        output().print(verify_table(manifest, rows))
        status = 0 if all(row.passed for row in rows) else 1
    if options.time:
        times = dict(verifying.measure(manifest, flavour, options.seed, options.replays))
        here = gpu()
        content = verifying.save_timings(manifest, here.name if here else "", times)
        output().print(timings_table(manifest, content))
    return status


def device(options: argparse.Namespace) -> str:
    """Where PyTorch runs; BuildError where it is not installed or has no CUDA."""
    try:
        import torch
    except ImportError:
        advice = "write a reference where it is (--make-reference) and compare here with --reference"
        raise BuildError(f"this interpreter has no PyTorch: {advice}.") from None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BuildError("--device cuda needs an NVIDIA GPU and a CUDA build of PyTorch: use --device cpu.")
    return "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"


def write_weights(options: argparse.Namespace) -> int:
    """Write random weights as a file."""
    if options.write.suffix != ".safetensors":
        raise BuildError(f"--write is {options.write}, but only .safetensors files are written.")
    write_random_weights(options.write, expected_shapes(ModelConfig.load(options.model)), options.seed)
    return 0


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program that may build engines, and leave with its status, also where TensorRT does not stop."""
    signal.signal(signal.SIGTERM, stop)
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.name == building.THREAD and thread.is_alive() for thread in threading.enumerate()):
        os._exit(status)  # TensorRT is still at work in there, and nothing else stops it
    sys.exit(status)


if __name__ == "__main__":
    run(main)
