from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError
from moejax.formats import ExpertWeights, parse_format
from moejax.model import DeepseekV3, named_leaves
from moejax.pipeline.check import require_original
from moejax.pipeline.job import Prepared, plan_within, prepare, split_calibration
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.search import Candidate, try_out
from moejax.planning import Plan
from moejax.planning.fit import Fitted, check_budget
from moejax.progress import silent
from moejax.transforms.compress import compress
from small_job import Job

INFINITE = float("inf")


def fit(prepared: Prepared, budget: int, pruning_weight: float = 1.0) -> Fitted | None:
    return prepared.problem.fit(budget, pruning_weight)


def tried(prepared: Prepared, recipe: Recipe) -> list[Candidate]:
    """The smallest plan alone."""
    return try_out({0.0: prepared.problem.smallest()}, prepared.problem, prepared.trials, recipe, silent)


@pytest.mark.parametrize("factor", [1.05, 1.2, 1.5, 2.0, 3.0])
def test_the_plan_of_a_budget_fills_it_and_keeps_within(prepared: Prepared, smallest_bytes: int, factor: float) -> None:
    budget = int(smallest_bytes * factor)
    fitted = fit(prepared, budget)
    assert fitted is not None
    size = prepared.shapes.size_of(fitted.plan)
    assert size == fitted.bytes
    # A weight of 128 x 128 takes 2 KB more with another bit.
    assert budget - 6000 < size <= budget


def test_a_larger_budget_costs_less(prepared: Prepared, smallest_bytes: int) -> None:
    fitted = [fit(prepared, int(smallest_bytes * factor)) for factor in (1.05, 1.3, 1.6, 2, 3, 5)]
    predicted = [prepared.problem.predicted(own.losses) for own in fitted if own is not None]
    assert len(predicted) == 6 and predicted == sorted(predicted, reverse=True)


def test_pruning_can_be_forbidden_and_a_lower_price_prunes_more(prepared: Prepared, smallest_bytes: int) -> None:
    kept = []
    for pruning_weight in (INFINITE, 1.0, 0.1):
        fitted = fit(prepared, int(smallest_bytes * 1.6), pruning_weight)
        assert fitted is not None
        kept.append(sum(len(block.keep) for block in fitted.plan.blocks if block.keep is not None))
    assert kept[0] == 36 and kept[0] >= kept[1] >= kept[2] and kept[2] < 36


def test_without_pruning_the_smallest_budgets_cannot_be_met(prepared: Prepared, smallest_bytes: int) -> None:
    assert fit(prepared, smallest_bytes + 1000, pruning_weight=INFINITE) is None
    assert fit(prepared, smallest_bytes - 1) is None


def test_a_models_experts_of_a_format_are_as_many_as_are_a_multiple(
    small: Path, calibration_text: Path, tokenize: Callable[[Path], np.ndarray], original: DeepseekV3
) -> None:
    """From a recipe to the model."""
    recipe = Recipe(tuple(map(parse_format, ("int1g128", "int4g128"))), bucket_multiple=4, fit_routing_scale=False)
    calibrated = split_calibration(tokenize(calibration_text), calibration=2, probed=1)
    prepared = prepare(require_original(open_checkpoint(small)), calibrated, recipe, {}, silent)
    plan = plan_within(prepared, prepared.problem.smallest().bytes * 8 // 5, silent).plan
    statistics = prepared.trials.statistics.known
    assert statistics is not None
    leaves = named_leaves(compress(original, plan, statistics)).values()
    counts = [bucket.shape[0] for leaf in leaves if isinstance(leaf, ExpertWeights) for bucket in leaf.buckets]
    assert len(counts) > 3 * 3, "some projections have several formats"
    assert all(count % 4 == 0 for count in counts)


def test_the_smallest_candidate(prepared: Prepared, smallest_bytes: int) -> None:
    (smallest,) = tried(prepared, prepared.recipe)
    assert prepared.shapes.size_of(smallest.plan) == smallest_bytes
    assert [len(block.keep or ()) for block in smallest.plan.blocks] == [0, 6, 6, 6]
    assert (smallest.plan.embed, smallest.plan.head) == ("int4g128", "int4g128")
    assert smallest.plan.blocks[3].formats["eh_proj"] == "int2g128"
    assert smallest.plan.blocks[3].experts["up"] == ("int1g128",) * 6


def test_candidates_are_different_plans_the_best_first(prepared: Prepared, job: Job) -> None:
    candidates = job.planned.candidates
    assert len(candidates) >= 2
    divergences = [candidate.best_divergence for candidate in candidates]
    assert divergences == sorted(divergences)
    assert all(candidate.best_divergence <= candidate.divergence for candidate in candidates)
    assert all(candidates[0].plan != other.plan for other in candidates[1:])
    assert all(prepared.shapes.size_of(candidate.plan) <= job.budget for candidate in candidates)


def test_a_candidates_divergence_is_that_of_its_model(
    planned_model: Callable[[Plan], DeepseekV3], divergence: Callable[[DeepseekV3], float], job: Job
) -> None:
    for candidate in (job.planned.candidates[0], job.planned.candidates[-1]):
        assert candidate.divergence == pytest.approx(divergence(planned_model(candidate.plan)), rel=1e-4)


def test_a_candidates_best_divergence_is_that_with_the_original_number_of_experts(job: Job) -> None:
    full = [choice.divergence for choice in job.planned.activated if set(choice.experts_per_token) == {3}]
    assert job.planned.candidates[0].best_divergence == pytest.approx(min(full), rel=1e-6)


def test_without_fitted_scales_plans_are_compared_as_they_are(prepared: Prepared) -> None:
    recipe = replace(prepared.recipe, fit_routing_scale=False)
    (smallest,) = tried(prepared, recipe)
    assert smallest.best_divergence == smallest.divergence


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can(prepared: Prepared, smallest_bytes: int) -> None:
    original = folder_bytes(prepared.checkpoint.path)

    def check(budget: int) -> None:
        check_budget(prepared.problem.smallest().bytes, budget, original)

    check(smallest_bytes)
    check(original - 1)
    with pytest.raises(InputError, match=rf"smallest that can is .*\({smallest_bytes} bytes\)"):
        check(smallest_bytes - 1)
    with pytest.raises(InputError, match=rf"leaves nothing to do; the original takes .*\({original} bytes\)"):
        check(original)


def test_the_size_of_a_plan_counts_what_describes_it(prepared: Prepared, job: Job) -> None:
    plan = job.planned.plan
    blocks = (block if block.keep is None else replace(block, routing_scale=0.12345) for block in plan.blocks)
    scaled = replace(plan, blocks=tuple(blocks))
    digits = [len(str(block.routing_scale)) for block in plan.blocks if block.keep is not None]
    assert prepared.shapes.size_of(scaled) - prepared.shapes.size_of(plan) == sum(
        len("0.12345") - own for own in digits
    )
