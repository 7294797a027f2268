"""`python -m bench.step [LIBRARY …]`: our kernels of a step in a step's order, without TensorRT.

Needs the compiled plugins (`python -m plugins build`) and cuda-python on a GPU of compute capability 9.0; TensorRT only
to find the library, unless some are named, which are then measured in turn. No engines are built.

A kernel in a chain of itself has its instructions in the caches, and so takes less than in a step, where others come
before it. Here each has its own weights and reads what the one before it made; ControlNet and the UNet's input half run
beside each other. What TensorRT does itself is left out. The numbers in memory are random.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import bench.conv
from bench.attention import usual_library
from bench.group_norm import add_shape, graph_us, measured_on, placed
from plugins.call import Attention, GroupNorm, open_library
from plugins.conv_calls import Conv
from plugins.cross_calls import Cross
from plugins.end_calls import First, Last
from plugins.load import PluginError
from plugins.token_calls import Join, JoinNorm
from runtime.engine import check, cuda_runtime
from runtime.manifest import EngineError
from runtime.memory import Resources, aligned
from trt_builder.config import Block, ModelConfig, Options, Shape, UNetConfig

Kernel = Conv | GroupNorm | JoinNorm | Attention | First | Last

OURS = Options(
    attention="own", qkv="joined", residual="own", conv="own", layer_norm="folded", cross_attention="folded"
)  # fmt: skip
STAGES = ("control", "unet_encoder", "unet_decoder")
MAP, BLOCK = 96 << 20, 32 << 20  # bytes: more than any map of a step; of random numbers at a time
DEVIATION = 0.02  # of weights and maps: sums of thousands of products stay small


# -- which there are --------------------------------------------------------------------------------------------------


def kernels(config: ModelConfig, shape: Shape) -> dict[str, list[Kernel]]:
    """Our kernels of each stage, in order."""
    unet, control, words = config.unet, config.control, config.clip.max_length
    skips, channels, size = list(reversed(unet.channels)), unet.output_blocks[-1][-1].out_channels, (shape.h, shape.w)
    ends: list[Kernel] = [GroupNorm(shape.batch, channels, *size)]
    ends.append(Last(shape.samples, channels, *size, unet.out_channels))
    first = First(shape.samples, unet.in_channels, *size, unet.model_channels, repeat=shape.batch // shape.samples)
    of_control = of_blocks(control, control.encoder_blocks, shape, words, outputs=True)
    return {
        "control": [replace(first, hint_batch=1), *of_control],
        "unet_encoder": [first, *of_blocks(unet, unet.encoder_blocks, shape, words)],
        "unet_decoder": [*of_blocks(unet, unet.output_blocks, shape, words, skips), *ends],
    }


def of_blocks(
    config: UNetConfig, blocks: Sequence[Block], shape: Shape, words: int, skips: Sequence[int] = (),
    outputs: bool = False,
) -> Iterator[Kernel]:  # fmt: skip
    """Those of the encoder's or the output blocks, in order.

    skips: channels of what is joined to each block's x. outputs: with ControlNet's 1×1 convolution behind each block.
    """
    joined = {block[0].prefix: skip for block, skip in zip(blocks, skips, strict=bool(skips))}
    ends = {block[-1].prefix for block in blocks if outputs}
    for layer, given, after in placed(config, blocks, shape):
        rows, h, w = given
        convs = list(bench.conv.of_layer(config, layer, given, after, shape.batch, OURS, words))
        convs += [bench.conv.output_of(layer, after, shape.batch, OURS)] if layer.prefix in ends else []
        ours: Iterator[Conv | None] = (one if bench.conv.is_ours(one, OURS) else None for one in convs)
        c, skip = layer.channels, joined.get(layer.prefix, 0)
        made: list[Kernel | None]
        if layer.kind == "res":
            norm = JoinNorm(Join(rows, h * w, c - skip, skip)) if skip else GroupNorm(rows, c, h, w)
            made = [norm, next(ours), GroupNorm(rows, layer.out_channels, h, w, row_batch=1), *ours]
        elif layer.kind == "transformer":
            over_itself, over_text = attentions(config, rows, shape.batch, c, h * w, words)
            made = [GroupNorm(rows, c, h, w, epsilon=1e-6, silu=False), next(ours)]
            for _ in range(config.transformer_depth):
                made += [next(ours), over_itself, next(ours)]  # Q, K, V; to_out
                first = next(ours)  # the scores, or to_q
                made += [first, *([] if isinstance(first, Cross) else [over_text]), next(ours)]
                made += [next(ours), next(ours)]  # the feed-forward
            made += ours
        else:
            made = list(ours)
        yield from (one for one in made if one is not None)


def attentions(
    config: UNetConfig, rows: int, batch: int, channels: int, tokens: int, words: int
) -> tuple[Attention, Attention]:
    """A transformer's over itself, and over the text, where a batch of `rows` becomes one of `batch`."""
    heads, width = config.num_heads, channels // config.num_heads
    over_itself = Attention(rows, heads, tokens, tokens, width, joined=True)
    return over_itself, Attention(batch, heads, tokens, words, width, repeat=batch // rows)


# -- on the GPU -------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One call of the library."""

    function: Any
    call: ctypes.Structure

    def __call__(self, stream: Any) -> None:
        number = self.function(ctypes.byref(self.call), ctypes.c_void_p(int(stream)))
        if number:
            raise EngineError(f"a kernel was not launched: CUDA's error {number}.")


class Memory:
    """Random numbers on the GPU: weights, each kernel's own, and maps, three for each of two streams."""

    def __init__(self, own: Resources, weights: int) -> None:
        self._own, self._rng, self._used, self._last = own, np.random.default_rng(0), 0, 0
        self._weights = self._random(weights, np.float16)
        self.floats = self._random(1 << 20, np.float32)
        self.maps = [[self._random(MAP, np.float16) for _ in range(3)] for _ in range(2)]

    def _random(self, size: int, dtype: Any) -> int:
        address, kind = self._own.device(size, 0), self._own.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        block = (DEVIATION * self._rng.standard_normal(BLOCK // np.dtype(dtype).itemsize, np.float32)).astype(dtype)
        for at in range(0, size, BLOCK):
            check(self._own.cuda.cudaMemcpy(address + at, block.ctypes.data, min(BLOCK, size - at), kind))
        return address

    def weights(self, one: Conv) -> int:
        """The address of the next weights; both halves of a cross-attention have the same text."""
        if not (isinstance(one, Cross) and one.cross == 2):
            self._last = self._weights + self._used
            self._used += aligned(one.weights)
        return self._last

    def again(self) -> None:
        """Give the same weights again, to another library."""
        self._used = 0


def launches(library: Any, made: Sequence[Kernel], memory: Memory, stream: int, beside: bool) -> list[Launch]:
    """Calls of these kernels, each of which reads what the one before it wrote."""
    first, second, other = memory.maps[stream]
    return [
        launch(library, one, memory, (x, y, other), beside)
        for one, (x, y) in zip(made, cycle([(first, second), (second, first)]), strict=False)
    ]


def launch(library: Any, one: Kernel, memory: Memory, maps: tuple[int, int, int], beside: bool) -> Launch:
    """One call: from the first map to the second, with the third for whatever else it wants."""
    x, y, other = maps
    places = {"x": x, "y": y}
    function: Any
    call: Any
    if isinstance(one, Conv):
        function, call = library.canny_conv, replace(one, beside=beside).call()
        places |= {"weight": memory.weights(one), "bias": memory.floats}
        wants = {"residual": one.residual_batch, "second": one.second}
        places |= {name: other for name, wanted in wants.items() if wanted}
        places |= {"weight_sums": memory.floats} if one.norm else {}
    elif isinstance(one, First):
        function, call = library.canny_first, one.call()
        places = {name: memory.floats for name in ("x", "weight", "bias")} | {"y": y, "repeated": other + MAP // 4}
        places |= {"hint": other} if one.hint_batch else {}
    elif isinstance(one, Last):
        function, call = library.canny_last, one.call()
        read = ("bias", "x", "guidance", "e1", "e2", "noise", "coefficients")
        places = {name: memory.floats for name in read} | {"h": x, "weight": other}
        places |= {"e": y, "difference": y + MAP // 4, "x_next": y + MAP // 2}
    elif isinstance(one, Attention):
        function, call = library.canny_attention, one.call()
        places = {"q": x, "y": y, "k": other, "v": other + MAP // 2}
    else:
        places |= {"gamma": memory.floats, "beta": memory.floats, "workspace": other + MAP // 2}
        if isinstance(one, JoinNorm):
            function, call = library.canny_join_norm, one.call(library.canny_max_cluster())
            places |= {"skip": other, "residual": other, "scales": memory.floats, "joined": other + MAP // 4}
        else:
            function, call = library.canny_group_norm, one.call(library.canny_max_cluster(), overlap=True)
            places |= {"row": other} if one.row_batch else {}
    for name, address in places.items():
        setattr(call, name, address)
    if isinstance(one, Attention):
        one.place(call)
    return Launch(function, call)


def stage_us(
    library: Any, made: dict[str, list[Kernel]], memory: Memory, own: Resources, replays: int
) -> dict[str, float]:
    """Microseconds of each stage alone, of the first two on two streams, and of a step."""
    memory.again()
    control, encoder, decoder = (
        launches(library, made[stage], memory, i == 0, beside=i < 2) for i, stage in enumerate(STAGES)
    )
    cuda, other = own.cuda, own.stream()
    fork, join = own.event(), own.event()

    def both(stream: Any) -> None:
        check(cuda.cudaEventRecord(fork, stream))
        check(cuda.cudaStreamWaitEvent(other, fork, 0))
        for some, on in ((control, other), (encoder, stream)):
            in_turn(some)(on)
        check(cuda.cudaEventRecord(join, other))
        check(cuda.cudaStreamWaitEvent(stream, join, 0))

    def step(stream: Any) -> None:
        both(stream)
        in_turn(decoder)(stream)

    ways = dict(zip(STAGES, map(in_turn, (control, encoder, decoder)), strict=True)) | {"both": both, "step": step}
    return {name: graph_us(enqueue, replays) for name, enqueue in ways.items()}


def in_turn(some: Sequence[Launch]) -> Callable[[Any], None]:
    """All of them on a stream."""

    def enqueue(stream: Any) -> None:
        for one in some:
            one(stream)

    return enqueue


def measure(
    libraries: Sequence[Path], config: ModelConfig, shape: Shape, rounds: int, replays: int
) -> list[dict[str, Any]]:
    """`rounds` rows for each library, in turn. Raises PluginError, or EngineError where CUDA fails."""
    check(cuda_runtime().cudaFree(0))  # so that there is a context before a library asks for the GPU
    made, opened = kernels(config, shape), {path: open_library(path) for path in libraries}
    for path, library in opened.items():
        if not hasattr(library, "canny_first"):
            raise PluginError(f"{path} has no kernels for the ends of a step: build it of newer sources.")
    size = sum(aligned(one.weights) for some in made.values() for one in some if isinstance(one, Conv))
    with Resources() as own:
        memory = Memory(own, size)
        return [
            {"library": str(path)} | stage_us(library, made, memory, own, replays)
            for _ in range(rounds)
            for path, library in opened.items()
        ]


# -- the command ------------------------------------------------------------------------------------------------------


def table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What was measured, for people; name: of the GPU."""
    view = Table(title=f"Our kernels of a step, µs: {name}")
    for column in ("library", *STAGES, "both", "step"):
        view.add_column(column, justify="left" if column == "library" else "right")
    for row in rows:
        view.add_row(Path(row["library"]).name, *(f"{row[name]:.0f}" for name in (*STAGES, "both", "step")))
    return view


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and show; 2 where it cannot be done."""
    make = argparse.ArgumentParser(
        prog="bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = make.add_argument
    add("libraries", type=Path, nargs="*", help="compiled libraries (that of the TensorRT in this interpreter)")
    add_shape(make)
    add("--rounds", type=int, default=2, help="how often each library is measured, in turn (%(default)s)")
    add("--replays", type=int, default=20, help="a median is of so many (%(default)s)")
    add("--output", type=Path, default=Path("step.json"), help="what was measured (%(default)s)")
    options = make.parse_args(argv)
    try:
        here = measured_on()
        shape = Shape(options.height, options.width, options.samples)
        libraries = options.libraries or [usual_library()]
        rows = measure(libraries, ModelConfig.load(options.model), shape, options.rounds, options.replays)
        options.output.write_text(json.dumps({"gpu": here.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, EngineError) as why:
        print(f"bench.step: {why}", file=sys.stderr)
        return 2
    Console(width=120).print(table(here.name, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
