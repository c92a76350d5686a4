"""What is compressed: a model, ready for its plans' method, and what it was calibrated on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.calibrate import Statistics, calibrate
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model
from moejax.model import DeepseekV3
from moejax.model.source import ModelSource, model_of
from moejax.pipeline.shapes import Shapes, copied_files, ready, shapes_for
from moejax.pipeline.work import NOT_KEPT, Work
from moejax.pipeline.write import Calibrated, write_plan
from moejax.planning import Method, Plan
from moejax.progress import Progress, silent
from moejax.transforms.choose_damping import choose_damping, has_few_tokens
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
    calibrated: Calibrated
    statistics: Statistics

    def write(
        self,
        plan: Plan,
        output: Path,
        budget: int,
        progress: Progress = silent,
        rounder: Rounder = afresh,
        work: Work = NOT_KEPT,
    ) -> int:
        """Carry a plan out and write the checkpoint, as `write_plan` does; returns its bytes, at most `budget`."""
        source, known = ModelSource(self.model), self.statistics
        return write_plan(source, self.shapes, plan, self.calibrated, output, budget, progress, known, rounder, work)


def read_origin(
    checkpoint: HuggingFaceCheckpoint,
    method: Method,
    calibrated: Calibrated,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Origin:
    """A checkpoint's model, loaded and calibrated for a method; where tokens are few, damping is chosen on the chunks
    held out."""
    original = load_model(checkpoint, progress)
    shapes = shapes_for(original, method, checkpoint.raw_config, copied_files(checkpoint.path), provenance)
    model = model_of(ready(ModelSource(original), method)) if method.rotation else original
    statistics = calibrate(model, calibrated.chunks, progress=progress, hessians=method.error_feedback)
    if method.error_feedback and has_few_tokens(model.config, calibrated.chunks.size):
        held_out = calibrate(model, calibrated.held_out, progress=progress, hessians=True)
        statistics = choose_damping(model, statistics, held_out, progress)
    return Origin(original, model, shapes, calibrated, statistics)
