"""Everything before scoring: find and check the weights, compile plugins, build and verify the engines.

`python preprocess.py` prepares the full-size model on a machine with an NVIDIA GPU, and the small one without. It can
be stopped at any time: the next run continues, and one with nothing left to do ends in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from models import ENDINGS, VARIABLE, find_weights
from runtime.command_line import Parser, sentence
from runtime.engine import Gpu, gpu
from runtime.images import read_image, resized_size
from runtime.manifest import Manifest
from runtime.schedule import noise_schedule
from runtime.steps import COND
from trt_builder import __main__ as cli
from trt_builder import build as building
from trt_builder import verify as verifying
from trt_builder.build import Built
from trt_builder.config import ModelConfig, Shape
from trt_builder.convert import convert
from trt_builder.flavour import MODULES, Flavour, FlavourError, get_flavour
from trt_builder.terminal import ERRORS, Bar, output, show_size, table, verify_table
from trt_builder.weights import Weights, expected_shapes

ROOT = Path(__file__).resolve().parent
CACHE = "weights"  # in the output folder, for what a checkpoint in a read-only folder is converted into
TARGET = "sm89"  # what TensorRT-RTX builds for where there is no GPU to ask
INSTALL = (
    "`pip install -e '.[rtx]'` for a GeForce RTX (it also builds where there is no GPU), "
    "or `pip install -e '.[tensorrt]'` for other NVIDIA GPUs"
)
STATUSES = """exit status:
  0    everything that was asked for is there. What this machine cannot do unasked is said and is no failure:
       verifying without a GPU or without PyTorch, and engines where there are neither a GPU nor TensorRT
       (unless --shapes, --flavour or --target asks for them)
  1    an engine's outputs are further from PyTorch's than they may be
  2    it could not be done: bad input, no or unfit weights, engines asked for that cannot be built here
  130  stopped; what was finished is kept
"""


def parser() -> argparse.ArgumentParser:
    """Every option."""
    make = Parser(
        prog="preprocess", description=__doc__, epilog=STATUSES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = make.add_argument
    add("--model", help="sd15, tiny or a .yaml file (sd15 where there is a GPU, else tiny)")
    add("--weights", type=Path, metavar="FILE", help=f"a .safetensors, .pth or .ckpt file ({VARIABLE}, then models/)")
    add("--shapes", nargs="+", metavar="HxW", help="height and width of the pictures (256x384; tiny 128x128)")
    add("--samples", type=int, default=1, help="pictures at once (%(default)s)")
    add("--steps", type=int, default=20, help="the longest schedule that the engines take (%(default)s)")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="(%(default)s)")
    add("--cond", action="store_true", help=f"{', '.join(COND)}, too: for schedules with evaluate-cond")
    add("--flavour", choices=("auto", *MODULES), default="auto", help="which TensorRT (the first that can build here)")
    add("--target", default="", help=f"what tensorrt_rtx builds for, as sm86,sm89 (the GPU here; without one {TARGET})")
    add("--output", type=Path, default=ROOT / "engines", help="the folder of engine folders (engines/)")
    add("--no-verify", action="store_true", help="leave out the comparison with PyTorch")
    add("--reference", type=Path, metavar="FILE.npz", help="compare with this file of `trt_builder verify` instead")
    return make


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what the command line asks for; returns the exit status, which --help explains."""
    try:
        return preprocess(parser().parse_args(argv))
    except KeyboardInterrupt:
        print("preprocess: stopped; what was finished is kept, and the next run continues.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"preprocess: {sentence(error)}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Prepared:
    """The engines of one shape: what was done for them, whether they run here, and what verifying them found."""

    manifest: Manifest
    rows: list[Built]
    runs: bool
    verified: str
    passed: bool


def preprocess(options: argparse.Namespace) -> int:
    """Weights, plugins, engines, verification, and what to run next."""
    here, show = gpu(), Bar([])
    model = options.model or ("sd15" if here or options.weights else "tiny")
    config = ModelConfig.load(model)
    shapes = wanted_shapes(options, model)
    if options.model is None and not options.weights and here is None:
        show.say("There is no GPU here: this prepares the small model (--model sd15 is the full-size one).")
    flavour, problem = choose_flavour(options.flavour, here, show)
    asked = options.shapes or options.target or options.flavour != "auto" or here is not None
    if flavour:
        target = options.target or ("" if here or flavour.needs_gpu else TARGET)
        cli.place(flavour, cli.names(target.lower()))  # that it can build for them is worth knowing first
    path = prepare_weights(options, model, config, show)
    if flavour is None:
        show.say(f"No engines were built: {problem}.")
        prepared = []
    else:
        compile_plugins(flavour, show)
        words = ["--model", model, "--weights", str(path), "--samples", str(options.samples), "--output"]
        words += [str(options.output), "--precision", options.precision, "--flavour", flavour.name, "--target", target]
        words += ["--steps", str(options.steps), *(["--cond"] if options.cond else [])]
        build = cli.parser().parse_args(["build", *words])
        facts = cli.facts(build)
        prepared = [prepare_shape(build, facts, shape, options) for shape in shapes]
        output().print(summary(prepared))
    if here is None:
        what = "compares every output of the engines with PyTorch's, and compute_score.py draws with them"
        show.say(f"With an NVIDIA GPU, preprocess.py {what}; without one, it draws with PyTorch.")
    runs = bool(prepared) and all(one.runs for one in prepared)
    print("Next:", *next_lines(options, model, path, shapes, runs), sep="\n  ")
    if flavour is None and asked:
        return 2
    return 0 if all(one.passed for one in prepared) else 1


def wanted_shapes(options: argparse.Namespace, model: str) -> list[Shape]:
    """The shapes to build for; BuildError or ValueError for one that cannot be."""
    height, width = cli.SIZES.get(model, cli.USUAL_SIZE)
    shapes: dict[Shape, None] = {}
    for text in options.shapes or [f"{height}x{width}"]:
        sides = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text)
        if not sides:
            raise building.BuildError(f"--shapes has {text!r}, which is no height x width as 256x384.")
        shapes[Shape(int(sides[1]), int(sides[2]), options.samples, options.steps)] = None
    if options.reference and len(shapes) > 1:
        raise building.BuildError(f"--reference is for one shape, but --shapes has {len(shapes)}.")
    return list(shapes)


def choose_flavour(name: str, here: Gpu | None, show: Bar) -> tuple[Flavour | None, str]:
    """The TensorRT that builds here, or None and why there is none."""
    names = (name,) if name != "auto" else MODULES if here else ("tensorrt_rtx",)  # the one that needs no GPU
    for module in names:
        try:
            return get_flavour(module), ""
        except FlavourError as error:
            if name != "auto":
                return None, str(error)
            if module in names[:-1] and importlib.util.find_spec(module):
                show.say(f"{sentence(error)} Trying {names[-1]}.")
    which = "no TensorRT is installed" if here else "no TensorRT that builds without a GPU is installed"
    return None, f"{which}: {INSTALL}"


def prepare_weights(options: argparse.Namespace, model: str, config: ModelConfig, show: Bar) -> Path:
    """The .safetensors file to build from, which fits the model; FileNotFoundError or WeightsError where none does."""
    try:
        path = find_weights(model, options.weights).absolute()
    except FileNotFoundError as error:
        if options.model is None and not options.weights:
            raise FileNotFoundError(f"{error}, or take --model tiny") from None
        raise
    if path.suffix not in ENDINGS:
        raise building.BuildError(f"--weights is {path}, which is none of {', '.join(ENDINGS)}.")
    if path.suffix != ".safetensors":
        with ERRORS.status(f"converting {escape(str(path))}"):
            found, path = path, convert(path, cli.file_sha256(path), config, (options.output / CACHE).absolute())
        show.say(f"{short(found)} is {short(path)} from here on.")
    weights = Weights.open(path)
    with ERRORS.status(f"checking {escape(str(path))}"):
        weights.check(config)
    show.say(f"Weights: {short(path)}: {len(weights)} of them, names and shapes fit, all numbers are finite.")
    known = {*expected_shapes(config), *noise_schedule()}
    strange = [name for name in weights if name not in known and not name.endswith("position_ids")]
    strange += [name for name in known if name not in weights]
    if strange:
        some = f"{', '.join(sorted(strange)[:3])}{', …' if len(strange) > 3 else ''}"
        what = f"{len(strange)} names that the model lacks or has besides ({some})"
        show.say(f"The engines do without them, but compute_score.py's reference will refuse these weights: {what}.")
    return path


def compile_plugins(flavour: Flavour, show: Bar) -> None:
    """Compile the plugins, where this checkout has any, this TensorRT takes them, and there is a compiler."""
    if flavour.rtx or not importlib.util.find_spec("plugins"):
        return
    try:
        with ERRORS.status("compiling plugins"):
            library = importlib.import_module("plugins.build").build()
        show.say(f"Plugins: {short(library)}")
    except (ValueError, OSError) as error:
        show.say(f"No plugins were compiled: {sentence(error)}")


def prepare_shape(build: argparse.Namespace, facts: Manifest, shape: Shape, options: argparse.Namespace) -> Prepared:
    """Build what is missing of the engines of one shape, and verify them."""
    sizes = {"height": shape.height, "width": shape.width, "samples": shape.samples, "steps": shape.steps}
    request = cli.request(build, replace(facts, shape=sizes))
    show = Bar(request.stages)
    show.say(f"Engines for {shape.height}x{shape.width}, in {short(request.manifest.folder)}")
    rows = building.build(request, show)
    manifest = Manifest.load(request.manifest.folder)
    try:
        flavour = cli.ready(manifest)
    except ValueError as error:  # built for another GPU, or there is none
        why = "needs a GPU" if gpu() is None else str(error)
        return Prepared(manifest, rows, False, f"no: {why}", True)
    verified, passed = verify(manifest, flavour, options)
    return Prepared(manifest, rows, True, verified, passed)


def verify(manifest: Manifest, flavour: Flavour, options: argparse.Namespace) -> tuple[str, bool]:
    """What comparing the engines with PyTorch found, in words, and whether nothing speaks against them."""
    if options.no_verify:
        return "no: --no-verify", True
    rows = [] if options.reference else verifying.saved_verdict(manifest)
    if not rows:
        if options.reference:
            reference = verifying.stored_reference(manifest, options.reference)
        elif importlib.util.find_spec("torch"):
            device = cli.device(argparse.Namespace(device="auto"))
            reference = verifying.fresh_reference(manifest, 0, device)
        else:
            return "no: needs PyTorch or --reference", True
        rows = []
        with ERRORS.status("verifying") as status:
            for row in verifying.verify(manifest, flavour, reference):
                status.update(f"verifying {row.stage}")
                rows.append(row)
        if all(row.passed for row in rows):
            verifying.save_verdict(manifest, rows)
        else:
            output().print(verify_table(manifest, rows))
    worst = max(rows, key=lambda row: (not row.passed, row.error / row.tolerance))
    what = f"{worst.stage}.{worst.output} {worst.error:.1e} off"
    return (f"yes: {what}", True) if worst.passed else (f"over: {what}", False)


def summary(prepared: Sequence[Prepared]) -> Table:
    """One row a shape."""
    first = prepared[0].manifest
    built_for = ", ".join(first.targets) or str(first.gpu)
    title = f"{Path(first.model).stem} · {first.flavour} {first.version} · {built_for}"
    left = ["engines", "verified", "folder"]
    made = table(title, "shape", "samples", "engines", "bytes", "seconds", "verified", "folder", left=left)
    for one in prepared:
        shape, built = one.manifest.shape, [row for row in one.rows if not row.kept]
        counts = {"built": len(built), "kept": len(one.rows) - len(built)}
        made.add_row(
            f"{shape['height']}x{shape['width']}",
            str(shape["samples"]),
            ", ".join(f"{count} {what}" for what, count in counts.items() if count),
            show_size(sum(row.bytes for row in one.rows)),
            f"{sum(row.seconds for row in built):.1f}",
            escape(one.verified) if one.passed else f"[red]{escape(one.verified)}",
            escape(short(one.manifest.folder)),
        )
    return made


def next_lines(
    options: argparse.Namespace, model: str, path: Path, shapes: Sequence[Shape], tensorrt: bool
) -> list[str]:
    """The command lines that score what was prepared, one for each length of the short side."""
    program = os.environ.get("COMPUTE_SCORE", "python compute_score.py")  # as the container's image sets it
    common = ["--model", model] if model != "tiny" else []
    try:
        usual = find_weights(model).absolute()
    except FileNotFoundError:
        usual = None
    common += ["--weights", short(path)] if path != usual else []
    if tensorrt:
        common += ["--backend", "tensorrt"]
        elsewhere = options.output.resolve() != (ROOT / "engines").resolve()
        common += ["--engines", short(options.output)] if elsewhere else []
    common += ["--samples", str(options.samples)] if options.samples > 1 else []
    lines = []
    for side in dict.fromkeys(min(shape.height, shape.width) for shape in shapes):
        sizes = [(s.height, s.width) for s in shapes if min(s.height, s.width) == side]
        words = common + (["--resolution", str(side)] if side != min(cli.SIZES.get(model, cli.USUAL_SIZE)) else [])
        ours = {resized_size(read_image(file), side) for file in (ROOT / "pictures").glob("*.png")}
        if tensorrt and not ours <= set(sizes):  # PyTorch draws pictures of any size
            names = ", ".join(f"{width}x{height}" for height, width in sizes)
            lines.append(f"{program} {shlex.join(words)} --images FOLDER  # of pictures {names}, or in proportion")
        else:
            lines.append(f"{program} {shlex.join(words)}".strip())
    return lines


def short(path: Path) -> str:
    """A path from here, where it lies below."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    cli.run(main)
