"""The main job: a checkpoint and a budget in, a compressed checkpoint and its figures out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax import machine
from moejax.calibrate import output_weights
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import abstract_model, open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.errors import InputError
from moejax.evaluate.divergence import Evaluation, evaluate
from moejax.evaluate.memory import needs, read_within
from moejax.evaluate.text import Text
from moejax.ledger import Ledger, ledger_of
from moejax.pipeline.activated_experts import (
    ActivatedExperts,
    try_activated_experts,
    with_activated_experts,
)
from moejax.pipeline.calibrated import Calibrated, KeptStatistics
from moejax.pipeline.check import Limit
from moejax.pipeline.fit_device import fit_device
from moejax.pipeline.measure import measure
from moejax.pipeline.options import options
from moejax.pipeline.prices import LayerPruning, Prices
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import NO_ROOM, Room
from moejax.pipeline.rounded import RoundedWeights
from moejax.pipeline.sampled import Sampled, is_sampled
from moejax.pipeline.search import Candidate, search, try_out
from moejax.pipeline.shapes import Shapes, ready, shapes_of
from moejax.pipeline.trial import Trials
from moejax.pipeline.work import NOT_KEPT, Work
from moejax.pipeline.write import write_plan
from moejax.planning import Plan
from moejax.planning.expert_scores import ExpertScores
from moejax.planning.fit import Problem, losses_of_plan
from moejax.planning.memory import device_memory
from moejax.planning.menus import Menus
from moejax.progress import Progress, silent
from moejax.sharding import Crew
from moejax.transforms.rounder import Afresh, Rounder
from moejax.version import __version__

# Bytes of the budget left free while plans are compared, per block: digits of a routing scale fitted afterwards.
_SCALE_DIGITS = 16
# Chunks that are evaluated together.
_BATCH = 8


@dataclass(frozen=True)
class Prepared:
    """Everything measured that no budget changes; `plan_within` takes it from here.

    shapes: of what is compressed, which is the model, rotated if the recipe says so. costs: of every format. problem:
    of those that the recipe allows. pruning: by block.
    """

    checkpoint: HuggingFaceCheckpoint
    shapes: Shapes
    recipe: Recipe
    trials: Trials
    costs: Menus
    pruning: Mapping[int, LayerPruning]
    problem: Problem

    def predicted(self, plan: Plan) -> float | None:
        """The KL predicted of any plan, allowed or not, its K' and routing scales left out; None where the costs do
        not cover it."""
        losses = losses_of_plan(self.costs, plan)
        return None if losses is None else self.problem.predicted(losses)

    def write(self, plan: Plan, output: Path, budget: int, progress: Progress = silent) -> int:
        """Carry a plan out and write the checkpoint, as `write_plan` does; returns its bytes, at most `budget`."""
        own = self.trials
        rounder = None if isinstance(own.rounder, Sampled) else own.rounder  # one that imitates rounds nothing
        return write_plan(
            own.source,
            self.shapes,
            plan,
            own.calibrated,
            output,
            budget,
            progress,
            own.statistics.known,
            rounder,
            own.work,
            own.room,
            own.statistics.outputs,
        )


@dataclass(frozen=True)
class Planned:
    """The plan chosen for a budget, its predicted KL, and what was tried, candidates best first; and the weights that
    no plan of the recipe rounds."""

    plan: Plan
    predicted: float
    candidates: tuple[Candidate, ...]
    activated: tuple[ActivatedExperts, ...]
    without_format: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What the main job did; the figures of its checkpoint, unless nothing went through it; how it was planned, unless
    the plan was given."""

    plan: Plan
    bytes: int
    evaluation: Evaluation | None
    planned: Planned | None = None
    pruning: Mapping[int, LayerPruning] = field(default_factory=dict)

    @property
    def predicted(self) -> float | None:
        """The KL divergence that was predicted before anything was carried out."""
        return self.planned.predicted if self.planned else None


def provenance(calibration: Text, chunks: int, recipe: Recipe | None, dropped_mtp: int = 0) -> dict[str, Any]:
    """What a manifest says about how the checkpoint was made; without a recipe if the plan was given, and of MTP blocks
    only if some were dropped."""
    made: dict[str, Any] = {
        "moejax": __version__,
        "calibration": {"source": calibration.source, "sha256": calibration.sha256, "chunks": chunks},
    }
    if recipe is not None:
        made["criterion"] = recipe.criterion
    if dropped_mtp:
        made["dropped_mtp_blocks"] = dropped_mtp
    return made


def provenance_by_scores(scores: ExpertScores, dropped_mtp: int = 0) -> dict[str, Any]:
    """What a manifest says where expert scores alone decided the plan."""
    made: dict[str, Any] = {"moejax": __version__, "expert_scores": scores.source}
    return made | {"dropped_mtp_blocks": dropped_mtp} if dropped_mtp else made


def split_calibration(chunks: np.ndarray, calibration: int, probed: int) -> Calibrated:
    """Chunks to calibrate on and chunks held out, to try plans on, disjoint, spread evenly over the text.

    A text with fewer chunks than are asked for gives an eighth of them to the probe; it needs two.
    """
    if len(chunks) < 2:
        raise InputError(f"the calibration text has {len(chunks)} chunk of {chunks.shape[1]} tokens; 2 are needed")
    wanted = min(len(chunks), calibration + probed)
    spread = chunks[np.linspace(0, len(chunks) - 1, wanted).round().astype(int)]
    probed = probed if wanted == calibration + probed else max(1, wanted // 8)
    held_out = np.linspace(0, wanted - 1, probed + 2)[1:-1].astype(int)
    return Calibrated(np.delete(spread, held_out, axis=0), spread[held_out])


def prepare(
    checkpoint: HuggingFaceCheckpoint,
    calibrated: Calibrated,
    recipe: Recipe,
    provenance: dict[str, Any],
    progress: Progress,
    work: Work = NOT_KEPT,
    room: Room | None = None,
) -> Prepared:
    """Calibrate and measure, block by block; what the work knows is not measured again. Without a `room`, a share of
    the memory that is free."""
    shapes = shapes_of(checkpoint, recipe.method, provenance)
    source = ready(CheckpointSource(checkpoint), recipe.method)
    config, room = shapes.config, room or Room(*(ledger_of(None).left // 4,) * 3)
    by = output_weights(source, calibrated.chunks, kept=room.kept, progress=progress) if recipe.row_feedback else None
    statistics = KeptStatistics(config, recipe.method, calibrated, room.statistics, room.kept, room.within, by)
    sampled = Sampled(recipe.formats, {}) if is_sampled(recipe, shapes.model) else None
    rounder: Rounder = RoundedWeights(room.rounded, Afresh(work.crew)) if sampled is None else sampled
    measured = measure(source, recipe, calibrated, statistics.on_the_way, rounder, work, progress, room, sampled)
    if sampled is not None:
        rounder = Sampled(recipe.formats, measured.relative(config.num_hidden_layers))
    trials = Trials(source, calibrated, statistics, rounder, work, room)
    prices, allowed = Prices(measured, config, recipe), options(shapes.model, recipe)
    pruning = prices.pruning()
    costs = prices.costs(allowed, pruning)
    problem = Problem(
        costs.within(allowed),
        prices.curves(),
        config,
        shapes.size_of,
        method=recipe.method,
        multiple=recipe.bucket_multiple,
    )
    return Prepared(checkpoint, shapes, recipe, trials, costs, pruning, problem)


def plan_for(prepared: Prepared, limit: Limit, progress: Progress) -> Planned:
    """The best plan within a budget, or within what leaves a device the memory to decode it."""
    if isinstance(limit, int):
        return plan_within(prepared, limit, progress)
    shapes = prepared.shapes
    return fit_device(
        limit,
        prepared.problem,
        shapes,
        lambda problem, room: plan_within(replace(prepared, problem=problem), room, progress),
        lambda own: device_memory(shapes.compressed(own.plan), limit.context, limit.batch),
    )


def plan_within(prepared: Prepared, budget: int, progress: Progress) -> Planned:
    """The best plan within the budget, bytes of what the problem counts: formats and survivors first, then how many
    experts a token goes to."""
    problem, trials, recipe = prepared.problem, prepared.trials, prepared.recipe
    reserved = budget - _SCALE_DIGITS * prepared.shapes.config.num_blocks
    tried = search(problem, trials, recipe, reserved, progress)
    if not tried:
        # Between the smallest plan's bytes and those of any the solver aims at lie the reserve and a few digits.
        tried = try_out({0.0: problem.smallest()}, problem, trials, recipe, progress)
    plan = tried[0].plan
    activated = try_activated_experts(trials, plan, recipe, progress)
    adjusted = (with_activated_experts(plan, choice) for choice in activated)
    plan = next((own for own in adjusted if problem.size_of(own) <= budget), plan)
    return Planned(plan, tried[0].predicted, tuple(tried), tuple(activated), problem.costs.without_format)


def compress_checkpoint(
    prepared: Prepared, output: Path, limit: Limit, evaluation: np.ndarray, ledger: Ledger, progress: Progress
) -> Result:
    """Plan, write, read back, evaluate, within the ledger's memory."""
    planned = plan_for(prepared, limit, progress)
    budget = limit if isinstance(limit, int) else prepared.shapes.size_of(planned.plan)
    crew, given = prepared.trials.work.crew, (prepared.checkpoint, prepared.shapes, planned.plan)
    evaluated = _evaluation_of(*given, output, evaluation, ledger, progress, crew)
    written = prepared.write(planned.plan, output, budget, progress)
    return Result(planned.plan, written, evaluated(), planned, prepared.pruning)


def carry_out(
    checkpoint: HuggingFaceCheckpoint,
    plan: Plan,
    calibrated: Calibrated,
    provenance: dict[str, Any],
    output: Path,
    budget: int,
    evaluation: np.ndarray,
    ledger: Ledger,
    progress: Progress,
    work: Work = NOT_KEPT,
    room: Room = NO_ROOM,
) -> Result:
    """A given plan: calibrate and write block by block; evaluate, so too where both models do not fit the memory."""
    shapes = shapes_of(checkpoint, plan.method, provenance)
    evaluated = _evaluation_of(checkpoint, shapes, plan, output, evaluation, ledger, progress, work.crew)
    source = ready(CheckpointSource(checkpoint), plan.method)
    written = write_plan(source, shapes, plan, calibrated, output, budget, progress, work=work, room=room)
    return Result(plan, written, evaluated())


def carry_out_unseen(
    checkpoint: HuggingFaceCheckpoint,
    plan: Plan,
    provenance: dict[str, Any],
    output: Path,
    budget: int,
    progress: Progress,
    work: Work = NOT_KEPT,
) -> Result:
    """A plan carried out and written without anything that goes through the model: every input counts alike."""
    shapes = shapes_of(checkpoint, plan.method, provenance)
    source = ready(CheckpointSource(checkpoint), plan.method)
    return Result(plan, write_plan(source, shapes, plan, None, output, budget, progress, work=work), None)


def _evaluation_of(
    checkpoint: HuggingFaceCheckpoint,
    shapes: Shapes,
    plan: Plan,
    output: Path,
    chunks: np.ndarray,
    ledger: Ledger,
    progress: Progress,
    crew: Crew,
) -> Callable[[], Evaluation | None]:
    """What gives the figures of a plan's checkpoint, once it is written, against the original; None but in the first
    process. Raises InputError, now, if the memory is not enough."""
    if not crew.is_first:
        return lambda: None
    batch = min(_BATCH, len(chunks))
    asked = needs(shapes.compressed(plan), abstract_model(checkpoint), chunks.shape[1], batch, jnp.float32)
    read, wave = read_within(ledger, asked, output, len(chunks), progress)

    def evaluated() -> Evaluation:
        machine.forget_programs()  # packed blocks compile their own
        compressed, original = read(open_checkpoint(output)), read(checkpoint)
        return evaluate(compressed, chunks, original, batch=batch, wave=wave, progress=progress)

    return evaluated
