"""The budget solver against the exact optimum of small instances, found by dynamic programming over bytes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from frontier import Frontier, both, efficient, rows_frontier
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import KEEP, PROJECTIONS
from moejax.planning.predict import Losses
from moejax.planning.solve import Choice, _spend_rest, choice_bytes, choice_losses, menu_survivors, solve

Array = NDArray[Any]

FORMATS = ("int1g32", "int2g32", "int4g32", KEEP)
# More than any block has: none is an MTP block.
LAYERS = 9


def random_menu(random: np.random.RandomState, rows: int, ordered: bool) -> Menu:
    """KEEP costs nothing; other formats cost the less the more bytes they take, if `ordered`, or anything."""
    bytes_NF = np.sort(random.randint(1, 30, (rows, len(FORMATS))), axis=1)
    cost_NF = random.exponential(size=(rows, len(FORMATS)))
    if ordered:
        cost_NF = -np.sort(-cost_NF, axis=1)
    cost_NF[:, :-1][random.rand(rows, len(FORMATS) - 1) < 0.15] = np.inf
    cost_NF[:, -1] = 0
    return Menu(FORMATS, bytes_NF, cost_NF)


def random_costs(seed: int, ordered: bool = True) -> Menus:
    """Up to four weights, and up to two blocks of three or four experts, of which two cannot go."""
    random = np.random.RandomState(seed)
    tensors = random_menu(random, random.randint(0, 5), ordered)
    experts = {}
    for block in range(3, 3 + random.randint(0 if len(tensors.cost_NF) else 1, 3)):
        num_experts = random.randint(3, 5)
        menus = {name: random_menu(random, num_experts, ordered) for name in PROJECTIONS}
        order = random.permutation(num_experts)[: num_experts - 2]
        pruning_cost = np.concatenate([[0.0], np.cumsum(2 * random.exponential(size=len(order)))])
        experts[block] = ExpertMenu(menus, order, pruning_cost)
    return Menus(tuple(f"layers.{n}.mlp.up" for n in range(len(tensors.cost_NF))), tensors, experts, LAYERS)


def forbidding(costs: Menus, seed: int) -> Menus:
    """The same where some numbers of experts may not be pruned, but always at least one may."""
    random = np.random.RandomState(seed)
    experts = {}
    for block, menu in costs.experts.items():
        cost = np.where(random.rand(len(menu.pruning_cost)) < 0.5, np.inf, menu.pruning_cost)
        allowed = random.randint(len(cost))
        cost[allowed] = menu.pruning_cost[allowed]
        experts[block] = replace(menu, pruning_cost=cost)
    return replace(costs, experts=experts)


def fewest_pruned(menu: ExpertMenu) -> int:
    return min(n for n, cost in enumerate(menu.pruning_cost) if np.isfinite(cost))


def price_of_pruning(menu: ExpertMenu, pruned: int, weight: float) -> float:
    """At an infinite weight as few go as may, and they cost what they do."""
    cost = float(menu.pruning_cost[pruned])
    if np.isinf(weight):
        return cost if pruned == fewest_pruned(menu) else np.inf
    return weight * cost if np.isfinite(cost) else np.inf


def frontier(costs: Menus, pruning_weight: float = 1.0) -> Frontier:
    """Every number of bytes that some choice takes, with the least cost among those choices."""
    total = both({0: 0.0}, rows_frontier(costs.tensors, range(len(costs.names))))
    for menu in costs.experts.values():
        block: Frontier = {}
        for pruned in range(len(menu.pruning_cost)):
            kept = [e for e in range(menu.num_experts) if e not in menu.order[:pruned]]
            parts: Frontier = {0: price_of_pruning(menu, pruned, pruning_weight)}
            for name in PROJECTIONS:
                parts = both(parts, rows_frontier(menu.menus[name], kept))
            block = {
                size: min(block.get(size, np.inf), parts.get(size, np.inf)) for size in block.keys() | parts.keys()
            }
        total = both(total, block)
    return {size: cost for size, cost in total.items() if np.isfinite(cost)}


def weighted_cost(costs: Menus, choice: Choice, pruning_weight: float) -> float:
    """The cost with pruning at the price it was solved for, counted one weight at a time."""
    total = sum(costs.tensors.cost_NF[n, f] for n, f in enumerate(choice.tensor_N))
    for block, menu in costs.experts.items():
        pruned = choice.pruned[block]
        total += price_of_pruning(menu, pruned, pruning_weight)
        for e in set(range(menu.num_experts)) - set(menu.order[:pruned].tolist()):
            total += sum(menu.menus[name].cost_NF[e, choice.expert[block][name][e]] for name in PROJECTIONS)
    return float(total)


def summed(costs: Menus, choice: Choice) -> float:
    return sum(choice_losses(costs, choice))


def total_bytes(costs: Menus, choice: Choice) -> int:
    total = sum(costs.tensors.bytes_NF[n, f] for n, f in enumerate(choice.tensor_N))
    for block, menu in costs.experts.items():
        for e in set(range(menu.num_experts)) - set(menu.order[: choice.pruned[block]].tolist()):
            total += sum(menu.menus[name].bytes_NF[e, choice.expert[block][name][e]] for name in PROJECTIONS)
    return int(total)


@given(
    seed=st.integers(0, 10**6),
    ordered=st.booleans(),
    share=st.floats(0, 1),
    pruning_weight=st.sampled_from([1.0, 0.5, 0.0, np.inf]),
    forbid=st.booleans(),
)
@settings(max_examples=80)
def test_the_cost_lies_between_the_optimum_and_the_last_efficient_choice_that_fits(
    seed: int, ordered: bool, share: float, pruning_weight: float, forbid: bool
) -> None:
    """At any price per byte the cheapest choice is a corner of the convex hull; the solver finds the last one under the
    budget, and what it does with the rest of the budget can only lower the cost further."""
    costs = random_costs(seed, ordered)
    costs = forbidding(costs, seed) if forbid else costs
    exact = frontier(costs, pruning_weight)
    smallest, largest = min(exact), max(exact)
    budget = round(smallest + share * (largest - smallest))
    choice = solve(costs, budget, pruning_weight)
    assert choice is not None
    assert choice_bytes(costs, choice) == total_bytes(costs, choice) <= budget
    assert summed(costs, choice) == pytest.approx(weighted_cost(costs, choice, 1.0), abs=1e-12)
    cost = weighted_cost(costs, choice, pruning_weight)
    optimum = min(cost for size, cost in exact.items() if size <= budget)
    bound = [cost for size, cost in efficient(exact) if size <= budget][-1]
    assert optimum - 1e-9 <= cost <= bound + 1e-9
    if np.isinf(pruning_weight):
        assert choice.pruned == {block: fewest_pruned(menu) for block, menu in costs.experts.items()}


@given(seed=st.integers(0, 10**6))
def test_the_optimum_itself_where_the_budget_is_that_of_an_efficient_choice(seed: int) -> None:
    costs = random_costs(seed)
    for size, cost in efficient(frontier(costs)):
        choice = solve(costs, size)
        assert choice is not None
        assert summed(costs, choice) == pytest.approx(cost, abs=1e-9)


@given(seed=st.integers(0, 10**6), pruning_weight=st.sampled_from([1.0, np.inf]), forbid=st.booleans())
def test_nothing_fits_below_the_smallest_choice(seed: int, pruning_weight: float, forbid: bool) -> None:
    costs = random_costs(seed)
    costs = forbidding(costs, seed) if forbid else costs
    smallest = min(frontier(costs, pruning_weight))
    assert solve(costs, smallest - 1, pruning_weight) is None
    choice = solve(costs, smallest, pruning_weight)
    assert choice is not None and choice_bytes(costs, choice) == smallest


@given(seed=st.integers(0, 10**6))
def test_everything_is_kept_where_the_budget_is_ample(seed: int) -> None:
    costs = random_costs(seed)
    choice = solve(costs, 10**9)
    assert choice is not None
    assert summed(costs, choice) == 0
    assert not any(choice.pruned.values())


@given(seed=st.integers(0, 10**6))
def test_a_larger_budget_costs_at_most_the_smaller_one_s_last_efficient_choice(seed: int) -> None:
    costs = random_costs(seed)
    exact = frontier(costs)
    bound = np.inf
    for budget in np.linspace(min(exact), max(exact), 12).astype(int).tolist():
        choice = solve(costs, budget)
        assert choice is not None
        assert summed(costs, choice) <= bound + 1e-9
        bound = [cost for size, cost in efficient(exact) if size <= budget][-1]


def test_survivors_are_those_behind_the_pruned_in_the_order() -> None:
    menu = random_menu(np.random.RandomState(0), 5, ordered=True)
    experts = ExpertMenu(dict.fromkeys(PROJECTIONS, menu), np.asarray([3, 0, 4]), np.asarray([0.0, 1, 2, 3]))
    survivors = [menu_survivors(experts, n).tolist() for n in range(4)]
    assert survivors == [[0, 1, 2, 3, 4], [0, 1, 2, 4], [1, 2, 4], [1, 2]]


def test_what_is_left_of_the_budget_buys_the_best_upgrade_that_fits() -> None:
    sizes, costs = np.asarray([[4, 8], [4, 7]]), np.asarray([[9.0, 0], [3.0, 0]])
    choice = solve(Menus(("layers.0.mlp.up", "head"), Menu(("int1g32", KEEP), sizes, costs), {}, LAYERS), 11)
    # The first weight gains more per byte, but has no room; the second one fits.
    assert choice is not None and choice.tensor_N.tolist() == [0, 1]


def test_the_losses_of_mtp_blocks_do_not_count_and_the_others_are_kept_by_family() -> None:
    """Whose weights are solved for all the same: their bytes count."""
    menu = Menu(("int1g32", KEEP), np.asarray([[1, 8]] * 3), np.asarray([[1.0, 0]] * 3))
    experts = ExpertMenu(dict.fromkeys(PROJECTIONS, menu), np.asarray([2, 0]), np.asarray([0.0, 10.0, 30.0]))
    costs = Menus(("head", "layers.0.mlp.up", "mtp.0.eh_proj"), menu, {1: experts, 2: experts}, 2)
    rounded = np.zeros(3, int)
    choice = Choice(rounded, {1: 1, 2: 2}, {block: dict.fromkeys(PROJECTIONS, rounded) for block in (1, 2)})
    assert choice_losses(costs, choice) == Losses(others=2.0, experts=6.0, pruning=10.0)
    assert choice_losses(replace(costs, num_layers=3), choice) == Losses(2.0, 9.0, 40.0)
    assert choice_bytes(costs, choice) == 3 + 6 + 3


def many_costs(random: np.random.RandomState) -> Menus:
    """Weights of very different sizes, so that a budget's rest holds many upgrades of some and none of others; equal
    rows among them."""

    def menu(rows: int) -> Menu:
        bytes_NF = np.sort(np.exp(random.uniform(0, 6, (rows, len(FORMATS)))).astype(int), axis=1)
        cost_NF = random.exponential(size=(rows, len(FORMATS)))
        cost_NF[random.rand(*cost_NF.shape) < 0.1] = np.inf
        cost_NF[:, -1] = 0
        return Menu(FORMATS, np.repeat(bytes_NF, 2, axis=0), np.repeat(cost_NF, 2, axis=0))

    experts = {
        block: ExpertMenu({name: menu(4) for name in PROJECTIONS}, np.asarray([1, 6]), np.asarray([0.0, 1.0, 3.0]))
        for block in (3, 4)
    }
    return Menus(tuple(f"layers.{n}.mlp.up" for n in range(20)), menu(10), experts, LAYERS)


def random_choice(costs: Menus, random: np.random.RandomState) -> Choice:
    def formats(menu: Menu) -> Array:
        return np.argmax(np.where(np.isfinite(menu.cost_NF), random.rand(*menu.cost_NF.shape), -1), axis=1)

    expert = {block: {name: formats(own) for name, own in menu.menus.items()} for block, menu in costs.experts.items()}
    return Choice(formats(costs.tensors), {block: random.randint(3) for block in costs.experts}, expert)


def greedy(costs: Menus, choice: Choice, budget: int) -> Choice:
    """The upgrade that gains most per byte among all that fit, the first of equals, and again until none fits."""
    rows = [(costs.tensors, choice.tensor_N.copy(), [*range(len(costs.names))])]
    for block, own in costs.experts.items():
        kept = [e for e in range(own.num_experts) if e not in own.order[: choice.pruned[block]]]
        rows += [(own.menus[name], choice.expert[block][name].copy(), kept) for name in PROJECTIONS]
    left = budget - total_bytes(costs, choice)
    while True:
        best: tuple[float, int, Array, int, int] | None = None
        for menu, now_N, survivors in rows:
            for n in survivors:
                for f in range(len(FORMATS)):
                    extra = int(menu.bytes_NF[n, f] - menu.bytes_NF[n, now_N[n]])
                    gain = menu.cost_NF[n, now_N[n]] - menu.cost_NF[n, f]
                    if 0 < extra <= left and gain > 0 and (best is None or gain / extra > best[0]):
                        best = (gain / extra, extra, now_N, n, f)
        if best is None:
            break
        _, extra, now_N, n, f = best
        left -= extra
        now_N[n] = f
    raised = [now_N for _, now_N, _ in rows]
    expert = {
        block: dict(zip(PROJECTIONS, raised[1 + 3 * b : 4 + 3 * b], strict=True))
        for b, block in enumerate(costs.experts)
    }
    return Choice(raised[0], choice.pruned, expert)


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.003, 0.03, 0.3, 0.9]))
def test_the_rest_of_a_budget_is_spent_as_plain_greed_does(seed: int, share: float) -> None:
    """From any choice, also where most upgrades do not fit."""
    random = np.random.RandomState(seed)
    costs = many_costs(random)
    choice = random_choice(costs, random)
    start, largest = total_bytes(costs, choice), int(np.sum(costs.tensors.bytes_NF[:, -1])) + 2000
    before = jax.tree.map(np.copy, (choice.tensor_N, choice.expert))
    found, expected = (spend(costs, choice, start + int(share * largest)) for spend in (_spend_rest, greedy))
    np.testing.assert_array_equal(found.tensor_N, expected.tensor_N)
    assert found.pruned == choice.pruned
    jax.tree.map(np.testing.assert_array_equal, found.expert, expected.expert)
    jax.tree.map(np.testing.assert_array_equal, (choice.tensor_N, choice.expert), before)
