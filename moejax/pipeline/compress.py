"""The main job: a checkpoint and a budget in, a compressed checkpoint and its figures out."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import __version__
from moejax.calibrate import Statistics, calibrate
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native import COPIED_FILES, Description, native_bytes, write_native
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError
from moejax.evaluate.divergence import Evaluation, evaluate
from moejax.evaluate.text import Text
from moejax.model import DeepseekV3
from moejax.pipeline.activated_experts import ActivatedExperts, try_activated_experts, with_activated_experts
from moejax.pipeline.measure import measure_costs
from moejax.pipeline.options import Settings, options
from moejax.pipeline.probe import Probe, probe
from moejax.pipeline.search import Candidate, check_budget, search, smallest_candidate
from moejax.planning import Plan
from moejax.planning.costs import Costs
from moejax.planning.plan import to_json
from moejax.progress import Progress, silent
from moejax.transforms.compress import compress

# Bytes of the budget left free while plans are compared, per block: digits of a routing scale fitted afterwards.
_SCALE_DIGITS = 16


@dataclass(frozen=True)
class Origin:
    """What is compressed: a checkpoint, its model and statistics, concrete or in shapes alone."""

    checkpoint: HuggingFaceCheckpoint
    model: DeepseekV3
    statistics: Statistics
    provenance: dict[str, Any]

    def size_of(self, plan: Plan) -> int:
        """The exact bytes of the folder that `write` makes of a plan."""
        abstract = jax.eval_shape(partial(compress, plan=plan), self.model, statistics=self.statistics)
        return native_bytes(abstract, self._description(plan), copied_files(self.checkpoint))

    def write(self, plan: Plan, output: Path, budget: int, progress: Progress = silent) -> int:
        """Carry a plan out and write the checkpoint; returns its bytes, never more than `budget`."""
        compressed = compress(self.model, plan, self.statistics, progress=progress)
        copied = copied_files(self.checkpoint)
        return write_native(compressed, output, self._description(plan), copied, budget, progress)

    def _description(self, plan: Plan) -> Description:
        return Description(self.checkpoint.raw_config, to_json(plan), self.provenance)


@dataclass(frozen=True)
class Prepared(Origin):
    """With everything measured that no budget changes; `plan_within` takes it from here."""

    probe: Probe
    costs: Costs


@dataclass(frozen=True)
class Planned:
    """The plan chosen for a budget, and what else was tried; candidates best first."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    activated: tuple[ActivatedExperts, ...]


@dataclass(frozen=True)
class Result:
    """What the main job did."""

    planned: Planned
    bytes: int
    evaluation: Evaluation


def require_original(checkpoint: object) -> HuggingFaceCheckpoint:
    """The checkpoint, if it is one that can be compressed; InputError if it has been already."""
    if not isinstance(checkpoint, HuggingFaceCheckpoint):
        raise InputError("the checkpoint is compressed already; compress takes an original Hugging Face checkpoint")
    return checkpoint


def copied_files(checkpoint: HuggingFaceCheckpoint) -> list[Path]:
    """The files that go from the original into every compressed checkpoint."""
    return [file for name in COPIED_FILES if (file := checkpoint.path / name).is_file()]


def check(checkpoint: HuggingFaceCheckpoint, budget: int, settings: Settings, provenance: dict[str, Any]) -> None:
    """Raise InputError if the budget cannot be met or is none, before any work: shapes alone decide."""
    model = checkpoint.abstract_model()
    statistics = jax.eval_shape(lambda m: calibrate(m, np.zeros((1, 8), np.int32)), model)
    free = options(model, settings)
    origin = Origin(checkpoint, model, statistics, provenance)
    check_budget(free, model, origin.size_of, budget, folder_bytes(checkpoint.path))


def provenance(calibration: Text, chunks: int, settings: Settings) -> dict[str, Any]:
    """What a manifest says about how the checkpoint was made."""
    return {
        "moejax": __version__,
        "calibration": {"source": calibration.source, "sha256": calibration.sha256, "chunks": chunks},
        "criterion": settings.criterion,
    }


def split_calibration(chunks: np.ndarray, calibration: int, probed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks to calibrate on and chunks to try plans on, disjoint, spread evenly over the text.

    A text with fewer chunks than are asked for gives an eighth of them to the probe; it needs two.
    """
    if len(chunks) < 2:
        raise InputError(f"the calibration text has {len(chunks)} chunk of {chunks.shape[1]} tokens; 2 are needed")
    wanted = min(len(chunks), calibration + probed)
    spread = chunks[np.linspace(0, len(chunks) - 1, wanted).round().astype(int)]
    probed = probed if wanted == calibration + probed else max(1, wanted // 8)
    held_out = np.linspace(0, wanted - 1, probed + 2)[1:-1].astype(int)
    return np.delete(spread, held_out, axis=0), spread[held_out]


def prepare(
    checkpoint: HuggingFaceCheckpoint,
    calibration: np.ndarray,
    probed: np.ndarray,
    settings: Settings,
    provenance: dict[str, Any],
    progress: Progress,
) -> Prepared:
    """Load, calibrate and measure."""
    model = load_model(checkpoint)
    statistics = calibrate(model, calibration, progress=progress)
    tried_on = probe(model, probed)
    costs = measure_costs(options(model, settings), model, tried_on, statistics, settings, progress)
    return Prepared(checkpoint, model, statistics, provenance, tried_on, costs)


def plan_within(prepared: Prepared, budget: int, progress: Progress) -> Planned:
    """The best plan within the budget: formats and survivors first, then how many experts a token goes to."""
    reserved = budget - _SCALE_DIGITS * prepared.model.config.num_blocks
    candidates = search(
        prepared.costs, prepared.model, prepared.probe, prepared.statistics, prepared.size_of, reserved, progress
    )
    if not candidates:
        # Between the smallest plan's bytes and those of any the solver aims at lie the reserve and a few digits.
        candidates = [smallest_candidate(prepared.costs, prepared.model, prepared.probe, prepared.statistics)]
    plan = candidates[0].plan
    compressed = compress(prepared.model, plan, prepared.statistics)
    activated = try_activated_experts(prepared.probe, compressed, plan, progress)
    adjusted = (with_activated_experts(plan, choice) for choice in activated)
    plan = next((own for own in adjusted if prepared.size_of(own) <= budget), plan)
    return Planned(plan, tuple(candidates), tuple(activated))


def evaluate_written(output: Path, original: DeepseekV3, chunks: np.ndarray, progress: Progress) -> Evaluation:
    """The figures of a written checkpoint, read back from disk, against the original."""
    return evaluate(load_model(open_checkpoint(output)), chunks, original, progress=progress)


def compress_checkpoint(
    prepared: Prepared, output: Path, budget: int, evaluation: np.ndarray, progress: Progress
) -> Result:
    """Plan, write, read back, evaluate."""
    planned = plan_within(prepared, budget, progress)
    written = prepared.write(planned.plan, output, budget, progress)
    figures = evaluate_written(output, prepared.model, evaluation, progress)
    return Result(planned, written, figures)
