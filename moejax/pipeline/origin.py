"""What is compressed: a model and its statistics, concrete or in shapes alone, and the exact bytes of what becomes of
it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.calibrate import Following, Statistics, calibrate
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model
from moejax.checkpoint.native import COPIED_FILES
from moejax.checkpoint.native_writer import Description, NativeBytes, native_bytes, write_native
from moejax.model import DeepseekV3
from moejax.model.config import ROTATION_FIELDS
from moejax.planning import Method, Plan
from moejax.planning.plan import to_json
from moejax.progress import Progress, silent
from moejax.transforms.choose_damping import choose_damping, has_few_tokens
from moejax.transforms.compress import compress, compress_in_sequence
from moejax.transforms.compress_block import Rounder, afresh
from moejax.transforms.rotate import rotate

# Of the rotations' signs.
_SEED = 0


@dataclass(frozen=True)
class Origin:
    """A model, as it is and ready for its plans' method, with the statistics of the latter, its config, the files that
    are copied, what a manifest says about how it was made, and the chunks it was calibrated on (none in shapes alone).

    model: `original`, rotated if the method says so.
    """

    original: DeepseekV3
    model: DeepseekV3
    statistics: Statistics
    raw_config: dict[str, Any]
    copied: Sequence[Path]
    provenance: dict[str, Any]
    chunks: np.ndarray | None = None

    def abstract(self, plan: Plan) -> DeepseekV3:
        """The compressed model in shapes alone."""
        statistics = self.statistics.without_hessians()  # shapes do not depend on them, and they take long to trace
        return jax.eval_shape(partial(compress, plan=plan), self.model, statistics=statistics)

    def bytes_of(self, plan: Plan, abstract: DeepseekV3) -> NativeBytes:
        """The exact bytes of the folder that `write` makes of a plan, `abstract` being its model."""
        return native_bytes(abstract, self._description(plan), self.copied)

    def size_of(self, plan: Plan) -> int:
        """The same, in all."""
        return self.bytes_of(plan, self.abstract(plan)).total

    def compressed(self, plan: Plan, progress: Progress = silent, rounder: Rounder = afresh) -> DeepseekV3:
        """The model that a plan makes, by the plan's method."""
        if not plan.method.sequential:
            return compress(self.model, plan, self.statistics, rounder=rounder, progress=progress)
        assert self.chunks is not None
        start = Following.of(self.model, self.chunks, hessians=plan.method.error_feedback)
        return compress_in_sequence(self.model, plan, start, self.statistics, progress=progress)

    def write(
        self, plan: Plan, output: Path, budget: int, progress: Progress = silent, rounder: Rounder = afresh
    ) -> int:
        """Carry a plan out and write the checkpoint; returns its bytes, never more than `budget`."""
        compressed = self.compressed(plan, progress, rounder)
        return write_native(compressed, output, self._description(plan), self.copied, budget, progress)

    def _description(self, plan: Plan) -> Description:
        return Description(self.raw_config, to_json(plan), self.provenance)


def read_origin(
    checkpoint: HuggingFaceCheckpoint,
    method: Method,
    chunks: np.ndarray,
    held_out: np.ndarray,
    provenance: dict[str, Any],
    progress: Progress,
) -> Origin:
    """A checkpoint's model, loaded and calibrated for a method; where tokens are few, damping is chosen on the chunks
    held out."""
    original = load_model(checkpoint, progress)
    model = _ready(original, method)
    statistics = calibrate(model, chunks, progress=progress, hessians=method.error_feedback)
    if method.error_feedback and has_few_tokens(statistics):
        statistics = choose_damping(
            model, statistics, calibrate(model, held_out, progress=progress, hessians=True), progress
        )
    raw_config = _ready_config(checkpoint.raw_config, model)
    return Origin(original, model, statistics, raw_config, copied_files(checkpoint.path), provenance, chunks)


def abstract_origin(original: DeepseekV3, raw_config: dict[str, Any], copied: Sequence[Path], method: Method) -> Origin:
    """The same in shapes alone: sizes do not depend on what was calibrated on."""
    model = jax.eval_shape(partial(_ready, method=method), original)
    statistics = jax.eval_shape(lambda m: calibrate(m, np.zeros((1, 8), np.int32)), model)
    return Origin(original, model, statistics, _ready_config(raw_config, model), copied, {})


def _ready(original: DeepseekV3, method: Method) -> DeepseekV3:
    return rotate(original, _SEED, down=method.down_rotation) if method.rotation else original


def _ready_config(raw_config: Mapping[str, Any], model: DeepseekV3) -> dict[str, Any]:
    """The original's, and how the model is rotated."""
    rotations = {name: getattr(model.config, name) for name in ROTATION_FIELDS}
    return {**raw_config, **{name: value for name, value in rotations.items() if value is not None}}


def copied_files(folder: Path) -> list[Path]:
    """The files that go from an original's folder into every compressed checkpoint."""
    return [file for name in COPIED_FILES if (file := folder / name).is_file()]
