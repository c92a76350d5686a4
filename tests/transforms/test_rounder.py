"""Experts are rounded as each would be alone, however many are taken together."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import ExpertStatistics, unseen_experts
from moejax.formats import ExpertWeights
from moejax.model import named_leaves
from moejax.planning import KEEP
from moejax.sharding import Crew
from moejax.transforms import error_feedback, rounder
from moejax.transforms.error_feedback import rows_together
from moejax.transforms.rounder import AFRESH, Afresh, Projection, Wanted, experts_together, few_experts, some_rows
from moejax.transforms.rounding import to_float32
from seen_by_blocks import statistics_with_hessians
from small_models import CONFIG, small_model

GB = 10**9
WIDE = (256, 2048, 7168)


def statistics(hessians: str) -> ExpertStatistics:
    """Of experts with Hessians of their own, with their layer's, or with none."""
    if hessians == "none":
        return unseen_experts(CONFIG)
    own = statistics_with_hessians().blocks[1].experts
    assert own is not None
    return replace(own, x_EDD=()) if hessians == "shared" else own


@pytest.mark.parametrize("hessians", ["own", "shared", "none"])
@pytest.mark.parametrize("large", [1, 1 << 30])
def test_experts_are_rounded_as_each_alone(hessians: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, by powers of two, and beside some that are rounded already."""
    monkeypatch.setattr(rounder, "_LARGE", large)
    weights = named_leaves(small_model().layers[1])["mlp.experts.gate"]
    assert isinstance(weights, ExpertWeights)
    of = Projection("layers.1.mlp.experts.gate", range(weights.num_experts), weights, statistics(hessians))
    assert of.shares_hessian == (hessians == "shared")
    some = [3, *range(3), *range(4, weights.num_experts - 1)]
    together, *each = AFRESH.experts([Wanted(of, own, "int3g32") for own in (some, *([k] for k in some))])
    assert len(together) == len(some)
    for own, (alone,) in zip(together, each, strict=True):
        np.testing.assert_allclose(to_float32(own), to_float32(alone), atol=1e-6)


@pytest.mark.parametrize("hessians", ["own", "shared", "none"])
def test_devices_round_to_the_same_bits(hessians: str) -> None:
    """Whatever comes to each of them."""
    weights = named_leaves(small_model().layers[1])["mlp.experts.down"]
    assert isinstance(weights, ExpertWeights)
    of = Projection("layers.1.mlp.experts.down", range(weights.num_experts), weights, statistics(hessians))
    wanted = [
        Wanted(of, range(weights.num_experts), "int3g32"),
        Wanted(of, [1], "ternaryg32"),
        Wanted(of, [2, 0], KEEP),
    ]
    devices = Afresh(Crew(tuple(jax.devices()[1:4]))).experts([*wanted, *wanted[:2]])
    one = AFRESH.experts([*wanted, *wanted[:2]])
    chex.assert_trees_all_equal(devices, one)
    assert all(own.devices() == {jax.devices()[0]} for own in jax.tree.leaves(devices))


def test_some_rows_are_those_of_all_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.RandomState(0).normal(size=(30, 8)).astype(np.float32)
    monkeypatch.setattr(rounder, "MOST_NUMBERS", 64)  # in parts
    row_R = np.asarray([29, 0, 7, 7, 8])
    assert np.array_equal(some_rows(jnp.asarray(weight), row_R), weight[row_R])
    assert np.array_equal(some_rows(jnp.asarray(weight.reshape(3, 10, 8)), row_R), weight[row_R])


def test_an_accelerator_takes_more_together_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = experts_together(WIDE), rows_together(7168)
    assert before == (few_experts(WIDE), error_feedback.MOST_ROWS) == (1, 8192)
    for module in (rounder, error_feedback):
        monkeypatch.setattr(module, "accelerator_memory", lambda: 100 * GB)
    assert experts_together(WIDE) == 31 and rows_together(7168) // 2048 == 35
    assert few_experts(WIDE) == 1
    for module in (rounder, error_feedback):
        monkeypatch.setattr(module, "accelerator_memory", lambda: GB // 10)
    assert experts_together(WIDE) == 1 and rows_together(7168) == error_feedback.MOST_ROWS
