"""`python -m bench.attention`: our attention at every shape of the networks, PyTorch's where it sees a GPU; and what
lies between attentions, products and convolutions: LayerNorm, the gate of GEGLU, ResBlocks' sums, joined skips. With
these the GroupNorm behind them is timed, too: alone (`norm`), and in one launch with the join (`with_norm`).

Needs the compiled plugins (`python -m plugins build`) and cuda-python; TensorRT only to find the library, which
--library names as well, for an interpreter that has PyTorch instead. Each is timed as a CUDA graph of several calls.

  python -m bench.attention --check      each shape once against float64; for compute-sanitizer, too
  python -m bench.attention --sweep      every cut by the kernel that is for compute capability 9.0, and the chosen one
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.group_norm import LAUNCHES, add_shape, graph_us, measured_on, placed
from plugins.call import Attention, GroupNorm, OnGpu, attention_on_gpu, error, group_norm_on_gpu, open_library
from plugins.load import PluginError, library_path
from plugins.token_calls import Geglu, Join, JoinNorm, LayerNorm, Sum, join_norm_on_gpu, tokens_on_gpu
from trt_builder.config import Block, ModelConfig, Shape, UNetConfig

TOLERANCE = 2e-3
MOST_WARPGROUPS, MOST_CLUSTER = 3, 8  # of a block and of blocks that share keys, in attention/hopper.cuh


def attentions(config: ModelConfig, shape: Shape) -> Counter[Attention]:
    """How often each attention occurs in a step."""
    found: Counter[Attention] = Counter()
    for unet, blocks in (
        (config.control, config.control.encoder_blocks),
        (config.unet, config.unet.encoder_blocks),
        (config.unet, config.unet.output_blocks),
    ):
        found.update(of_blocks(unet, blocks, shape, config.clip.max_length))
    return found


def of_blocks(config: UNetConfig, blocks: Sequence[Block], shape: Shape, words: int) -> Iterator[Attention]:
    """Those of the encoder's or the output blocks, in order."""
    heads = config.num_heads
    for layer, (rows, h, w), _ in placed(config, blocks, shape):
        if layer.kind == "transformer":
            tokens, width = h * w, layer.channels // heads
            for _ in range(config.transformer_depth):
                yield Attention(rows, heads, tokens, tokens, width, joined=True)
                repeat, rows = shape.batch // rows, shape.batch  # cond and uncond part here
                yield Attention(rows, heads, tokens, words, width, repeat=repeat)


def between(counts: Counter[Attention]) -> Counter[LayerNorm | Geglu]:
    """How often each LayerNorm and gate occurs in the blocks of these attentions."""
    found: Counter[LayerNorm | Geglu] = Counter()
    for one, count in counts.items():
        queries = one.batch // one.repeat * one.tokens
        found[LayerNorm(queries, one.channels)] += count
        if not one.joined:  # the feed-forward follows
            found[LayerNorm(one.batch * one.tokens, one.channels)] += count
            found[Geglu(one.batch * one.tokens, 4 * one.channels)] += count
    return found


def residuals(config: ModelConfig, shape: Shape) -> Counter[Sum | Join]:
    """How often each sum at a ResBlock's end, and each joined skip of the UNet, occurs in a step.

    Without our convolutions, which add what they are given themselves.
    """
    found: Counter[Sum | Join] = Counter()
    for unet in (config.control, config.unet):
        for layer, (batch, h, w), _ in placed(unet, unet.encoder_blocks, shape):
            if layer.kind == "res" and layer.channels == layer.out_channels:
                found[Sum(batch * h * w, layer.channels)] += 1
    skips, blocks = config.unet.channels, config.unet.output_blocks
    ours = {block[0].prefix: skip for block, skip in zip(blocks, reversed(skips), strict=True)}
    for layer, (batch, h, w), _ in placed(config.unet, blocks, shape):
        if layer.prefix in ours:
            skip = ours[layer.prefix]
            # The first one's x is the middle block's output, which has a residual.
            first = layer.prefix == blocks[0][0].prefix
            found[Join(batch, h * w, layer.channels - skip, skip, first)] += 1
    return found


def on_gpu_of(library: Any, what: Any, arrays: Any) -> OnGpu:
    """Any of them on the GPU."""
    if isinstance(what, GroupNorm):
        return group_norm_on_gpu(library, what, arrays, overlap=True)
    puts: dict[type, Any] = {Attention: attention_on_gpu, JoinNorm: join_norm_on_gpu}
    return puts.get(type(what), tokens_on_gpu)(library, what, arrays)


def kernel_us(library: Any, what: Any, replays: int) -> float:
    """Microseconds of one call by our kernels."""
    with on_gpu_of(library, what, what.arrays()) as on_gpu:

        def several(stream: Any) -> None:
            for _ in range(LAUNCHES):
                on_gpu.launch(stream)

        return graph_us(several, replays) / LAUNCHES


def without_hopper(attention: Attention) -> Attention:
    """The same by kernels that other GPUs have, too."""
    return replace(attention, groups=-1)


def with_norm_us(library: Any, what: Any, replays: int) -> dict[str, float | None]:
    """Microseconds of the GroupNorm behind a join, and of both in one launch; None where it is no join."""
    both = JoinNorm(what) if isinstance(what, Join) else None
    parts = {"norm": both and both.norm, "with_norm": both}
    return {name: kernel_us(library, part, replays) if part else None for name, part in parts.items()}


def torch_us(attention: Attention, replays: int) -> float | None:
    """Microseconds of one attention by PyTorch's `scaled_dot_product_attention`; None where it sees no GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    q, k, v = (
        torch.from_numpy(array).cuda().view(len(array), -1, attention.heads, attention.width).transpose(1, 2)
        for array in attention.arrays().values()
    )
    q = q.repeat(attention.repeat, 1, 1, 1)

    def several(stream: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(int(stream))):
            for _ in range(LAUNCHES):
                torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return graph_us(several, replays) / LAUNCHES


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or check. Returns 0, 1 where --check finds an error over 2e-3, 2 for what cannot be done."""
    make = argparse.ArgumentParser(
        prog="bench.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = make.add_argument
    add_shape(make)
    add("--replays", type=int, default=50, help="(%(default)s)")
    add("--check", action="store_true", help="no times: each shape once, against float64")
    add("--sweep", action="store_true", help="every cut by the kernel that is for compute capability 9.0")
    add("--library", type=Path, help="a compiled library (that of the TensorRT in this interpreter)")
    add("--output", type=Path, default=Path("attention.json"), help="what was measured (%(default)s)")
    options = make.parse_args(argv)
    try:
        here = measured_on()
        model, shape = ModelConfig.load(options.model), Shape(options.height, options.width, options.samples)
        counts = attentions(model, shape)
        others = [*between(counts).items(), *residuals(model, shape).items()]
        library = open_library(options.library or usual_library())
        if options.check:
            twice = [without_hopper(one) for one in counts if one.joined]
            return checked(library, [*counts, *twice, *(one for one, _ in others)])
        if options.sweep:
            return sweep(library, counts, options.replays)
        rows = []
        for attention, count in sorted(counts.items(), key=lambda one: -one[0].flop):
            took = {
                "kernel": kernel_us(library, attention, options.replays),
                "without": kernel_us(library, without_hopper(attention), options.replays),
            }
            rows.append(vars(attention) | {"count": count, "flop": attention.flop} | took)
            rows[-1]["torch"] = torch_us(attention, options.replays)
        rest = [
            {
                "what": type(one).__name__,
                **vars(one),
                "tokens": one.tokens,
                "channels": one.channels,
                "count": count,
                "kernel": kernel_us(library, one, options.replays),
                **with_norm_us(library, one, options.replays),
            }
            for one, count in others
        ]
    except (ValueError, OSError) as why:
        print(f"bench.attention: {why}", file=sys.stderr)
        return 2
    options.output.write_text(
        json.dumps({"gpu": here.name, "rows": rows, "between": rest}, indent=1) + "\n", encoding="utf-8"
    )
    Console(width=120).print(table(here.name, rows), between_table(rest))
    return 0


def usual_library() -> Path:
    """The library for the TensorRT of this interpreter."""
    from trt_builder.flavour import get_flavour

    return library_path(int(get_flavour("tensorrt").trt.__version__.partition(".")[0]))


def table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured, for people."""
    view = Table(title=f"Attention, µs each: {name}")
    for column in ("B", "heads", "tokens", "keys", "width", "times", "kernel", "without wgmma", "torch", "TFLOP/s"):
        view.add_column(column, justify="right")
    for row in rows:
        shape = [str(row[key]) for key in ("batch", "heads", "tokens", "keys", "width", "count")]
        torch_time = "-" if row["torch"] is None else f"{row['torch']:.2f}"
        ours = (f"{row[way]:.2f}" for way in ("kernel", "without"))
        view.add_row(*shape, *ours, torch_time, f"{row['flop'] / row['kernel'] / 1e6:.0f}")
    sums = [sum(row["count"] * row[way] for row in rows) if all(row[way] for row in rows) else None
            for way in ("kernel", "without", "torch")]  # fmt: skip
    view.add_row("sum", "", "", "", "", "", *("-" if one is None else f"{one:.0f}" for one in sums), "", style="bold")
    return view


def between_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured of the rest, for people."""
    view = Table(title="Between them, µs each")
    for column in ("what", "tokens", "channels", "times", "kernel", "norm", "with norm"):
        view.add_column(column, justify="right")
    for row in rows:
        times = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("kernel", "norm", "with_norm"))
        view.add_row(*(str(row[key]) for key in ("what", "tokens", "channels", "count")), *times)
    view.add_row("sum", "", "", "", f"{sum(row['count'] * row['kernel'] for row in rows):.0f}", style="bold")
    return view


def checked(library: Any, shapes: Sequence[Any]) -> int:
    """Every shape against float64; returns 1 where an error is over the tolerance."""
    worst = 0.0
    for what in shapes:
        arrays = what.arrays()
        with on_gpu_of(library, what, arrays) as on_gpu:
            on_gpu.launch()
            off = error(on_gpu.result(), what.expected(arrays))
        worst = max(worst, off)
        print(f"{what}: {off:.1e}{'' if off < TOLERANCE else ' over'}")
    print(f"worst of {len(shapes)} shapes: {worst:.1e}, may be {TOLERANCE:.0e}")
    return int(not worst < TOLERANCE)


def sweep(library: Any, counts: Counter[Attention], replays: int) -> int:
    """Print what each shape takes in each way that the kernel for compute capability 9.0 can cut it, and without it."""
    for one in sorted((one for one in counts if one.joined), key=lambda one: -one.flop):
        cells = [f"chosen {kernel_us(library, one, replays):.2f}"]
        cells.append(f"without wgmma {kernel_us(library, without_hopper(one), replays):.2f}")
        for warpgroups in range(MOST_WARPGROUPS, 0, -1):
            for cluster in range(1, MOST_CLUSTER + 1):
                cut = replace(one, warps=-warpgroups, groups=cluster)
                try:
                    cells.append(f"{warpgroups} by {cluster}: {kernel_us(library, cut, replays):.2f}")
                except PluginError:  # no kernel for these heads, or fewer tiles than blocks
                    continue
        print(f"B {one.batch}, {one.tokens} tokens, heads {one.width} wide: {', '.join(cells)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
