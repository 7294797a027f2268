"""The benchmark: pictures in; PD score, latency, pictures, table, plots and JSON out.

`python compute_score.py` runs the small model on the pictures of this repository; `--help` names every option.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from bench.output import OutputError, check_output, ignoring_signals, output_folder
from bench.report import PD_LIMIT, RESULTS, PictureResult, comparison_table, result_table, write_reports
from runtime.command_line import Parser, UsageError, escape_output, sentence, stop
from runtime.images import ImageError, canny_hint, read_image, resize_image
from runtime.manifest import EngineError
from runtime.schedule import Schedule, ddim_timesteps, every_schedule

if TYPE_CHECKING:  # these import torch or matplotlib, which a mistyped option need not wait for
    from bench.measure import Input, Pipeline, Tell
    from bench.remote import Remote
    from runtime import Canny2Image

ROOT = Path(__file__).resolve().parent
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
RESOLUTIONS = {"tiny": 128}
MOST_SAMPLES = 1000  # in one batch: far beyond any GPU's memory
LARGEST = {"strength": 10, "scale": 100}  # far beyond use: larger ones overflow, and black equals black at PD 0
NEGATIVE = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality"
)
ERRORS = Console(stderr=True)
log = logging.getLogger("compute_score")


class BadInput(ValueError):
    """What was asked for cannot be done; the text is one sentence."""


class Interrupted(Exception):
    """The run was stopped, and what was finished is kept; the text is one sentence."""


def parser() -> Parser:
    """Every option, with the competition's parameters as defaults."""
    make = Parser(
        prog="compute_score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = make.add_argument_group("what to draw").add_argument
    add("--images", nargs="+", type=Path, default=[ROOT / "pictures"], help="pictures or folders of them (pictures/)")
    add("--prompt", default="a bird", help="what to draw (%(default)s)")
    add("--added-prompt", default="best quality, extremely detailed", help="goes after the prompt (%(default)s)")
    add("--negative-prompt", default=NEGATIVE, help="what not to draw (%(default)s)")
    add("--samples", type=int, default=1, help="pictures made of each input, scored by their mean (%(default)s)")
    add("--resolution", type=int, help="pixels of the short side (128 for tiny, 256 for others)")
    add("--low-threshold", type=int, default=100, help="of canny, 1 to 255 (%(default)s)")
    add("--high-threshold", type=int, default=200, help="of canny, 1 to 255 (%(default)s)")
    add("--strength", type=float, default=1.0, help="of the edges (%(default)s)")
    add("--scale", type=float, default=9.0, help="of the guidance (%(default)s)")
    add("--seed", type=int, default=2946901, help="of the noise (%(default)s)")
    add("--eta", type=float, default=0.0, help="of DDIM, 0 to 1 (%(default)s)")
    add("--guess-mode", action="store_true", help="let the edges guide without a prompt, as ControlNet's guess mode")
    add("--steps", type=int, default=20, help="DDIM steps (%(default)s)")
    add = make.add_argument_group("how to draw it").add_argument
    add("--model", default="tiny", help="tiny, sd15 or a .yaml file (%(default)s)")
    add("--weights", type=Path, help="the model's weights (its usual place)")
    add("--backend", choices=("auto", "torch", "tensorrt"), default="auto", help="of the candidate (%(default)s)")
    add("--engines", type=Path, help="the folder of TensorRT engines, or one that holds several (engines/)")
    add("--engine-python", type=Path, metavar="PYTHON", help="run TensorRT in this interpreter, PyTorch in this one")
    add("--schedule", default="hackathon-10", help="a name, all names, steps as 19,18,4 or a .yaml file (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where PyTorch runs (%(default)s)")
    add = make.add_argument_group("what to do with the result").add_argument
    add("--output", type=Path, default=Path("score"), help="folder; an earlier run there is replaced (%(default)s)")
    add("--format", choices=("jpg", "png"), default="jpg", help="of the pictures (%(default)s)")
    add("--strict", action="store_true", help="exit with 1 where a PD is over 12 or a picture is missing")
    add("--score-only", type=Path, metavar="DIR", help="score the pictures of this folder, made elsewhere, and no more")
    add("--reference", type=Path, metavar="DIR", help="what --score-only compares with: files of the same names")
    return make


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns the exit status: 0, 1 with --strict where a picture failed or is missing, 2 for bad input, 130 when stopped.
    """
    escape_output()
    handler = RichHandler(console=ERRORS, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        options = parser().parse(argv)
        passed = score_only(options) if options.score_only or options.reference else benchmark(options)
    except KeyboardInterrupt:
        print("compute_score: stopped, and nothing was written.", file=sys.stderr)
        return 130
    except Interrupted as stopped:
        print(f"compute_score: {stopped}", file=sys.stderr)
        return 130
    except (UsageError, BadInput, EngineError, ImageError, OutputError, OSError) as error:
        print(f"compute_score: {sentence(error)}", file=sys.stderr)
        return 2
    return 1 if options.strict and not passed else 0


@contextmanager
def refusing() -> Iterator[None]:
    """Take every ValueError and OSError of the checks before the first picture for a fault of the input."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(sentence(error)) from error


def benchmark(options: argparse.Namespace) -> bool:
    """Time and score the candidate against the reference on every picture; whether none failed."""
    with refusing():
        check_numbers(options)
        if options.resolution is None:
            options.resolution = RESOLUTIONS.get(options.model, 256)
        compared = options.schedule == "all"
        schedules = every_schedule(options.steps) if compared else [Schedule.parse(options.schedule, options.steps)]
        schedules[0].updates(options.eta)
        inputs = check_pictures(options)
        paths = [item.path for item in inputs] + [path for path in (options.weights, options.engines) if path]
        check_output(options.output, paths)
        from bench.measure import measure
        from bench.perceptual import InceptionFeatures

        inception = InceptionFeatures()  # on the CPU, so that a score does not depend on the GPU
        device = choose_device(options)
        reference, candidates, engines = load_pipelines(options, schedules, device, inputs)
    arguments = {
        "prompt": options.prompt,
        "a_prompt": options.added_prompt,
        "n_prompt": options.negative_prompt,
        "num_samples": options.samples,
        "image_resolution": options.resolution,
        "ddim_steps": options.steps,
        "guess_mode": options.guess_mode,
        "strength": options.strength,
        "scale": options.scale,
        "seed": options.seed,
        "eta": options.eta,
        "low_threshold": options.low_threshold,
        "high_threshold": options.high_threshold,
    }
    from torch import OutOfMemoryError

    total = (1 + len(schedules)) * (len(inputs) + len({item.size for item in inputs}))
    told = [{"name": s.name, "taken": len(ddim_timesteps(s.steps)), "evaluated": list(s.evaluated)} for s in schedules]
    facts: dict[str, Any] = {
        "model": options.model,
        "backend": "tensorrt" if engines else "torch",
        "device": device,
        "schedule": told if compared else told[0],
    }
    if engines:
        facts["engines"] = engines.about()
    title = f"canny2image · {Path(options.model).stem} · {'schedules' if compared else schedules[0].name}"
    try:
        with ignoring_signals() as ignore, output_folder(options.output) as folder:
            with progress(total) as tell:
                found, columns, stopped = measure(inputs, reference, candidates, arguments, inception, folder, tell)
            ignore()  # from here on stopping would lose every picture, to win a second or two
            results = next(iter(found.values()))
            facts |= {"interrupted": len(results) < len(inputs), "asked": len(inputs)}
            summaries = write_reports(folder, options, facts, found, columns, title)
    except OutOfMemoryError:
        advice = "take a smaller --resolution or fewer --samples, or --device cpu."
        raise BadInput(f"the GPU has not enough memory: {advice}") from None
    finally:
        if engines:
            engines.close()
    if compared:
        Console().print(
            comparison_table(summaries, {s.name: f"{len(s.evaluated)} of {len(s.rules)}" for s in schedules})
        )
        print(f"All of it is in {options.output}.")
    else:
        show(options, results, summaries["candidate"])
    if facts["interrupted"]:
        made = f"{len(results)} of {len(inputs)} pictures"
        if isinstance(stopped, EngineError):
            raise EngineError(f"{sentence(stopped)} {made} were finished before; they are in {options.output}.")
        raise Interrupted(f"stopped after {made}; they are in {options.output}, and {RESULTS} says so.")
    return not any(summary["failed"] for summary in summaries.values())


def score_only(options: argparse.Namespace) -> bool:
    """Score pictures made elsewhere by equal file names; whether none failed and none is missing."""
    with refusing():
        if not options.score_only or not options.reference:
            raise BadInput("--score-only and --reference need each other: name the two folders to compare.")
        names = [{path.name for path in find_pictures([folder])} for folder in (options.score_only, options.reference)]
        both = sorted(names[0] & names[1])
        if not both:
            raise BadInput(f"{options.score_only} and {options.reference} have no picture of the same file name.")
        check_output(options.output, [options.score_only, options.reference])
        for path in reading([folder / name for folder in (options.score_only, options.reference) for name in both]):
            read_image(path)
        from bench.measure import score_pairs
        from bench.perceptual import InceptionFeatures

        inception = InceptionFeatures()
    missing = {"candidate": sorted(names[1] - names[0]), "reference": sorted(names[0] - names[1])}
    for folder, absent in ((options.score_only, missing["candidate"]), (options.reference, missing["reference"])):
        if absent:
            more = f" and {len(absent) - 10} more (all in {RESULTS})" if len(absent) > 10 else ""
            log.warning("Not scored, because %s has no %s%s.", folder, ", ".join(absent[:10]), more)
    with output_folder(options.output) as folder:
        with progress(len(both)) as tell:
            results, columns = score_pairs(both, options.score_only, options.reference, inception, tell)
        title = f"{options.score_only} against {options.reference}"
        found = {"candidate": results}
        summary = write_reports(folder, options, {"missing": missing}, found, columns, title)["candidate"]
    show(options, results, summary)
    return not summary["failed"] and not any(missing.values())


def check_numbers(options: argparse.Namespace) -> None:
    """Raise BadInput for a number that no pipeline takes."""
    if options.model not in ("tiny", "sd15") and Path(options.model).suffix not in (".yaml", ".yml"):
        raise BadInput(f"--model '{options.model}' is not tiny, sd15 or a .yaml file.")
    if options.model not in ("tiny", "sd15") and not Path(options.model).is_file():
        raise BadInput(f"there is no model description {options.model}.")
    ddim_timesteps(options.steps)  # before the schedule, which would only say that this is not its number of steps
    if not 1 <= options.samples <= MOST_SAMPLES:
        raise BadInput(f"--samples is {options.samples}, but must lie between 1 and {MOST_SAMPLES}.")
    if not 0 <= options.seed < 2**64:
        raise BadInput(f"--seed is {options.seed}, but must lie between 0 and 2^64 - 1.")
    for name, most in LARGEST.items():
        value = getattr(options, name)
        if not 0 <= value <= most:  # nan, too
            raise BadInput(f"--{name} is {value}, but must lie between 0 and {most}.")


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The named files and the pictures in the named folders, in order; BadInput where a folder holds none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
            if not inside:
                raise BadInput(f"the folder {path} holds no picture ({', '.join(ENDINGS)}).")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise BadInput(f"there is no file or folder {path}.")
    return found


def check_pictures(options: argparse.Namespace) -> list[Input]:
    """Read every picture once, so that none fails after minutes of work; BadInput or ImageError for the first unfit."""
    from bench.measure import Input

    inputs: list[Input] = []
    taken: dict[str, Path] = {}
    for path in reading(find_pictures(options.images)):
        image = read_image(path)
        try:
            resized = resize_image(image, options.resolution)
        except ImageError as error:
            raise BadInput(f"{path}: {error}") from error
        height, width = canny_hint(resized, options.low_threshold, options.high_threshold).shape[:2]
        numbers = [f"-{number}" for number in range(1, options.samples + 1)] if options.samples > 1 else [""]
        files = [f"{path.stem}{number}.{options.format}" for number in numbers]
        for file in files:
            other = taken.setdefault(file.lower(), path)  # some file systems ignore case
            if other is not path:
                raise BadInput(f"{other} and {path} would both be written as {file}: rename one of them.")
        inputs.append(Input(path, files, height, width))
    return inputs


def reading(paths: Sequence[Path]) -> Iterable[Path]:
    """The paths one by one, with a progress bar on a terminal."""
    return track(paths, "reading pictures", console=ERRORS, transient=True, disable=not ERRORS.is_terminal)


def choose_device(options: argparse.Namespace) -> str:
    """The device that PyTorch runs on; BadInput where cuda is asked for and absent."""
    import torch

    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda needs an NVIDIA GPU and a CUDA build of PyTorch: use --device cpu.")
    return options.device


def load_pipelines(
    options: argparse.Namespace, schedules: Sequence[Schedule], device: str, inputs: Sequence[Input]
) -> tuple[Pipeline, dict[str, Pipeline], Canny2Image | Remote | None]:
    """Reference and candidates on one set of weights, and what makes the candidates' pictures where TensorRT does."""
    from bench.candidate import Scheduled, tensorrt_candidate
    from cldm.canny2image import Reference, Staged, load_model

    shapes = [(item.height, item.width, options.samples) for item in inputs]
    chosen = options.backend, options.engines, options.model, options.weights
    engines = tensorrt_candidate(*chosen, schedules, shapes, options.engine_python)
    model = load_model(options.model, options.weights, device)
    made = [Scheduled(engines, schedule) if engines else Staged(model, schedule) for schedule in schedules]
    names = [schedule.name for schedule in schedules] if options.schedule == "all" else ["candidate"]
    return Reference(model), dict(zip(names, made, strict=True)), engines


@contextmanager
def progress(total: int) -> Iterator[Tell]:
    """A progress bar on stderr: `tell(what, done)` names what is being made and counts pictures made."""
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def tell(what: str, done: int) -> None:
            bar.update(task, advance=done)
            if what:
                bar.update(task, description=escape(what))

        yield tell


def show(options: argparse.Namespace, results: list[PictureResult], summary: dict[str, Any]) -> None:
    """The table and where the rest is."""
    Console().print(result_table(results, summary))
    print(f"{summary['failed']} of {summary['pictures']} over PD {PD_LIMIT:g}. All of it is in {options.output}.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
