"""`python -m bench.ours ENGINES`: the TensorRT pipeline measured, into a JSON file that `bench/peers.py` reads.

Needs numpy, TensorRT and cuda-python, no PyTorch: it runs in the interpreter that TensorRT is installed in.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine import check_many, cuda_runtime, gpu
from runtime.manifest import EngineError, Manifest
from runtime.pipeline import Canny2Image
from runtime.schedule import every_schedule
from runtime.session import PipelineOptions
from runtime.steps import COND

WARM_UP = 5
SCHEDULES = ("full", "hackathon-10")
USUAL = {
    "prompt": "a bird", "a_prompt": "best quality, extremely detailed", "n_prompt": "lowres, bad anatomy",
    "num_samples": 1, "ddim_steps": 20, "guess_mode": False, "strength": 1.0, "scale": 9.0, "seed": 2946901,
    "eta": 0.0, "low_threshold": 100, "high_threshold": 200,
}  # fmt: skip
COMPETITION = PipelineOptions(skip_text=False)  # its timing counts the text of every picture
ABLATIONS = {
    "as it is, again": COMPETITION,
    "text kept from the picture before": replace(COMPETITION, skip_text=True),
    "each step a graph": replace(COMPETITION, graph="step"),
    "no graph": replace(COMPETITION, graph="none"),
    "one stream": replace(COMPETITION, two_streams=False),
    "hint and time rows in every step": replace(COMPETITION, hoist=False),
    "edges before the text": replace(COMPETITION, overlap=False),
    "activation memory apart": replace(COMPETITION, share_memory=False),
}


def arguments(height: int, width: int) -> dict[str, Any]:
    """The arguments of `process` that every pipeline is measured with: a random picture with edges, seeded."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    picture = np.repeat(np.repeat(coarse, 16, 0), 16, 1)
    return {"input_image": picture, "image_resolution": min(height, width), **USUAL}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    ten, middle, ninety = np.percentile(values, (10, 50, 90))
    return {"median": float(middle), "p10": float(ten), "p90": float(ninety), "count": len(values)}


def timed(call: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each call, after a few that do not count."""
    times = []
    for i in range(WARM_UP + runs):
        begin = time.perf_counter()
        call()
        if i >= WARM_UP:
            times.append(1000 * (time.perf_counter() - begin))
    return times


def used() -> int:
    """Bytes of GPU memory that are taken, by anyone."""
    free, total = check_many(cuda_runtime().cudaMemGetInfo())
    return int(total - free)


def resident() -> int:
    """Bytes of host memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(folder: Path, given: dict[str, Any], runs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One folder: pictures by each schedule with all of their host work, stages, memory and the switches."""
    found: dict[str, Any] = {"pictures": {}, "host_ms": {}, "latents": {}, "made": {}}
    before = used()
    others = [s for s in every_schedule(given["ddim_steps"]) if s.name not in SCHEDULES]
    whole = set(COND) <= Manifest.load(folder).stages.keys()
    for schedule in (*SCHEDULES, *(s.name for s in others if whole or all(u.evaluation.both for u in s.updates()))):
        say(f"{folder.name}, {schedule}")
        with Canny2Image(folder, schedule, COMPETITION) as pipeline:
            host: list[dict[str, float]] = []

            def picture(pipeline: Canny2Image = pipeline, host: list[dict[str, float]] = host) -> list[np.ndarray]:
                made = pipeline.process(**given)
                host.append(pipeline.host_ms)
                return made

            found["pictures"][schedule] = spread(timed(picture, runs))
            found["host_ms"][schedule] = {
                lap: float(np.median([laps[lap] for laps in host[WARM_UP:]])) for lap in host[0]
            }
            found["made"][schedule], found["latents"][schedule] = picture()[0], pipeline.latent()
            found["peak_bytes"] = max(found.get("peak_bytes", 0), used() - before)
            found["memory"] = pipeline.memory
            found["stages"] = pipeline.profile(runs)
    found["step"] = found["stages"]["step"]
    found["left_bytes"] = used() - before
    return found


def endurance(folder: Path, given: dict[str, Any], repeats: int, pictures: int) -> dict[str, Any]:
    """Whether a picture comes out the same every time, and what memory grows by over many that differ."""
    with Canny2Image(folder) as pipeline:
        first = pipeline.process(**given)[0]
        same = sum(np.array_equal(pipeline.process(**given)[0], first) for _ in range(repeats))
        device, host = used(), resident()
        for i in range(pictures):
            change = {"prompt": f"a bird, {i}", "seed": i, "scale": 5 + i % 7, "eta": (i % 5 == 4) * 0.5}
            pipeline.process(**given | change)
        grown = {"device_growth_bytes": used() - device, "host_growth_bytes": resident() - host}
        return {"repeats": repeats, "identical": same, "pictures": pictures, **grown, "captures": pipeline.captures}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 2 where it cannot be done."""
    parser = argparse.ArgumentParser(prog="bench.ours", description=__doc__)
    parser.add_argument("engines", type=Path, help="an engine folder")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="NAME=DIR", help="folders built with an option off, for the ablation"
    )
    parser.add_argument("--runs", type=int, default=50, help="pictures a median is of (%(default)s)")
    parser.add_argument("--repeats", type=int, default=100, help="pictures that must be the same (%(default)s)")
    parser.add_argument("--endurance", type=int, default=1000, help="pictures to watch memory over (%(default)s)")
    parser.add_argument("--no-ablation", action="store_true", help="leave the switches as they are")
    parser.add_argument("--output", type=Path, default=Path("ours.json"), help="(%(default)s), and an .npz beside it")
    options = parser.parse_args(argv)

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    try:
        manifest = Manifest.load(options.engines)
        given = arguments(manifest.shape["height"], manifest.shape["width"])
        given["num_samples"] = manifest.shape["samples"]
        here = gpu()
        found = measure(options.engines, given, options.runs, say)
        arrays = {f"latent/{name}": latent for name, latent in found["latents"].items()}
        arrays |= {f"picture/{name}": picture for name, picture in found["made"].items()}
        del found["latents"], found["made"]
        ablation: dict[str, Any] = {}
        if not options.no_ablation:
            for name, switched in ABLATIONS.items():
                say(name)
                with Canny2Image(options.engines, "full", switched) as pipeline:
                    times = timed(partial(pipeline.process, **given), options.runs)
                    ablation[name] = {**spread(times), "options": asdict(switched)}
        for also in options.also:
            name, _, folder = also.partition("=")
            say(name)
            with Canny2Image(Path(folder), "full", COMPETITION) as pipeline:
                ablation[name] = spread(timed(partial(pipeline.process, **given), options.runs))
                ablation[name]["step"] = pipeline.profile(options.runs)["step"]
        say("endurance")
        lasting = endurance(options.engines, given, options.repeats, options.endurance)
    except (EngineError, ValueError) as error:
        print(f"bench.ours: {error}", file=sys.stderr)
        return 2
    about = {
        "gpu": here.name if here else None, "flavour": manifest.flavour, "version": manifest.version,
        "model": manifest.model, "weights": manifest.weights, "weights_sha256": manifest.weights_sha256,
        "shape": manifest.shape, "options": manifest.options,
    }  # fmt: skip
    content = {**about, **found, "ablation": ablation, "endurance": lasting}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    np.savez(options.output.with_suffix(".npz"), **arrays)
    for name, value in {"ms a step": found["step"], **found["pictures"], **ablation}.items():
        print(f"{name:40} {value['median'] if isinstance(value, dict) else value:8.2f} ms")
    print(f"{lasting['identical']} of {lasting['repeats']} pictures identical; all of it is in {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
