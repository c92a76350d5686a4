from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import to_numpy
from moejax.checkpoint.abstract import abstract_original
from moejax.checkpoint.json_file import read_json_object
from moejax.formats import Format, IntFormat, TernaryFormat
from moejax.model import DeepseekV3
from moejax.pipeline.estimate import (
    ESTIMATED_CURVES,
    PRUNING_OVER_ROUNDING,
    REROUTING_RATIO,
    criterion_of,
    estimate_costs,
    gaussian_errors,
)
from moejax.pipeline.options import options
from moejax.pipeline.recipe import Recipe
from moejax.planning.expert_scores import ExpertScores, equal_scores, expert_scores_from_json
from moejax.planning.menus import Menus
from moejax.planning.plan import KEEP, PROJECTIONS
from moejax.planning.sensitivity import Sensitivity, sensitivity_from_json
from moejax.resources import config_path
from moejax.transforms.prune import CRITERIA, gate_scores
from moejax.transforms.quantize import quantize
from small_checkpoint import CONFIG, random_scores

RECIPE = Recipe()


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return abstract_original(CONFIG)


@pytest.fixture(scope="module")
def scores(model: DeepseekV3) -> ExpertScores:
    return expert_scores_from_json(random_scores(seed=3), model.config, "made up")


@pytest.fixture(scope="module")
def sensitivity() -> Sensitivity:
    return sensitivity_from_json(read_json_object(config_path("sensitivity", "deepseek_v3")), "deepseek_v3.json")


@pytest.fixture(scope="module")
def costs(model: DeepseekV3, scores: ExpertScores, sensitivity: Sensitivity) -> Menus:
    return estimate_costs(options(model, RECIPE), model, RECIPE, scores, sensitivity)


@pytest.fixture(scope="module")
def relative_F() -> np.ndarray:
    """Errors of the recipe's formats against the ternary one's, KEEP last."""
    errors = gaussian_errors([*RECIPE.formats, TernaryFormat(128)])
    return np.append(errors[:-1] / errors[-1], 0.0)


def test_more_levels_err_less_and_smaller_groups_too() -> None:
    formats: list[Format] = [IntFormat(1, 128), TernaryFormat(128), *(IntFormat(b, 128) for b in range(2, 9))]
    errors = gaussian_errors(formats)
    assert np.all(errors > 0) and np.all(np.diff(errors) < 0)
    fine, coarse = gaussian_errors([IntFormat(3, 32), IntFormat(3, 256)])
    assert fine < coarse


@pytest.mark.parametrize(
    ("target", "least"),
    # Of the best even quantizers of a Gaussian (Max, Quantizing for minimum distortion, 1960, table II).
    [
        (IntFormat(1, 128), 0.3634),
        (TernaryFormat(128), 0.1902),
        (IntFormat(2, 128), 0.1188),
        (IntFormat(3, 128), 0.03744),
        (IntFormat(4, 128), 0.01154),
    ],
    ids=lambda own: getattr(own, "name", ""),
)
def test_errors_are_about_the_least_that_even_levels_can_have(target: Format, least: float) -> None:
    """A group's own scale is a little better than one for all."""
    assert 0.85 * least < gaussian_errors([target])[0] < least


@pytest.mark.parametrize("target", [IntFormat(4, 128), TernaryFormat(64)], ids=lambda own: own.name)
def test_an_error_is_that_of_the_rounded_weights(target: IntFormat | TernaryFormat) -> None:
    weight = jax.random.normal(jax.random.key(5), (256, 1024))
    rounded = to_numpy(quantize(weight, jnp.ones(1024), target))
    exact = np.asarray(weight, np.float64)
    expected = np.sum((exact - rounded) ** 2) / np.sum(exact**2)
    assert gaussian_errors([IntFormat(1, 32), target], seed=5)[1] == pytest.approx(expected, rel=1e-4)


def test_a_weight_costs_its_sensitivity_times_the_formats_error(
    model: DeepseekV3, costs: Menus, sensitivity: Sensitivity, relative_F: np.ndarray
) -> None:
    allowed = options(model, RECIPE).tensors.cost_NF
    for name, cost_F, allowed_F in zip(costs.names, costs.tensors.cost_NF, allowed, strict=True):
        expected_F = np.where(allowed_F == 0, sensitivity.of(name, model.config) * relative_F, np.inf)
        np.testing.assert_allclose(cost_F, expected_F, rtol=1e-9, err_msg=name)
        assert cost_F[-1] == 0 and np.any(cost_F[:-1] > 0)


def test_a_layers_experts_cost_its_sensitivity_times_the_formats_error_together(
    model: DeepseekV3, costs: Menus, scores: ExpertScores, sensitivity: Sensitivity, relative_F: np.ndarray
) -> None:
    for block, name in [(block, name) for block in (1, 2) for name in PROJECTIONS]:
        cost_EF = costs.experts[block].menus[name].cost_NF
        of_layer = sensitivity.of(f"layers.{block}.mlp.experts.{name}", model.config)
        np.testing.assert_allclose(cost_EF.sum(axis=0), of_layer * relative_F, rtol=1e-9)
        importance_E = scores.importance(block)
        np.testing.assert_allclose(cost_EF[:, 2] / cost_EF[0, 2], importance_E / importance_E[0], rtol=1e-9)
        assert costs.experts[block].menus[name].formats[-1] == KEEP and np.all(cost_EF[:, -1] == 0)


def test_pruning_costs_in_proportion_to_the_importance_lost(
    model: DeepseekV3, costs: Menus, scores: ExpertScores, sensitivity: Sensitivity
) -> None:
    for block in (1, 2):
        menu, importance_E = costs.experts[block], scores.importance(block)
        assert menu.pruning_cost[0] == 0 and len(menu.pruning_cost) == len(menu.order) + 1 == 7
        down = sensitivity.of(f"layers.{block}.mlp.experts.down", model.config)
        each = down / gaussian_errors([TernaryFormat(128)])[0] * REROUTING_RATIO * PRUNING_OVER_ROUNDING
        np.testing.assert_allclose(np.diff(menu.pruning_cost), each * importance_E[menu.order], rtol=1e-9)


def test_mtp_blocks_count_like_the_last_layer(costs: Menus) -> None:
    own, last = costs.experts[3], costs.experts[2]
    np.testing.assert_array_equal(own.order, last.order)
    np.testing.assert_allclose(own.pruning_cost, last.pruning_cost)
    for name in PROJECTIONS:
        np.testing.assert_allclose(own.menus[name].cost_NF, last.menus[name].cost_NF)
    row_of = dict(zip(costs.names, costs.tensors.cost_NF, strict=True))
    for name in ("self_attn.o", "self_attn.k_b"):
        np.testing.assert_allclose(row_of[f"mtp.0.block.{name}"], row_of[f"layers.2.{name}"])
    np.testing.assert_allclose(row_of["mtp.0.eh_proj"], row_of["layers.2.self_attn.o"])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_experts_go_by_the_criterion_as_far_as_gate_weights_tell(
    model: DeepseekV3, scores: ExpertScores, sensitivity: Sensitivity, criterion: str
) -> None:
    recipe = replace(RECIPE, criterion=criterion)
    estimated = estimate_costs(options(model, recipe), model, recipe, scores, sensitivity)
    by_gate = criterion in ("frequency", "paper", "gate_mass")
    assert criterion_of(recipe) == (criterion if by_gate else "squared gate weights")
    for block, menu in estimated.experts.items():
        found = gate_scores(scores.count[block], scores.gate_mass[block]).get(criterion, scores.importance(block))
        assert np.all(np.diff(found[menu.order]) > 0)


def test_equal_groups_go_in_rounds_and_any_number_has_a_cost(
    model: DeepseekV3, scores: ExpertScores, sensitivity: Sensitivity
) -> None:
    recipe = Recipe(groups="equal")
    menu = estimate_costs(options(model, recipe), model, recipe, scores, sensitivity).experts[1]
    assert all(sorted(own // 4) == [0, 1, 2] for own in (menu.order[:3], menu.order[3:]))
    assert np.all(np.isfinite(menu.pruning_cost))


def test_experts_taken_to_be_alike_cost_alike(model: DeepseekV3, sensitivity: Sensitivity) -> None:
    scores = equal_scores(model.config)
    menu = estimate_costs(options(model, RECIPE), model, RECIPE, scores, sensitivity).experts[1]
    np.testing.assert_allclose(menu.pruning_cost, np.arange(7) * menu.pruning_cost[1], rtol=1e-9)
    for own in menu.menus.values():
        np.testing.assert_array_equal(own.cost_NF, np.tile(own.cost_NF[:1], (12, 1)))


def test_rounded_experts_lose_more_together_than_one_by_one() -> None:
    assert ESTIMATED_CURVES.experts(0.176) == pytest.approx(0.306)
    assert ESTIMATED_CURVES.others(0.3) == ESTIMATED_CURVES.pruning(0.3) == 0.3
    totals = np.linspace(0.01, 0.5, 50)
    assert np.all(np.diff([ESTIMATED_CURVES.experts(float(total)) for total in totals]) > 0)
