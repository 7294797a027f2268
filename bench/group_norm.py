"""`python -m bench.group_norm`: our GroupNorm against TensorRT's, at every shape that the networks normalise.

Needs the compiled plugins (`python -m plugins build`), TensorRT and cuda-python, no PyTorch. Each way is timed as a
CUDA graph of several GroupNorms in a row, so that launches cost what they cost inside a picture, and each reads what
the one before has just written, as after a convolution. Columns, in µs for one GroupNorm: `kernel` calls the kernels
without TensorRT, `overlap` lets each start while the one before it ends; `own`, `builtin`, `native` are engines of the
option --group-norm (a time row is added by a layer of its own where the plugin does not take it); `bar` is what the
bytes take at this GPU's copy bandwidth, and 2 µs for the launch.

  python -m bench.group_norm --check            each shape once against float64; for compute-sanitizer, too
  python -m bench.group_norm --sweep            the kernels in every way that a shape can be cut
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from plugins.call import GroupNorm, error, group_norm_on_gpu, open_library, plan
from plugins.load import LIB, Library, find, library_path
from runtime.engine import Engine, Gpu, check, cuda_runtime, gpu
from runtime.manifest import EngineError
from trt_builder.config import Block, Layer, ModelConfig, Options, Shape, UNetConfig, VAEConfig
from trt_builder.flavour import Flavour, get_flavour
from trt_builder.layers import group_norm
from trt_builder.net import Net
from trt_builder.weights import Weights

WAYS = ("kernel", "overlap", "own", "builtin", "native")
LAUNCHES = 20  # GroupNorms in a row
LAUNCH_US = 2.0
COPIED = 1 << 29  # bytes
TOLERANCE = 2e-3
Times = dict[str, float | None]
Size = tuple[int, int, int]  # batch, h, w


# -- which there are --------------------------------------------------------------------------------------------------


def norms(config: ModelConfig, shape: Shape) -> dict[str, Counter[GroupNorm]]:
    """How often each GroupNorm occurs in each stage that has any."""
    return {
        "control": Counter(unet_norms(config.control, config.control.encoder_blocks, shape)),
        "unet_encoder": Counter(unet_norms(config.unet, config.unet.encoder_blocks, shape)),
        "unet_decoder": Counter(unet_norms(config.unet, config.unet.output_blocks, shape)),
        "vae_decoder": Counter(vae_norms(config.vae, shape)),
    }


def placed(config: UNetConfig, blocks: Sequence[Block], shape: Shape) -> Iterator[tuple[Layer, Size, Size]]:
    """Each layer of the encoder's or the output blocks with the size of the map that it gets, and of the one that it
    makes, in order.
    """

    def size(batch: int, scale: int) -> Size:
        return batch, -(-shape.h // scale), -(-shape.w // scale)

    batch = shape.batch if blocks == config.output_blocks else shape.samples
    for layer, scale, after in config.walk(blocks):
        given = size(batch, scale)
        if layer.kind == "transformer":
            batch = shape.batch  # cond and uncond part here
        yield layer, given, size(batch, after)


def unet_norms(config: UNetConfig, blocks: Sequence[Block], shape: Shape) -> Iterator[GroupNorm]:
    """Those of the encoder's or the output blocks, in order."""
    for layer, (batch, h, w), _ in placed(config, blocks, shape):
        if layer.kind == "res":
            yield GroupNorm(batch, layer.channels, h, w)
            yield GroupNorm(batch, layer.out_channels, h, w, row_batch=1)
        elif layer.kind == "transformer":
            yield GroupNorm(batch, layer.channels, h, w, epsilon=1e-6, silu=False)
    if blocks == config.output_blocks:
        yield GroupNorm(shape.batch, blocks[-1][-1].out_channels, shape.h, shape.w)


def vae_norms(config: VAEConfig, shape: Shape) -> Iterator[GroupNorm]:
    """Those of the autoencoder's decoder, in order."""
    channels, scale = config.ch * config.ch_mult[-1], 1

    def norm(channels: int, silu: bool = True) -> GroupNorm:
        return GroupNorm(shape.samples, channels, shape.h * scale, shape.w * scale, epsilon=1e-6, silu=silu)

    yield from (norm(channels), norm(channels), norm(channels, silu=False), norm(channels), norm(channels))
    for i, mult in reversed(list(enumerate(config.ch_mult))):
        for _ in range(config.num_res_blocks + 1):
            yield norm(channels)
            channels = config.ch * mult
            yield norm(channels)
        scale *= 2 if i else 1
    yield norm(channels)


# -- what they take ---------------------------------------------------------------------------------------------------


def graph_us(enqueue: Callable[[Any], None], replays: int) -> float:
    """The median microseconds of what `enqueue` puts on a stream, as a CUDA graph."""
    cuda = cuda_runtime()
    stream = check(cuda.cudaStreamCreate())
    enqueue(stream)  # loads the kernels, which a capture forbids
    check(cuda.cudaStreamSynchronize(stream))
    check(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
    enqueue(stream)
    graph = check(cuda.cudaStreamEndCapture(stream))
    captured = check(cuda.cudaGraphInstantiate(graph, 0))
    begin, end = check(cuda.cudaEventCreate()), check(cuda.cudaEventCreate())
    times = []
    for _ in range(5 + replays):
        check(cuda.cudaEventRecord(begin, stream))
        check(cuda.cudaGraphLaunch(captured, stream))
        check(cuda.cudaEventRecord(end, stream))
        check(cuda.cudaEventSynchronize(end))
        times.append(1000.0 * float(check(cuda.cudaEventElapsedTime(begin, end))))
    check(cuda.cudaGraphExecDestroy(captured))
    check(cuda.cudaGraphDestroy(graph))
    for event in (begin, end):
        check(cuda.cudaEventDestroy(event))
    check(cuda.cudaStreamDestroy(stream))
    return float(np.median(times[5:]))


def kernel_us(
    library: Any, norm: GroupNorm, replays: int, force: int = 0, overlap: bool = False, depth: int = LAUNCHES
) -> float:
    """Microseconds of one of `depth` GroupNorms in a row, their kernels called without TensorRT."""
    with group_norm_on_gpu(library, norm, norm.arrays(), force, overlap) as on_gpu:

        def several(stream: Any) -> None:
            for _ in range(depth):
                on_gpu.launch(stream)

        return graph_us(several, replays) / depth


def chain(flavour: Flavour, norm: GroupNorm, way: str, depth: int, arrays: dict[str, np.ndarray]) -> Any:
    """The plan of `depth` GroupNorms one after the other: inputs x and, where there is one, row; output y.

    Raises FlavourError where this way is not to be had, EngineError where TensorRT does not build it.
    """
    options = Options(precision="fp16" if norm.half else "fp32", group_norm=way)  # type: ignore[arg-type]
    flavour.load_plugins(options)
    weights = Weights.from_dict({"norm.weight": arrays["gamma"], "norm.bias": arrays["beta"]})
    formats = flavour.channels_last(options.precision) if norm.channels_last else flavour.linear()

    def define(net: Net, x: Any) -> Any:
        row = None
        if norm.row_batch:
            row = net.network.add_input("row", net.type(norm.dtype), (norm.row_batch, norm.channels))
            row.allowed_formats = flavour.linear()
        for _ in range(depth):
            x = group_norm(net.at("norm"), x, norm.epsilon, norm.silu, norm.groups, row)
        return x

    return plan_of(flavour, options, weights, norm.dtype, norm.shape, formats, define, f"{way} {norm}")


def plan_of(
    flavour: Flavour, options: Options, weights: Weights, dtype: Any, shape: tuple[int, ...], formats: Any,
    define: Callable[[Net, Any], Any], what: str,
) -> Any:  # fmt: skip
    """The plan of a network with input x of this shape, and as output y what `define(net, x)` makes, in these formats.

    Raises EngineError where TensorRT does not build it.
    """
    builder = flavour.create_builder(flavour.trt.Logger(flavour.trt.Logger.ERROR))
    network = flavour.create_network(builder)
    net = Net(network, flavour, weights, options, "bench", "", dtype)
    x = network.add_input("x", net.type(dtype), shape)
    y = define(net, x)
    y.name = "y"
    network.mark_output(y)
    flavour.set_output_type(y, net.type(dtype))
    x.allowed_formats = y.allowed_formats = formats
    made = flavour.serialize(builder, network, flavour.create_config(builder, options))
    if made is None:
        raise EngineError(f"TensorRT did not build {what}; its message is above.")
    return memoryview(made)


def plan_us(flavour: Flavour, plan: Any, arrays: dict[str, np.ndarray], replays: int) -> float:
    """Microseconds of a plan in a CUDA graph, of those of the arrays that are its inputs."""
    with Engine(bytes(plan), flavour) as engine:
        engine.upload({name: arrays[name] for name in engine.inputs})
        return 1000.0 * float(np.median(engine.graph_times(replays)))


def engine_us(flavour: Flavour, norm: GroupNorm, way: str, replays: int, depth: int = LAUNCHES) -> float | None:
    """Microseconds of one of `depth` GroupNorms of an engine; None where this way is not to be had."""
    arrays = norm.arrays()
    try:
        made = chain(flavour, norm, way, depth, arrays)
    except ValueError as why:
        print(f"{way} {norm}: {why}", file=sys.stderr)
        return None
    return plan_us(flavour, made, arrays, replays) / depth


def copy_bandwidth(replays: int = 20) -> float:
    """Bytes a microsecond, read and written, of a copy on this GPU."""
    cuda = cuda_runtime()
    a, b = (int(check(cuda.cudaMalloc(COPIED))) for _ in range(2))
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    took = graph_us(lambda stream: check(cuda.cudaMemcpyAsync(b, a, COPIED, kind, stream)), replays)
    for address in (a, b):
        check(cuda.cudaFree(address))
    return 2 * COPIED / took


# -- the command ------------------------------------------------------------------------------------------------------


def add_shape(make: argparse.ArgumentParser) -> None:
    """The options that say of which model and pictures the shapes are."""
    make.add_argument("--model", default="sd15", help="(%(default)s)")
    for name, usual in (("height", 256), ("width", 384), ("samples", 1)):
        make.add_argument(f"--{name}", type=int, default=usual, help="(%(default)s)")


def measured_on() -> Gpu:
    """The GPU that kernels are measured on; raises EngineError where there is none."""
    here = gpu()
    if here is None:
        raise EngineError("kernels are measured on an NVIDIA GPU, and cuda-python sees none here.")
    return here


def parser() -> argparse.ArgumentParser:
    """Every option."""
    make = argparse.ArgumentParser(
        prog="bench.group_norm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = make.add_argument
    add_shape(make)
    add("--ways", default=",".join(WAYS), help="(%(default)s)")
    add("--replays", type=int, default=50, help="(%(default)s)")
    add("--depth", type=int, default=LAUNCHES, help="so many in a row: a graph takes 5 µs to begin (%(default)s)")
    add("--check", action="store_true", help="no times: each shape once, against float64")
    add("--sweep", action="store_true", help="the kernels in every way that a shape can be cut")
    add("--flavour", choices=("tensorrt",), default="tensorrt", help="whose plugins (%(default)s)")
    add("--library", type=Path, help="a compiled library, for --check and --sweep without TensorRT")
    add("--output", type=Path, default=Path("group_norm.json"), help="what was measured (%(default)s)")
    return make


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or check. Returns 0, 1 where --check finds an error over 2e-3, 2 for what cannot be done."""
    options = parser().parse_args(argv)
    try:
        here = measured_on()
        if options.depth < 1 or options.replays < 1:
            raise ValueError("--depth and --replays must be at least 1.")
        wanted = norms(ModelConfig.load(options.model), Shape(options.height, options.width, options.samples))
        counts = sum(wanted.values(), Counter())
        if options.check or options.sweep:
            path = options.library or library_path(int(get_flavour(options.flavour).trt.__version__.partition(".")[0]))
            library = open_library(path)
            return checked(library, counts) if options.check else sweep(library, counts, options.replays)
        flavour = get_flavour(options.flavour)
        compiled = find(flavour.trt.__version__, LIB)
        measured = measure(flavour, compiled, counts, options.ways.split(","), options.replays, options.depth)
    except (ValueError, OSError) as why:
        print(f"bench.group_norm: {why}", file=sys.stderr)
        return 2
    measured |= {"gpu": here.name, "flavour": flavour.label, "plugins": compiled.source, "cuda": compiled.cuda}
    measured["stages"] = {stage: sum(found.values()) for stage, found in wanted.items()}
    options.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    Console(width=160).print(table(measured))
    return 0


def measure(
    flavour: Flavour, compiled: Library, counts: Counter[GroupNorm], ways: Sequence[str], replays: int, depth: int
) -> dict[str, Any]:
    """The times of every shape in every way, their sums weighted by how often a shape occurs, and the bandwidth."""
    library, bandwidth, rows = open_library(compiled.path), copy_bandwidth(), []
    for norm, count in sorted(counts.items(), key=lambda one: (one[0].epsilon, one[0].batch, -one[0].moved)):
        times: Times = {}
        for way in ways:
            if way in ("kernel", "overlap"):
                times[way] = kernel_us(library, norm, replays, overlap=way == "overlap", depth=depth)
            else:
                times[way] = engine_us(flavour, norm, way, replays, depth)
        cut = plan(library, norm.call(library.canny_max_cluster()))
        row: dict[str, Any] = {"shape": list(norm.shape), "row": norm.row_batch, "silu": norm.silu, "count": count}
        row |= {"path": cut.path, "blocks": int(np.prod(cut.grid)), "bytes": norm.moved}
        rows.append(row | {"bar": LAUNCH_US + norm.moved / bandwidth} | times)
        print(f"{norm.shape}: {times}", file=sys.stderr)
    # A sum is of those shapes that every way has, so that ways compare.
    whole = [row for row in rows if all(row[way] is not None for way in ways)]
    sums = {way: sum(row["count"] * row[way] for row in whole) for way in (*ways, "bar")}
    return {"bandwidth": bandwidth, "ways": list(ways), "rows": rows, "sums": sums, "summed": len(whole)}


def table(measured: dict[str, Any]) -> Table:
    """What was measured, for people."""
    ways = measured["ways"]
    view = Table(title=f"GroupNorm, µs each: {measured['gpu']}, {measured['flavour']}, CUDA {measured['cuda']}")
    for name in ("B, C, h, w", "row", "SiLU", "times", "path", "blocks", *ways, "bar", "share of bandwidth"):
        view.add_column(name, justify="left" if name in ("B, C, h, w", "path") else "right")
    for row in measured["rows"]:
        first = next((row[way] for way in ways if row[way] is not None), None)
        share = f"{row['bytes'] / first / measured['bandwidth']:.0%}" if first else "-"
        cells = ["-" if row[way] is None else f"{row[way]:.2f}" for way in (*ways, "bar")]
        marks = ["yes" if row["row"] else "", "yes" if row["silu"] else ""]
        view.add_row(
            ", ".join(map(str, row["shape"])), *marks, str(row["count"]), row["path"], str(row["blocks"]), *cells, share
        )
    sums = [f"{measured['sums'][way]:.0f}" for way in (*ways, "bar")]
    view.add_row(f"sum of {measured['summed']} shapes", "", "", "", "", "", *sums, "", style="bold")
    return view


def checked(library: Any, counts: Counter[GroupNorm]) -> int:
    """Every shape at mean 0 and 100 against float64; returns 1 where an error is over the tolerance."""
    worst = 0.0
    for norm in counts:
        for mean in (0.0, 100.0):
            arrays = norm.arrays(mean)
            with group_norm_on_gpu(library, norm, arrays) as on_gpu:
                on_gpu.launch()
                off = error(on_gpu.result(), norm.expected(arrays))
            worst = max(worst, off)
            print(f"{norm.shape} mean {mean:.0f}: {off:.1e}{'' if off < TOLERANCE else ' over'}")
    print(f"worst of {len(counts)} shapes: {worst:.1e}, may be {TOLERANCE:.0e}")
    return int(not worst < TOLERANCE)


def sweep(library: Any, counts: Counter[GroupNorm], replays: int) -> int:
    """Print what each shape takes in each way that it can be cut, the chosen one marked."""
    for norm in sorted(counts, key=lambda one: one.moved):
        chosen, cells = plan(library, norm.call(library.canny_max_cluster())), []
        for force in (1, 2, 3, 4, 5, 8, -1):
            cut = plan(library, norm.call(library.canny_max_cluster(), force))
            if cut.path != "none":
                mark = "*" if cut == chosen else ""
                name = "two launches" if force < 0 else f"clusters of {force}"
                cells.append(f"{name}{mark} {kernel_us(library, norm, replays, force):.2f}")
        print(f"{norm.shape} row {norm.row_batch}: {', '.join(cells)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
