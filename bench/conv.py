"""`python -m bench.conv`: our convolutions of small maps, at every shape that a step has of them.

Needs the compiled plugins (`python -m plugins build`) and cuda-python on a GPU of compute capability 9.0; TensorRT only
to find the library, which --library names as well. Timed as a CUDA graph of calls with as many copies of the weights as
make them come from memory, as in a step, each waiting for the one before it.

  python -m bench.conv --check      each shape once against float64, in every cut; for compute-sanitizer, too
  python -m bench.conv --sweep      every likely cut of each shape: blocks of a cluster, rows and filters of a tile
  python -m bench.conv --builtin    and TensorRT's own: an engine of several, without the residual (a build of each)
  python -m bench.conv --layer-norm apart --qkv apart     those of engines that were built so
  python -m bench.conv --plan       no GPU: how each shape is cut, and what it is predicted to take
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.attention import usual_library
from bench.group_norm import Size, add_shape, graph_us, measured_on, placed, plan_of, plan_us
from plugins.call import OnGpu, error, open_library
from plugins.conv_calls import Conv, conv_on_gpu
from plugins.cross_calls import Cross, scores, values
from plugins.load import CONV_ROWS, has_conv_kernel
from runtime.engine import check, cuda_runtime
from trt_builder.config import Block, Layer, ModelConfig, Options, Shape, UNetConfig
from trt_builder.flavour import Flavour, get_flavour
from trt_builder.layers import conv
from trt_builder.net import Net
from trt_builder.plugin_layers import conv_wins, cross_fits
from trt_builder.weights import Weights

CACHED = 200 << 20  # bytes of weights that a cache cannot hold: four times an H200's 50 MB
LAUNCHES, DEPTH = 20, 8  # convolutions in a row, at least: in a graph, in an engine
TOLERANCE = 2e-3
LIKELY = 4.0  # times the best prediction: a cut that may be the best after all


# -- which there are --------------------------------------------------------------------------------------------------


def convolutions(config: ModelConfig, shape: Shape, options: Options = Options()) -> Counter[Conv]:  # noqa: B008
    """How often each convolution of blocks and each 1×1 one of ControlNet's outputs occurs in a step, by qkv,
    layer_norm and cross_attention of the options; by residual, whether the first output is of the whole batch; by conv,
    whether two that are added, or a product and its gate, are one launch of ours.
    """
    unet, control, words = config.unet, config.control, config.clip.max_length
    found = Counter(of_blocks(control, control.encoder_blocks, shape, options, words, outputs=True))
    found.update(of_blocks(unet, unet.encoder_blocks, shape, options, words))
    found.update(of_blocks(unet, unet.output_blocks, shape, options, words))
    return found


def of_blocks(
    config: UNetConfig,
    blocks: Sequence[Block],
    shape: Shape,
    options: Options,
    words: int,
    outputs: bool = False,
) -> Iterator[Conv]:
    """Those of the encoder's or the output blocks, in order, as trt_builder/unet.py has them, texts being so many
    words; with the one of each of ControlNet's `outputs`.
    """
    ends = {block[-1].prefix for block in blocks}
    for layer, given, made in placed(config, blocks, shape):
        yield from of_layer(config, layer, given, made, shape.batch, options, words)
        if outputs and layer.prefix in ends:
            yield output_of(layer, made, shape.batch, options)


def of_layer(
    config: UNetConfig, layer: Layer, given: Size, made: Size, batch: int, options: Options, words: int
) -> Iterator[Conv]:
    """Those of a layer that gets a map of one size and makes one of the other; cond and uncond are `batch`."""
    (rows, h, w), c, d = given, layer.channels, layer.out_channels
    if layer.kind == "res":
        yield Conv(rows, c, h, w, d)
        last = Conv(rows, d, h, w, d, residual_batch=rows)
        yield from [last] if c == d else of_both(last, Conv(rows, c, h, w, d, 1), 0, options)
    elif layer.kind == "transformer":
        yield from of_transformer(Conv(rows, c, h, w, c, 1), options, batch, config, words)
    elif layer.kind == "down":
        yield Conv(rows, c, h, w, d, stride=2)
    else:
        doubled = Conv(rows, c, h, w, d, up=True)
        yield doubled if is_ours(doubled, options) else Conv(rows, c, *made[1:], d)


def output_of(layer: Layer, made: Size, batch: int, options: Options) -> Conv:
    """ControlNet's 1×1 one behind a block, whose last layer makes a map of this size, or one that is repeated to all of
    the batch.
    """
    (rows, h, w), d = made, layer.out_channels
    repeated = layer.kind == "conv" and options.residual == "own"  # by the plugin that makes it
    return Conv(batch if repeated else rows, d, h, w, d, 1)


def of_transformer(plain: Conv, options: Options, batch: int, config: UNetConfig, words: int) -> Iterator[Conv]:
    """Those of a SpatialTransformer, of which the first is given: cond and uncond part in it."""
    c, before, heads, depth = plain.channels, plain.batch, config.num_heads, config.transformer_depth
    folds = cross_fits((batch, c, plain.height, plain.width), heads, words, options)

    def normed(one: Conv) -> Conv:
        return replace(one, norm=options.layer_norm == "folded" and is_ours(one, options))

    yield plain
    for i in range(depth):
        yield from [normed(plain)] * 3 if options.qkv == "apart" else [normed(replace(plain, filters=3 * c))]
        yield replace(plain, residual_batch=plain.batch)
        was, apart, plain = plain.batch, plain, replace(plain, batch=batch)
        if folds:
            yield from (half(batch, c, plain.height, plain.width, heads, was, words) for half in (scores, values))
        else:
            yield from (normed(apart), replace(plain, residual_batch=was))
        wide = normed(replace(plain, filters=8 * c))
        yield replace(wide, gate=is_ours(wide, options))
        back = replace(plain, channels=4 * c, residual_batch=batch)
        out = replace(plain, residual_batch=before)
        yield from [back] if i < depth - 1 else of_both(back, out, before, options)


def of_both(first: Conv, other: Conv, residual_batch: int, options: Options) -> Iterator[Conv]:
    """Two whose products are added: the first with the map of the other as its second and this residual, where our
    plugin does it, else each.
    """
    if is_ours(first, options) and is_ours(other, options):
        yield replace(first, second=other.channels, residual_batch=residual_batch)
    else:
        yield from (first, other)


def is_ours(one: Conv, options: Options) -> bool:
    """Whether a convolution is our plugin's where that can be had."""
    shape, weight = (one.batch, one.channels, one.height, one.width), (one.filters, one.channels, one.size, one.size)
    ours = has_conv_kernel(shape, weight, one.stride, one.up) and conv_wins(one.rows, weight, one.up)
    return options.conv == "own" and ours


def served(counts: Counter[Conv], library: Any, rows: int) -> Counter[Conv]:
    """Those to at most so many positions that there is a kernel for."""
    return Counter({one: n for one, n in counts.items() if one.rows <= rows and one.plan(library)})


def cuts(one: Conv, library: Any) -> Iterator[Conv]:
    """Every cut of a convolution that there is."""
    for high, wide, cluster in product((64, 128, 192), (64, 80, 128, 160, 192, 256), range(1, 9)):
        forced = replace(one, high=high, wide=wide, cluster=cluster)
        if forced.plan(library):
            yield forced


def likely(one: Conv, library: Any) -> Iterator[Conv]:
    """The cuts that are predicted to take no more than LIKELY times the best."""
    planned = [(plan.predicted_us, cut) for cut in cuts(one, library) if (plan := cut.plan(library))]
    most = LIKELY * min((us for us, _ in planned), default=0.0)
    return (cut for us, cut in planned if us <= most)


def name_of(cut: Conv) -> str:
    """Rows and filters of a tile, and the blocks that share it."""
    return f"{cut.high}·{cut.wide}x{cut.cluster}"


# -- what they take ---------------------------------------------------------------------------------------------------


def rotated(library: Any, one: Conv, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """A call on the GPU with more copies of the weights, one after the other, than a cache can hold."""
    check(cuda_runtime().cudaFree(0))
    memory = one.memory(arrays)
    memory["weight"] = np.concatenate([memory["weight"]] * copies_of(one))
    return OnGpu(library.canny_conv, one.call(), memory, lambda y: y)


def copies_of(one: Conv) -> int:
    """How many copies of the weights no cache can hold."""
    return max(1, -(-CACHED // one.weights))


def kernel_us(on_gpu: OnGpu, one: Conv, replays: int) -> float:
    """Microseconds of one call in this cut, its weights read from memory; `on_gpu` as `rotated` makes it."""
    call: Any = on_gpu.call
    copies, first = copies_of(one), call.weight
    launches = max(LAUNCHES, copies)
    call.cluster, call.high, call.wide = one.cluster, one.high, one.wide

    def several(stream: Any) -> None:
        for i in range(launches):
            call.weight = first + i % copies * one.weights
            on_gpu.launch(stream)

    took = graph_us(several, replays) / launches
    call.weight = first
    return took


def engine_us(flavour: Flavour, one: Conv, arrays: dict[str, np.ndarray], replays: int) -> float | None:
    """Microseconds of TensorRT's own, without residual and LayerNorm; None where it cannot be put in a row."""
    if one.channels != one.filters or one.stride != 1 or one.second or one.up or isinstance(one, Cross):
        return None
    depth = max(DEPTH, min(40, -(-CACHED // one.weights)))
    options, shape = Options(), (one.batch, one.channels, one.height, one.width)
    halves = {"weight": arrays["weight"], "bias": arrays["bias"].astype(np.float16)}
    weights = Weights.from_dict({f"{i}.{name}": array.copy() for i in range(depth) for name, array in halves.items()})

    def define(net: Net, x: Any) -> Any:
        for i in range(depth):
            x = conv(net.at(str(i)), x)
        return x

    formats = flavour.channels_last(options.precision)
    made = plan_of(flavour, options, weights, np.float16, shape, formats, define, str(one))
    return plan_us(flavour, made, {"x": arrays["x"].transpose(0, 3, 1, 2)}, replays) / depth


def measured(
    library: Any, flavour: Flavour | None, counts: Counter[Conv], replays: int, sweep: bool
) -> Iterator[dict[str, Any]]:
    """A row for each shape, the longest first: its own cut, every cut with `sweep`, TensorRT's."""
    for one, count in sorted(counts.items(), key=lambda item: -item[1] * item[0].weights):
        arrays, row = one.arrays(), facts(library, one, count)
        with rotated(library, one, arrays) as on_gpu:
            row["kernel"] = kernel_us(on_gpu, one, replays)
            tried = likely(one, library) if sweep else ()
            row["cuts"] = {name_of(cut): kernel_us(on_gpu, cut, replays) for cut in tried}
        row["builtin"] = engine_us(flavour, one, arrays, replays) if flavour else None
        print(f"{one}: {row['kernel']:.1f}", file=sys.stderr, flush=True)
        yield row


def facts(library: Any, one: Conv, count: int) -> dict[str, Any]:
    """What is known of a convolution before it is timed."""
    plan = one.plan(library)
    assert plan is not None
    chosen = conv_wins(one.rows, (one.filters, one.channels, one.size, one.size), one.up)
    return vars(one) | {"rows": one.rows, "count": count, "plan": vars(plan), "chosen": chosen}


def checked(library: Any, counts: Counter[Conv]) -> int:
    """Every shape in every cut against float64; returns 1 where an error is over the tolerance."""
    worst = 0.0
    for one in counts:
        arrays = one.arrays()
        expected, off = one.expected(arrays), {}
        with conv_on_gpu(library, one, arrays) as on_gpu:
            for cut in cuts(one, library):
                y, again = (result_of(on_gpu, cut) for _ in range(2))
                one_off = error(y, expected) if y.tobytes() == again.tobytes() else np.inf
                off[name_of(cut)] = one_off if one_off < np.inf else np.inf  # nan is no number either
        most = max(off, key=lambda name: off[name])
        worst = max(worst, off[most])
        print(f"{one}: {off[most]:.1e} in the cut {most}{'' if off[most] < TOLERANCE else ' over'}", flush=True)
    print(
        f"worst of {len(counts)} shapes: {worst:.1e}, may be {TOLERANCE:.0e} (inf: nan, or other bits the second time)"
    )
    return int(not worst < TOLERANCE)


def result_of(on_gpu: OnGpu, cut: Conv) -> np.ndarray:
    """The result in this cut, over numbers that are none."""
    call: Any = on_gpu.call
    call.cluster, call.high, call.wide = cut.cluster, cut.high, cut.wide
    check(cuda_runtime().cudaMemset(call.y, 255, 2 * int(np.prod(cut.out))))
    on_gpu.launch()
    return on_gpu.result()


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, check or plan. Returns 0, 1 where --check finds an error over 2e-3, 2 for what cannot be done."""
    make = argparse.ArgumentParser(
        prog="bench.conv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = make.add_argument
    add_shape(make)
    add("--rows", type=int, default=CONV_ROWS, help="positions of the largest map, batch times h times w (%(default)s)")
    add("--qkv", choices=("joined", "apart"), default="joined", help="(%(default)s)")
    add("--layer-norm", choices=("apart", "folded"), default="folded", help="folded: in convolutions (%(default)s)")
    add("--cross-attention", choices=("apart", "folded"), help="folded: two of a text multiplied out (as --layer-norm)")
    add("--replays", type=int, default=30, help="(%(default)s)")
    for name, what in (
        ("check", "no times: against float64"),
        ("sweep", "every likely cut"),
        ("builtin", "TensorRT's own, too"),
        ("plan", "predictions only"),
    ):
        add(f"--{name}", action="store_true", help=what)
    add("--library", type=Path, help="a compiled library (that of the TensorRT in this interpreter)")
    add("--output", type=Path, default=Path("conv.json"), help="what was measured (%(default)s)")
    options = make.parse_args(argv)
    try:
        here = None if options.plan else measured_on()
        shape = Shape(options.height, options.width, options.samples)
        library = open_library(options.library or usual_library())
        switches = Options(
            attention="own", qkv=options.qkv, residual="own", conv="own", layer_norm=options.layer_norm,
            cross_attention=options.cross_attention or options.layer_norm,
        )  # fmt: skip
        counts = served(convolutions(ModelConfig.load(options.model), shape, switches), library, options.rows)
        if options.check:
            return checked(library, counts)
        if options.plan:
            rows = [facts(library, one, n) | {"kernel": None, "builtin": None} for one, n in counts.items()]
        else:
            flavour = get_flavour("tensorrt") if options.builtin else None
            rows = list(measured(library, flavour, counts, options.replays, options.sweep))
    except (ValueError, OSError) as why:
        print(f"bench.conv: {why}", file=sys.stderr)
        return 2
    if here:
        found = {"gpu": here.name, "rows": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table(here.name if here else "H200, predicted", rows))
    return 0


def table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured, for people; the last column has the fastest cut of a sweep."""
    view = Table(title=f"Convolutions, µs each: {name}")
    columns = (
        "B, h, w",
        "C",
        "D",
        "norm/gate",
        "size/stride",
        "times",
        "cut",
        "blocks",
        "predicted",
        "kernel",
        "builtin",
        "best cut",
    )
    for column in columns:
        view.add_column(column, justify="right")
    for row in rows:
        plan, swept = row["plan"], row.get("cuts") or {}
        best = min(swept, key=lambda cut: swept[cut]) if swept else None
        view.add_row(
            f"{row['batch']}, {row['height']}, {row['width']}",
            f"{row['channels']} + {row['second']}" if row["second"] else str(row["channels"]), str(row["filters"]),
            ("", "scores", "values")[row.get("cross", 0)] or "/".join(name for name in ("norm", "gate") if row[name]),
            f"{row['size']}/{'up' if row['up'] else row['stride']}", str(row["count"]),
            f"{plan['high']}·{plan['wide']}x{plan['cluster']}",
            str(plan["blocks"]), f"{plan['predicted_us']:.1f}", number(row["kernel"]), number(row["builtin"]),
            f"{best} {swept[best]:.1f}" if best else "-", style="" if row["chosen"] else "dim",
        )  # fmt: skip
    sums = [sum(row["count"] * row["plan"]["predicted_us"] for row in rows)]
    sums += [sum(row["count"] * (row["kernel"] or 0) for row in rows)]
    view.add_row(
        "sum", "", "", "", "", str(sum(row["count"] for row in rows)), "", "", *(f"{one:.0f}" for one in sums), ""
    )
    return view


def number(value: float | None) -> str:
    """A time, or a dash."""
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
