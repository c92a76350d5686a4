"""What is predicted of plans is what they cost: on the tiny trained checkpoint, across plans such as those of the
README's table, on text that neither calibration nor the choice of plans saw."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.load import open_checkpoint
from moejax.evaluate.text import chunks, default_calibration_text, default_evaluation_text
from moejax.formats import parse_group_format
from moejax.pipeline import compress as job
from moejax.pipeline.measure_pruning import measure_pruning, with_pruning
from moejax.pipeline.probe import probe
from moejax.pipeline.recipe import Recipe
from moejax.planning import Plan
from moejax.planning.baselines import all_experts, uniform_plan
from moejax.planning.fit import PRUNING_WEIGHTS
from moejax.planning.size import parse_budget
from moejax.planning.solve import menu_survivors
from moejax.progress import silent
from moejax.tokenizer import load_tokenizer

BUDGETS = ("4x", "8x", "12.6x")
# Fewer than a user's recipe has, for time.
FORMATS = tuple(parse_group_format(f"{name}g128") for name in ("int1", "ternary", "int2", "int3", "int4", "int8"))
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
    checkpoint = job.require_original(open_checkpoint(tiny))
    tokenizer = load_tokenizer(tiny)
    calibration, held_out = (
        chunks(tokenizer.encode(text.content), bos_token_id=tokenizer.bos_token_id)
        for text in (default_calibration_text(400_000), default_evaluation_text(200_000))
    )
    calibrated = job.split_calibration(calibration, CALIBRATED, PROBED)
    prepared = job.prepare(checkpoint, calibrated, Recipe(FORMATS), {}, silent)
    held_out = held_out[np.linspace(0, len(held_out) - 1, EVALUATED).astype(int)]
    unseen = replace(prepared.trial, probe=probe(prepared.model, held_out))
    found = []
    for label, plan, predicted in plans(prepared):
        assert predicted is not None
        found.append(Row(label, predicted, unseen.divergence(plan)))
    return found


def plans(prepared: job.Prepared) -> Iterator[tuple[str, Plan, float | None]]:
    """Planned, as far as prediction alone decides; one width for everything; the same after pruning by frequency at the
    paper's share."""
    config, size_of = prepared.model.config, prepared.origin.shapes.size_of
    by_frequency = measure_pruning(prepared.trial, Recipe(FORMATS, criterion="frequency", share_kept=0.75), silent)
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
