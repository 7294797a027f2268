"""What one schedule needs on the GPU: for each evaluated step its own time rows, coefficients and noise, and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.engine import Binding, Plan
from runtime.manifest import EngineError
from runtime.memory import Layout, Resources, aligned
from runtime.rules import HISTORY
from runtime.schedule import Evaluation, Update

if TYPE_CHECKING:
    from runtime.session import Session

STEP = ("control", "unet_encoder", "unet_decoder")  # once per evaluated step; the first two run at the same time
COND = tuple(f"{stage}_cond" for stage in STEP)  # the same of the prompt's half alone, where a schedule asks for it


class Steps:
    """What a schedule needs beside its session: a row of memory for each evaluated step, and its graphs."""

    def __init__(self, session: Session, evaluations: Sequence[Evaluation]) -> None:
        self.evaluations = tuple(evaluations)
        self.resources = Resources()
        self.graphs: dict[str, Any] = {}
        self.noisy = False  # whether the noise on the GPU is not all zero
        n, plans = len(evaluations), session.plans
        decoder = plans["unet_decoder"].inputs
        self._noise, self._coefficients = decoder["noise"], decoder["coefficients"]
        rows = {  # each row at a multiple of 256, which the rows of the time engine's outputs are not
            f"{stage}.{name}": aligned(binding.nbytes)
            for stage in STEP
            for name, binding in plans[stage].inputs.items()
            if name.startswith("row")
        }
        each = {"coefficients": aligned(self._coefficients.nbytes), "noise": aligned(self._noise.nbytes)} | rows
        try:
            layout = Layout({name: size * n for name, size in each.items()})
            self.block = self.resources.device(layout.nbytes, session.main)
            self.table = {name: (self.block + layout.offsets[name], size) for name, size in each.items()}
            self.uploads = {
                name: self.resources.pinned(each[name] * n).reshape(n, each[name]) for name in ("coefficients", "noise")
            }
        except EngineError:
            self.close()
            raise
        self.addresses = [{stage: self._addresses(stage, plans[stage], i, session) for stage in STEP} for i in range(n)]

    def _addresses(self, stage: str, plan: Plan, i: int, session: Session) -> dict[str, int]:
        """Where the tensors of a stage lie in step i, for all of the batch or its first half."""
        places = {"x": session.latents[i % 2], "x_next": session.latents[(i + 1) % 2]}
        # Before the first steps nothing was evaluated. Their weights are 0 then, which an infinite number that an
        # earlier picture left there would turn into NaN.
        for k, name in enumerate(("e", "e1", "e2")):
            places[name] = session.estimates[(i - k) % HISTORY] if i >= k else session.at["nothing"]
        for name in (*plan.inputs, *plan.outputs):
            table = self.table.get(f"{stage}.{name}") or self.table.get(name)
            if table:
                places[name] = table[0] + i * table[1]
        return {name: place for name, place in places.items() if name in plan.inputs or name in plan.outputs}

    def fill(self, updates: Sequence[Update], noise: Callable[[int], np.ndarray]) -> bool:
        """Write the updates' coefficients and their noise, drawn by number, for the next upload; whether it has any."""
        noisy = any(u.noise for u in updates)
        for i, u in enumerate(updates):
            self._view("coefficients", i, self._coefficients)[:] = u.a, *u.b
            if noisy or self.noisy:
                total = self._view("noise", i, self._noise)
                total[:] = 0.0
                for draw, c in u.noise:
                    total += c * noise(draw)
        return noisy

    def _view(self, name: str, i: int, binding: Binding) -> np.ndarray:
        return self.uploads[name][i, : binding.nbytes].view(binding.dtype).reshape(binding.shape)

    def close(self) -> None:
        """Free its memory and graphs."""
        self.graphs.clear()
        self.resources.close()
