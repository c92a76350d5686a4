"""What is compressed: a model, ready for its plans' method, and what it was calibrated on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.calibrate import Following, Statistics, calibrate
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model
from moejax.checkpoint.native import write_native
from moejax.model import DeepseekV3
from moejax.pipeline.shapes import Shapes, copied_files, made_ready, shapes_for
from moejax.planning import Method, Plan
from moejax.progress import Progress, silent
from moejax.transforms.choose_damping import choose_damping, has_few_tokens
from moejax.transforms.compress import compress, compress_in_sequence
from moejax.transforms.compress_block import Rounder, afresh


@dataclass(frozen=True)
class Origin:
    """A model, as it is and ready for its plans' method, with the statistics of the latter, its shapes, and the chunks
    it was calibrated on.

    model: `original`, rotated if the method says so.
    """

    original: DeepseekV3
    model: DeepseekV3
    shapes: Shapes
    statistics: Statistics
    chunks: np.ndarray

    def compressed(self, plan: Plan, progress: Progress = silent, rounder: Rounder = afresh) -> DeepseekV3:
        """The model that a plan makes, by the plan's method."""
        if not plan.method.sequential:
            return compress(self.model, plan, self.statistics, rounder=rounder, progress=progress)
        start = Following.of(self.model, self.chunks, hessians=plan.method.error_feedback)
        return compress_in_sequence(self.model, plan, start, self.statistics, progress=progress)

    def write(
        self, plan: Plan, output: Path, budget: int, progress: Progress = silent, rounder: Rounder = afresh
    ) -> int:
        """Carry a plan out and write the checkpoint; returns its bytes, never more than `budget`."""
        compressed = self.compressed(plan, progress, rounder)
        return write_native(compressed, output, self.shapes.description(plan), self.shapes.copied, budget, progress)


def read_origin(
    checkpoint: HuggingFaceCheckpoint,
    method: Method,
    chunks: np.ndarray,
    held_out: np.ndarray,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Origin:
    """A checkpoint's model, loaded and calibrated for a method; where tokens are few, damping is chosen on the chunks
    held out."""
    original = load_model(checkpoint, progress)
    shapes = shapes_for(original, method, checkpoint.raw_config, copied_files(checkpoint.path), provenance)
    model = made_ready(original, method)
    statistics = calibrate(model, chunks, progress=progress, hessians=method.error_feedback)
    if method.error_feedback and has_few_tokens(statistics):
        statistics = choose_damping(
            model, statistics, calibrate(model, held_out, progress=progress, hessians=True), progress
        )
    return Origin(original, model, shapes, statistics, chunks)
