import numpy as np
import pytest

from moejax.model import config_from_hf
from moejax.pipeline.forecast import LayerForecast, layer_forecasts
from moejax.planning import BlockPlan, Plan
from moejax.planning.expert_scores import ExpertScores, equal_scores
from small_checkpoint import CONFIG as RAW_CONFIG

CONFIG = config_from_hf(RAW_CONFIG)


def plan_of(*blocks: BlockPlan) -> Plan:
    return Plan("keep", "keep", blocks)


def test_a_layer_in_figures() -> None:
    mass, count = np.arange(1.0, 13.0), np.asarray([5.0] * 6 + [15.0] * 6)
    scores = ExpertScores({1: mass}, {1: count}, "made up")
    plan = plan_of(BlockPlan(), BlockPlan(keep=(0, 1, 5, 8, 9, 11), experts_per_token=2))
    (layer,) = layer_forecasts(plan, CONFIG, scores)
    # Experts 0-3, 4-7 and 8-11 are groups.
    assert (layer.block, layer.kept_per_group, layer.kept, layer.experts_per_token) == (1, (2, 1, 3), 6, 2)
    assert layer.gate_mass_kept == pytest.approx((1 + 2 + 6 + 9 + 10 + 12) / 78)
    assert layer.choices_kept == pytest.approx((3 * 5 + 3 * 15) / 120)


def test_blocks_without_experts_have_none_and_no_k_is_the_models() -> None:
    every = BlockPlan(keep=tuple(range(12)))
    layers = layer_forecasts(plan_of(BlockPlan(), every, every, every), CONFIG, equal_scores(CONFIG))
    assert [layer.block for layer in layers] == [1, 2, 3]
    for layer in layers:
        assert layer == LayerForecast(layer.block, (4, 4, 4), 3, pytest.approx(1), pytest.approx(1))  # type: ignore[arg-type]


def test_empty_groups_are_counted() -> None:
    plan = plan_of(BlockPlan(), BlockPlan(keep=(4, 5)))
    assert layer_forecasts(plan, CONFIG, equal_scores(CONFIG))[0].kept_per_group == (0, 2, 0)
