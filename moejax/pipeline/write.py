"""A plan carried out on the parts of a model, one after another, and written."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.calibrate import Statistics
from moejax.checkpoint.native import write_native
from moejax.model import DeepseekV3
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

    `known` and `rounder` as in `calibrate_and_compress`. Raises what `write_native` and it raise.
    """
    leaves: dict[str, Weight] = {}
    rounder = afresh if plan.method.sequential else rounder
    calibrate_and_compress(source, plan, *calibrated, leaves.update, known=known, rounder=rounder, progress=progress)
    per_token = [own.experts_per_token or source.config.num_experts_per_tok for own in plan.blocks]
    compressed = DeepseekV3(source.config, leaves.__getitem__, per_token)
    return write_native(compressed, output, shapes.description(plan), shapes.copied, budget, progress)
