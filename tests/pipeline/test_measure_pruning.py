from collections.abc import Iterable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.calibrate import Statistics
from moejax.calibrate.statistics import ExpertStatistics
from moejax.model import named_leaves
from moejax.model.moe import MoE
from moejax.pipeline import measure_pruning as measurement
from moejax.pipeline.compress import Prepared
from moejax.pipeline.measure_pruning import LayerPruning, PruningProbe, measure_pruning, with_pruning
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.trial import Trial
from moejax.pipeline.working_copy import with_leaves
from moejax.progress import silent
from moejax.transforms.prune import CRITERIA, masked_bias, pruning_scores
from moejax.transforms.pruning_error import PruningError

# One probe a layer, which is as few as there can be.
HALF = Recipe(share_kept=0.5)


def experts_of(statistics: Statistics, block: int) -> ExpertStatistics:
    sums = statistics.blocks[block].experts
    assert sums is not None
    return sums


def masked(prepared: Prepared, probe: PruningProbe) -> MoE:
    """The layer of a probe with its experts masked by hand, seen by the probe's tokens."""
    block, pruned = prepared.trial.probe.blocks[probe.block], prepared.pruning[probe.block].order[: probe.pruned]
    bias = masked_bias(named_leaves(block)["mlp.bias"], np.isin(np.arange(12), pruned))
    mlp = with_leaves(block, {"mlp.bias": bias}).mlp
    assert isinstance(mlp, MoE)
    return mlp


def every_probe(prepared: Prepared) -> list[PruningProbe]:
    return [probe for own in prepared.pruning.values() for probe in own.probes]


def test_experts_go_in_the_order_in_which_reap_needs_them_least(prepared: Prepared) -> None:
    # Of 24 peaks only the largest is above the 99.5th percentile: one expert is spared.
    peaks = {index: np.asarray(experts_of(prepared.trial.statistics, index).peak_E) for index in (1, 2)}
    spared = max((float(peak), index, e) for index, peak_E in peaks.items() for e, peak in enumerate(peak_E))[1:]
    for index, menu in prepared.costs.experts.items():
        score_E = pruning_scores(experts_of(prepared.trial.statistics, index), "reap")
        assert (index, spared[1]) != spared or spared[1] not in menu.order
        assert np.all(np.diff(score_E[menu.order]) >= 0)
        for group in range(3):
            kept = np.setdiff1d(np.arange(4 * group, 4 * group + 4), menu.order)
            gone = np.intersect1d(np.arange(4 * group, 4 * group + 4), menu.order)
            needed = [e for e in kept if (index, e) != spared]
            assert len(kept) == 2 and score_E[needed].min() >= score_E[gone].max()


def test_pruning_costs_what_masking_does(prepared: Prepared) -> None:
    for index in (1, 2):
        menu, block = prepared.costs.experts[index], prepared.trial.probe.blocks[index]
        assert len(menu.pruning_cost) == len(menu.order) + 1 == 7
        assert menu.pruning_cost[0] == 0 and np.all(np.diff(menu.pruning_cost) >= 0) and menu.pruning_cost[1] > 0
        bias = masked_bias(named_leaves(block)["mlp.bias"], np.isin(np.arange(12), menu.order))
        divergence = prepared.trial.probe.divergence_of_block(index, with_leaves(block, {"mlp.bias": bias}))
        assert menu.pruning_cost[-1] == pytest.approx(divergence, rel=1e-3)


def test_every_count_of_a_small_layer_is_probed(prepared: Prepared) -> None:
    assert [(probe.block, probe.pruned) for probe in every_probe(prepared)] == [
        (block, count) for block in (1, 2) for count in range(1, 7)
    ]
    assert not prepared.pruning[3].probes


def test_a_probes_divergence_is_that_of_masking_by_hand(prepared: Prepared) -> None:
    for probe in every_probe(prepared)[::3]:
        block = prepared.trial.probe.blocks[probe.block]
        bias = named_leaves(masked(prepared, probe))["bias"]
        changed = with_leaves(block, {"mlp.bias": bias})
        found = prepared.trial.probe.divergence_of_block(probe.block, changed)
        assert probe.divergence == pytest.approx(found, rel=1e-3)


def test_a_probes_errors_are_those_of_the_layers_outputs(prepared: Prepared) -> None:
    for probe in every_probe(prepared)[::3]:
        x_TD = prepared.trial.probe.experts_input(probe.block)
        assert x_TD.shape == (512, 128)
        original, without = prepared.trial.probe.blocks[probe.block].mlp, masked(prepared, probe)
        assert isinstance(original, MoE)
        routing = original.route(x_TD)
        y_TD, changed_TD = (
            np.asarray(moe.experts(x_TD, moe.route(x_TD))[0], np.float64) for moe in (original, without)
        )
        lost_TK = np.isin(routing.experts_TK, prepared.pruning[probe.block].order[: probe.pruned])
        weights_TK = np.asarray(routing.weights_TK, np.float64)
        assert probe.error.rerouted == pytest.approx(np.sum((changed_TD - y_TD) ** 2) / np.sum(y_TD**2), rel=1e-3)
        assert probe.error.gate_lost == pytest.approx(weights_TK[lost_TK].sum() / weights_TK.sum(), rel=1e-4)
        gate2_lost = (weights_TK[lost_TK] ** 2).sum() / (weights_TK**2).sum()
        assert probe.error.gate2_lost == pytest.approx(gate2_lost, rel=1e-4)
        assert probe.rerouting_ratio == pytest.approx(probe.error.rerouted / gate2_lost, rel=1e-4)
        assert all(isinstance(value, float) for value in probe.error)


def test_nothing_lost_is_no_ratio_to_divide_by() -> None:
    nothing = PruningProbe(1, 1, 0.0, PruningError(0.0, 0.0, 0.0, 0.0))  # type: ignore[arg-type]
    assert nothing.rerouting_ratio == 0


@given(st.lists(st.floats(-1e-6, 10, allow_subnormal=False), min_size=1, max_size=6), st.integers(0, 20))
def test_costs_between_probes_never_fall(divergences: list[float], more: int) -> None:
    error = PruningError(*[jnp.float32(0)] * 4)
    counts = np.cumsum(np.arange(1, len(divergences) + 1))
    probes = tuple(PruningProbe(1, int(n), kl, error) for n, kl in zip(counts, divergences, strict=True))
    cost = measurement._interpolated(probes, int(counts[-1]) + more)
    assert cost.shape == (counts[-1] + more + 1,) and cost[0] == 0
    assert np.all(np.diff(cost) >= 0)
    for n, kl in zip(counts, np.maximum.accumulate([max(divergences[0], 0.0), *divergences[1:]]), strict=True):
        assert cost[n] == max(kl, 0.0)
    if len(counts) > 1:
        assert cost[2] == pytest.approx((cost[1] + cost[3]) / 2)


def test_mtp_blocks_take_the_last_layers_costs(prepared: Prepared) -> None:
    np.testing.assert_array_equal(prepared.pruning[3].cost, prepared.pruning[2].cost)
    assert not np.array_equal(prepared.pruning[2].cost, prepared.pruning[1].cost)


def test_where_more_of_an_mtp_blocks_experts_can_go_the_last_known_cost_holds(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    spared = {2: np.isin(np.arange(12), [0, 1, 2]), 3: np.zeros(12, bool), 1: np.zeros(12, bool)}
    monkeypatch.setattr(measurement, "super_experts", lambda peaks, layers: spared)
    monkeypatch.setattr(measurement, "_PROBES", 1)
    monkeypatch.setattr(measurement, "_probed_counts", lambda allowed: [len(allowed) - 1])
    pruning = measure_pruning(prepared.trial, Recipe(), silent)
    assert [len(pruning[block].cost) for block in (1, 2, 3)] == [7, 6, 7]
    np.testing.assert_array_equal(pruning[3].cost[:6], pruning[2].cost)
    assert pruning[3].cost[6] == pruning[2].cost[5] == pytest.approx(5 * pruning[2].cost[1])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_experts_go_in_the_order_of_the_recipes_criterion(prepared: Prepared, criterion: str) -> None:
    recipe = replace(HALF, criterion=criterion, protect_super_experts=False)
    orders = set()
    for index, own in measure_pruning(prepared.trial, recipe, silent).items():
        score_E = pruning_scores(experts_of(prepared.trial.statistics, index), criterion)
        assert np.all(np.diff(score_E[own.order]) >= 0) and len(own.order) == 6
        orders.add(tuple(own.order.tolist()))
    assert len(orders) == 3


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        (HALF, {6}),
        (Recipe(share_kept=0.7), {3}),
        (Recipe(groups="equal", share_kept=0.6), {3}),
        (Recipe(groups="equal"), {0, 3, 6}),
        (Recipe(share_kept=1.0), {0}),
    ],
    ids=["half", "0.7", "equal and 0.6", "equal", "all"],
)
def test_only_counts_that_the_recipe_allows_have_a_cost(prepared: Prepared, recipe: Recipe, counts: set[int]) -> None:
    for block, own in measure_pruning(prepared.trial, recipe, silent).items():
        assert set(np.flatnonzero(np.isfinite(own.cost)).tolist()) == counts
        assert [probe.pruned for probe in own.probes] == (sorted(counts - {0}) if block < 3 else [])
        for probe in own.probes:
            assert own.cost[probe.pruned] == max(probe.divergence, 0) > 0
        if recipe.groups == "equal":
            for count in counts:
                assert len(set(np.bincount(own.order[:count] // 4, minlength=3).tolist())) == 1


def with_peaks(trial: Trial, expert: int) -> Trial:
    """The trial with a layer 1 in which one expert's largest output is far above all others'."""
    sums = experts_of(trial.statistics, 1)
    peaks = replace(sums, peak_E=sums.peak_E.at[expert].set(1e4))
    blocks = list(trial.statistics.blocks)
    blocks[1] = replace(blocks[1], experts=peaks)
    return replace(trial, statistics=replace(trial.statistics, blocks=type(trial.statistics.blocks)(blocks)))


def test_super_experts_stay_however_little_they_are_needed(prepared: Prepared) -> None:
    first = int(prepared.pruning[1].order[0])
    trial = with_peaks(prepared.trial, first)
    spared = measure_pruning(trial, HALF, silent)
    assert first not in spared[1].order and len(spared[1].order) == 6
    free = measure_pruning(trial, replace(HALF, protect_super_experts=False), silent)
    assert free[1].order[0] == first
    # One peak so high leaves no other expert above a tenth of it.
    np.testing.assert_array_equal(spared[2].order, free[2].order)


def test_progress_is_told_layer_by_layer(prepared: Prepared) -> None:
    told = []

    def progress(steps: Iterable[int], description: str, /) -> Iterable[int]:
        told.append((description, list(steps)))
        return told[-1][1]

    measure_pruning(prepared.trial, Recipe(share_kept=1.0), progress)  # type: ignore[arg-type]
    assert told == [("measuring pruning", [1, 2, 3])]


def test_costs_take_on_what_was_measured(prepared: Prepared) -> None:
    own = {block: LayerPruning(np.asarray([block]), np.asarray([0.0, 7.0]), ()) for block in (1, 2, 3)}
    costs = with_pruning(prepared.costs, own)
    for block, menu in costs.experts.items():
        assert (menu.order.tolist(), menu.pruning_cost.tolist()) == ([block], [0.0, 7.0])
        assert menu.menus is prepared.costs.experts[block].menus
    assert costs.tensors is prepared.costs.tensors
