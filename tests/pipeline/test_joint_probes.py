"""Points of the curves, made again by hand: plans that round or prune one family of weights in the whole model."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from moejax.pipeline.compress import Prepared
from moejax.pipeline.options import quantizable
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS

EVERY = tuple(range(12))


def plan_of(
    prepared: Prepared, others: str = KEEP, experts: str = KEEP, keep: Mapping[int, Sequence[int]] | None = None
) -> Plan:
    """All layers alike, the MTP block as it is."""
    names = list(quantizable(prepared.model))
    blocks = []
    for layer in range(3):
        own = [name.removeprefix(f"layers.{layer}.") for name in names if name.startswith(f"layers.{layer}.")]
        formats = dict.fromkeys(own, others) if others != KEEP else {}
        if layer == 0:
            blocks.append(BlockPlan(formats))
            continue
        kept = tuple(keep[layer]) if keep else EVERY
        blocks.append(BlockPlan(formats, kept, dict.fromkeys(PROJECTIONS, (experts,) * len(kept)), 3))
    untouched = BlockPlan({}, EVERY, dict.fromkeys(PROJECTIONS, (KEEP,) * 12), 3)
    return Plan(others, others, (*blocks, untouched))


def assert_is_a_point(prepared: Prepared, family: str, total: float, plan: Plan) -> None:
    points = getattr(prepared.problem.curves, family).points
    together = {round(own, 9): value for own, value in points}
    assert round(total, 9) in together, (total, points)
    assert together[round(total, 9)] == pytest.approx(prepared.trial.divergence(plan), rel=1e-3)


def test_every_family_has_points_whose_sums_and_divergences_rise(prepared: Prepared) -> None:
    curves = prepared.problem.curves
    for curve, most in ((curves.others, 3), (curves.experts, 3), (curves.pruning, 2)):
        assert 1 <= len(curve.points) <= most
        assert np.all(np.diff(np.asarray(curve.points), axis=0) > 0)


@pytest.mark.parametrize("target", ["int2g128", "int3g128"])
def test_all_weights_outside_the_experts_at_once(prepared: Prepared, target: str) -> None:
    costs = prepared.costs
    cost_N = costs.tensors.cost_NF[:, costs.tensors.formats.index(target)]
    total = sum(cost for name, cost in zip(costs.names, cost_N, strict=True) if not name.startswith("mtp."))
    assert_is_a_point(prepared, "others", total, plan_of(prepared, others=target))


@pytest.mark.parametrize("target", ["int1g128", "int2g128"])
def test_all_experts_at_once(prepared: Prepared, target: str) -> None:
    menus = [menu for block in (1, 2) for menu in prepared.costs.experts[block].menus.values()]
    total = sum(float(menu.cost_NF[:, menu.formats.index(target)].sum()) for menu in menus)
    assert_is_a_point(prepared, "experts", total, plan_of(prepared, experts=target))


@pytest.mark.parametrize("pruned", [3, 6])
def test_half_and_all_of_what_can_be_pruned(prepared: Prepared, pruned: int) -> None:
    menus = {block: prepared.costs.experts[block] for block in (1, 2)}
    keep = {block: np.setdiff1d(EVERY, menu.order[:pruned]).tolist() for block, menu in menus.items()}
    total = sum(float(menu.pruning_cost[pruned]) for menu in menus.values())
    assert_is_a_point(prepared, "pruning", total, plan_of(prepared, keep=keep))
