"""Counts in multiples against every way to have them, of instances small enough to try all."""

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from frontier import Frontier, both, efficient, rows_frontier
from moejax.planning.bucket_counts import exchanged, solve_in_multiples
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import KEEP, PROJECTIONS
from moejax.planning.solve import Choice, choice_bytes, choice_losses, menu_survivors, solve

Array = NDArray[Any]

FORMATS = ("int1g32", "int2g32", "int4g32", KEEP)
LAYERS = 9


def expert_menu(random: np.random.RandomState, num_experts: int, alike: bool) -> Menu:
    """Bytes and formats allowed are those of all experts. If they are `alike`, costs are a figure of the expert times
    one of the format."""
    bytes_F = np.sort(random.randint(1, 30, len(FORMATS)))
    cost_EF = random.exponential(size=(num_experts, 1)) * -np.sort(-random.exponential(size=len(FORMATS)))
    if not alike:
        cost_EF = cost_EF * np.exp(random.normal(size=cost_EF.shape))
    cost_EF[:, :-1][:, random.rand(len(FORMATS) - 1) < 0.15] = np.inf
    cost_EF[:, -1] = 0
    return Menu(FORMATS, np.tile(bytes_F, (num_experts, 1)), cost_EF)


def random_costs(seed: int, multiple: int, blocks: int, num_experts: int, alike: bool = True) -> Menus:
    """Some weights, and blocks of experts of which multiples may stay, or all, but at least two."""
    random = np.random.RandomState(seed)
    rows = random.randint(0, 4)
    sizes = np.sort(random.randint(1, 30, (rows, len(FORMATS))), axis=1)
    tensors = Menu(FORMATS, sizes, -np.sort(-random.exponential(size=sizes.shape), axis=1))
    experts = {}
    for block in range(3, 3 + blocks):
        menus = {name: expert_menu(random, num_experts, alike) for name in PROJECTIONS}
        order = random.permutation(num_experts)[: max(num_experts - 2, 0)]
        kept = num_experts - np.arange(len(order) + 1)
        cost = np.concatenate([[0.0], np.cumsum(random.exponential(size=len(order)))])
        allowed = (kept % multiple == 0) | (kept == num_experts)
        experts[block] = ExpertMenu(menus, order, np.where(allowed, cost, np.inf))
    return Menus(tuple(f"layers.{n}.mlp.up" for n in range(rows)), tensors, experts, LAYERS)


def without_pruning(costs: Menus) -> Menus:
    experts = {block: ExpertMenu(menu.menus, np.zeros(0, int), np.zeros(1)) for block, menu in costs.experts.items()}
    return Menus(costs.names, costs.tensors, experts, costs.num_layers)


def budget_at(costs: Menus, share: float) -> int:
    """Between the smallest choice that prunes as many as may go, or none, and everything as it is."""
    menus = [costs.tensors, *(own for menu in costs.experts.values() for own in menu.menus.values())]
    return round(sum(float(np.sum(own.bytes_NF[:, -1])) for own in menus) * share)


def counts_of(costs: Menus, choice: Choice) -> Iterator[tuple[int, Array]]:
    """Of every projection how many experts stay, and how many have each format."""
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        for name in PROJECTIONS:
            yield len(kept), np.bincount(choice.expert[block][name][kept], minlength=len(FORMATS))


def are_multiples(counts: Sequence[int] | Array, multiple: int) -> bool:
    """All of them, but for one, which has the remainder."""
    remainders = [int(own) % multiple for own in counts if own % multiple]
    return remainders == ([sum(counts) % multiple] if sum(counts) % multiple else [])


instances = {
    "seed": st.integers(0, 10**6),
    "multiple": st.sampled_from([2, 3, 4, 8]),
    "blocks": st.integers(1, 2),
    "num_experts": st.integers(4, 17),
    "alike": st.booleans(),
    "share": st.floats(0, 1),
    "pruning_weight": st.sampled_from([1.0, 0.3, np.inf]),
}


@given(**instances)
@settings(max_examples=80)
def test_counts_are_multiples_within_the_budget_and_the_experts_kept_are_the_solvers(
    seed: int, multiple: int, blocks: int, num_experts: int, alike: bool, share: float, pruning_weight: float
) -> None:
    costs = random_costs(seed, multiple, blocks, num_experts, alike)
    budget = budget_at(costs, share)
    free = solve(costs, budget, pruning_weight)
    choice = solve_in_multiples(costs, budget, pruning_weight, multiple)
    assert (choice is None) == (free is None)
    if choice is None or free is None:
        return
    assert choice_bytes(costs, choice) <= budget
    assert np.isfinite(sum(choice_losses(costs, choice)))
    assert choice.pruned == free.pruned
    for kept, counts in counts_of(costs, choice):
        assert kept % multiple == 0 or kept == num_experts
        assert sum(counts) == kept and are_multiples(counts, multiple)


@given(**{name: own for name, own in instances.items() if name != "multiple"})
def test_multiples_of_one_are_what_the_solver_says(
    seed: int, blocks: int, num_experts: int, alike: bool, share: float, pruning_weight: float
) -> None:
    costs = random_costs(seed, 1, blocks, num_experts, alike)
    budget = budget_at(costs, share)
    free, choice = solve(costs, budget, pruning_weight), solve_in_multiples(costs, budget, pruning_weight, 1)
    assert (choice is None) == (free is None)
    if choice is not None and free is not None:
        assert choice.pruned == free.pruned
        np.testing.assert_array_equal(choice.tensor_N, free.tensor_N)
        np.testing.assert_equal(choice.expert, free.expert)


def frontier(costs: Menus, multiple: int) -> Frontier:
    """Every number of bytes that some choice with such counts takes, with the least cost among those choices."""
    total = both({0: 0.0}, rows_frontier(costs.tensors, range(len(costs.names))))
    for menu in costs.experts.values():
        for name in PROJECTIONS:
            total = both(total, projection_frontier(menu.menus[name], multiple))
    return {size: cost for size, cost in total.items() if np.isfinite(cost)}


def projection_frontier(menu: Menu, multiple: int) -> Frontier:
    found: Frontier = {}
    rows = np.arange(len(menu.cost_NF))
    for formats in product(range(len(FORMATS)), repeat=len(rows)):
        if are_multiples(np.bincount(formats, minlength=len(FORMATS)), multiple):
            size = int(np.sum(menu.bytes_NF[rows, formats]))
            found[size] = min(found.get(size, np.inf), float(np.sum(menu.cost_NF[rows, formats])))
    return found


@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(2, 4), (2, 6), (3, 6)]))
@settings(max_examples=25, deadline=None)
def test_the_optimum_itself_where_costs_are_products_and_the_budget_is_that_of_an_efficient_choice(
    seed: int, shape: tuple[int, int]
) -> None:
    multiple, num_experts = shape
    costs = without_pruning(random_costs(seed, multiple, 1, num_experts))
    for size, cost in efficient(frontier(costs, multiple)):
        choice = solve_in_multiples(costs, size, 1.0, multiple)
        assert choice is not None
        assert sum(choice_losses(costs, choice)) == pytest.approx(cost, abs=1e-9)


@given(seed=st.integers(0, 10**6), formats=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_experts_exchange_their_formats_as_well_as_can_be(seed: int, formats: list[int]) -> None:
    """Whatever the costs; others' may be infinite."""
    cost_NF = np.random.RandomState(seed).exponential(size=(len(formats), 5))
    cost_NF[:, 4] = np.inf
    rows = np.arange(len(formats))
    found = exchanged(cost_NF, np.asarray(formats))
    assert sorted(found.tolist()) == sorted(formats)
    least = min(float(np.sum(cost_NF[rows, own])) for own in set(permutations(formats)))
    assert float(np.sum(cost_NF[rows, found])) == pytest.approx(least, rel=1e-9)


def test_nobody_exchanges_where_nothing_is_gained() -> None:
    formats = np.asarray([2, 0, 2, 1])
    assert exchanged(np.ones((4, 3)), formats).tolist() == formats.tolist()
    assert exchanged(np.zeros((4, 3)), formats).tolist() == formats.tolist()


def test_the_remainder_has_the_format_of_those_that_rounding_costs_least() -> None:
    bytes_NF = np.tile([1, 10], (7, 1))
    cost_NF = np.asarray([[cost, 0.0] for cost in (5.0, 1, 6, 2, 7, 3, 4)])
    menu = ExpertMenu(
        {name: Menu(("int1g32", KEEP), bytes_NF, cost_NF) for name in PROJECTIONS}, np.zeros(0, int), np.zeros(1)
    )
    none = Menu(("int1g32", KEEP), np.zeros((0, 2), int), np.zeros((0, 2)))
    choice = solve_in_multiples(Menus((), none, {3: menu}, LAYERS), 3 * (3 * 10 + 4), 1.0, 3)
    assert choice is not None
    assert choice.expert[3]["gate"].tolist() == [1, 0, 1, 0, 1, 0, 0]


def test_all_have_one_format_where_there_are_fewer_than_the_number() -> None:
    costs = without_pruning(random_costs(1, 8, 2, 5))
    for share in (0.5, 0.8, 1.0):
        choice = solve_in_multiples(costs, budget_at(costs, share), 1.0, 8)
        assert choice is not None and all(max(counts) == 5 for _, counts in counts_of(costs, choice))
