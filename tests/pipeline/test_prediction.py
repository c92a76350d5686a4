"""What is predicted of plans is what they cost: on the tiny trained checkpoint, across plans such as those of the
README's table, on text that neither calibration nor the choice of plans saw."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from baselines import all_experts, uniform_plan, with_pruning
from moejax.checkpoint.load import open_checkpoint
from moejax.evaluate.text import chunks, default_calibration_text, default_evaluation_text
from moejax.formats import parse_format
from moejax.pipeline import job
from moejax.pipeline.check import require_original
from moejax.pipeline.measure import measure
from moejax.pipeline.prices import Prices
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Try
from moejax.pipeline.work import NOT_KEPT
from moejax.planning import Plan
from moejax.planning.fit import PRUNING_WEIGHTS
from moejax.planning.size import parse_budget
from moejax.planning.solve import menu_survivors
from moejax.progress import silent
from moejax.tokenizer import load_tokenizer

BUDGETS = ("4x", "8x", "12.6x")
# Fewer than a user's recipe has, for time.
FORMATS = tuple(parse_format(f"{name}g128") for name in ("int1", "ternary", "int2", "int3", "int4", "int8"))
CALIBRATED, PROBED, EVALUATED = 8, 1, 4


@dataclass(frozen=True)
class Row:
    label: str
    predicted: float
    measured: float


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tiny: Path, optimized: None) -> list[Row]:
    """Every plan with its predicted and its measured mean KL divergence."""
    checkpoint = require_original(open_checkpoint(tiny))
    tokenizer = load_tokenizer(tiny)
    calibration, held_out = (
        chunks(tokenizer.encode(text.content), bos_token_id=tokenizer.bos_token_id)
        for text in (default_calibration_text(400_000), default_evaluation_text(200_000))
    )
    calibrated = job.split_calibration(calibration, CALIBRATED, PROBED)
    prepared = job.prepare(checkpoint, calibrated, Recipe(FORMATS), {}, silent)
    held_out = held_out[np.linspace(0, len(held_out) - 1, EVALUATED).astype(int)]
    every = list(plans(prepared))
    per_layer = (prepared.shapes.config.num_experts_per_tok,) * prepared.shapes.config.num_hidden_layers
    unseen = replace(prepared.trials, calibrated=prepared.trials.calibrated._replace(held_out=held_out))
    tried = unseen.of([Try(plan, per_layer, False) for _, plan, _ in every], silent)
    found = []
    for (label, _, predicted), own in zip(every, tried, strict=True):
        assert predicted is not None
        found.append(Row(label, predicted, own.divergence))
    return found


def plans(prepared: job.Prepared) -> Iterator[tuple[str, Plan, float | None]]:
    """Planned, as far as prediction alone decides; one width for everything; the same after pruning by frequency at the
    paper's share."""
    config, size_of, trials = prepared.shapes.config, prepared.shapes.size_of, prepared.trials
    frequency_alone = Recipe((), criterion="frequency", share_kept=0.75)
    source, own = trials.source, trials.calibrated
    measured = measure(source, frequency_alone, own, trials.statistics.on_the_way, trials.rounder, NOT_KEPT, silent)
    by_frequency = Prices(measured, config, frequency_alone).pruning()
    pruned = replace(prepared, costs=with_pruning(prepared.costs, by_frequency))
    kept = {i: menu_survivors(menu, menu.most_pruned).tolist() for i, menu in pruned.costs.experts.items()}
    for label in BUDGETS:
        budget = parse_budget(label, prepared.checkpoint.num_elements)
        fitted = (prepared.problem.fit(budget, weight) for weight in PRUNING_WEIGHTS)
        planned = min((own for own in fitted if own), key=lambda own: prepared.problem.predicted(own.losses))
        yield f"planned {label}", planned.plan, prepared.predicted(planned.plan)
        uniform = uniform_plan(prepared.costs, config, all_experts(prepared.costs), size_of, budget)
        frequency = uniform_plan(pruned.costs, config, kept, size_of, budget)
        assert uniform is not None and frequency is not None
        yield f"uniform {label}", uniform, prepared.predicted(uniform)
        yield f"frequency {label}", frequency, pruned.predicted(frequency)


def test_every_prediction_is_within_a_factor_of_two(rows: list[Row]) -> None:
    assert len(rows) == 3 * len(BUDGETS)
    for row in rows:
        assert 0.5 <= row.predicted / row.measured <= 2, row


def test_predictions_rank_plans_as_measurement_does(rows: list[Row]) -> None:
    predicted, measured = (ranks([getattr(row, name) for row in rows]) for name in ("predicted", "measured"))
    assert np.corrcoef(predicted, measured)[0, 1] >= 0.9
