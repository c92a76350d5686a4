"""A plan carried out on the parts of a model, one after another, and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.calibrate import Statistics
from moejax.checkpoint.native import item_of
from moejax.checkpoint.native_writer import NativeWriter, native_writer
from moejax.model.leaves import Weight
from moejax.model.source import Source
from moejax.pipeline.shapes import Shapes
from moejax.planning import Plan
from moejax.progress import Progress
from moejax.transforms.compress import calibrate_and_compress
from moejax.transforms.compress_block import Rounder, afresh


class Calibrated(NamedTuple):
    """Token chunks (N, T) that a model is calibrated on, and those held out, on which damping is chosen and plans are
    tried."""

    chunks: np.ndarray
    held_out: np.ndarray


def write_plan(
    source: Source,
    shapes: Shapes,
    plan: Plan,
    calibrated: Calibrated,
    output: Path,
    budget: int,
    progress: Progress,
    known: Statistics | None = None,
    rounder: Rounder = afresh,
) -> int:
    """Carry a plan out on what it compresses, whose `shapes` these are, and write the checkpoint; returns its bytes.

    Of the model, one part and what becomes of it are in memory, and the compressed embedding. `known` and `rounder` as
    in `calibrate_and_compress`. Raises what `native_writer` and it raise.
    """
    rounder = afresh if plan.method.sequential else rounder  # whose Hessians are others than those that it knows
    with native_writer(shapes.compressed(plan), output, shapes.description(plan), shapes.copied, budget) as writer:
        finished = _Items(writer).take
        calibrate_and_compress(source, plan, *calibrated, finished, known=known, rounder=rounder, progress=progress)
    return writer.bytes


class _Items:
    """Weights on their way to a writer, which takes whole items."""

    def __init__(self, writer: NativeWriter):
        self._writer = writer
        self._waiting: dict[str, dict[str, Weight]] = {}

    def take(self, leaves: Mapping[str, Weight]) -> None:
        for name, leaf in leaves.items():
            item, within = item_of(name)
            self._waiting.setdefault(item, {})[within] = leaf
        for item in [item for item, own in self._waiting.items() if len(own) == len(self._writer.items[item])]:
            self._writer.add(item, self._waiting.pop(item))
