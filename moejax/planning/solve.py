"""The budget solver: formats of all weights and experts kept per layer, least predicted cost under a byte budget.

A multiple-choice knapsack by Lagrangian sweep: for a price per byte every weight and every layer decides for itself;
the price is found by bisection, and what is left of the budget buys the best remaining upgrades.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moejax.planning.costs import Costs, ExpertMenu, Menu
from moejax.planning.plan import PROJECTIONS

_BISECTIONS = 60


@dataclass(frozen=True)
class Choice:
    """tensor_N: format index per weight. pruned: experts pruned per block. expert: by block and projection, the format
    index of every expert, (E,), pruned ones included."""

    tensor_N: np.ndarray
    pruned: Mapping[int, int]
    expert: Mapping[int, Mapping[str, np.ndarray]]


def solve(costs: Costs, budget: int, pruning_weight: float = 1.0) -> Choice | None:
    """The choice of least cost whose weights take at most `budget` bytes; None if not even the smallest does.

    `pruning_weight` multiplies the costs of pruning: infinity forbids it; below 1 it says that pruning costs less when
    the surviving weights are rough themselves.
    """
    low, high = 0.0, _dearest_price(costs)
    if choice_bytes(costs, _respond(costs, high, pruning_weight)) > budget:
        return None
    if choice_bytes(costs, _respond(costs, low, pruning_weight)) <= budget:
        return _respond(costs, low, pruning_weight)
    for _ in range(_BISECTIONS):
        middle = np.sqrt(max(low, high * 1e-18) * high)
        if choice_bytes(costs, _respond(costs, middle, pruning_weight)) <= budget:
            high = middle
        else:
            low = middle
    return _spend_rest(costs, _respond(costs, high, pruning_weight), budget)


def choice_bytes(costs: Costs, choice: Choice) -> int:
    """Bytes of the arrays of all weights that survive."""
    total = int(np.sum(_picked(costs.tensors.bytes_NF, choice.tensor_N)))
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        for name in PROJECTIONS:
            total += int(np.sum(_picked(menu.menus[name].bytes_NF, choice.expert[block][name])[kept]))
    return total


def choice_cost(costs: Costs, choice: Choice) -> float:
    """The predicted cost, pruning at its full price."""
    total = float(np.sum(_picked(costs.tensors.cost_NF, choice.tensor_N)))
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        total += float(menu.pruning_cost[choice.pruned[block]])
        for name in PROJECTIONS:
            total += float(np.sum(_picked(menu.menus[name].cost_NF, choice.expert[block][name])[kept]))
    return total


def menu_survivors(menu: ExpertMenu, pruned: int) -> np.ndarray:
    """The experts left after pruning the first `pruned` of the order, ascending."""
    return np.setdiff1d(np.arange(menu.num_experts), menu.order[:pruned])


def _respond(costs: Costs, price: float, pruning_weight: float) -> Choice:
    """Everybody's best choice at a price per byte."""
    pruned, expert = {}, {}
    for block, menu in costs.experts.items():
        priced = {name: _priced(menu.menus[name], price) for name in PROJECTIONS}
        expert[block] = {name: np.argmin(priced_EF, axis=1) for name, priced_EF in priced.items()}
        kept_E = sum((np.min(priced_EF, axis=1) for priced_EF in priced.values()), np.zeros(menu.num_experts))
        saved = np.concatenate([[0.0], np.cumsum(kept_E[menu.order])])
        pruned[block] = int(np.argmin(_pruning_penalty(menu, pruning_weight) - saved))
    return Choice(np.argmin(_priced(costs.tensors, price), axis=1), pruned, expert)


def _priced(menu: Menu, price: float) -> np.ndarray:
    return menu.cost_NF + price * menu.bytes_NF


def _picked(values_NF: np.ndarray, choice_N: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_NF, choice_N[:, None], axis=1)[:, 0]


def _dearest_price(costs: Costs) -> float:
    """A price per byte at which every weight takes its smallest format and every layer prunes all it can."""
    menus = [costs.tensors, *(menu for block in costs.experts.values() for menu in block.menus.values())]
    steepest = max(float(np.max(menu.cost_NF, where=np.isfinite(menu.cost_NF), initial=0.0)) for menu in menus)
    pruning = max((float(block.pruning_cost[-1]) for block in costs.experts.values()), default=0.0)
    return 2 * (steepest + pruning + 1.0)


def _pruning_penalty(menu: ExpertMenu, pruning_weight: float) -> np.ndarray:
    if np.isinf(pruning_weight):
        return np.where(np.arange(len(menu.pruning_cost)) > 0, np.inf, 0.0)
    return pruning_weight * menu.pruning_cost


def _spend_rest(costs: Costs, choice: Choice, budget: int) -> Choice:
    """Raise weights, the largest gain per byte first, while an upgrade fits into what is left."""
    tensor_N = choice.tensor_N.copy()
    expert = {block: {name: own.copy() for name, own in by.items()} for block, by in choice.expert.items()}
    rows = [(costs.tensors, tensor_N, n) for n in range(len(tensor_N))]
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        rows += [(menu.menus[name], expert[block][name], int(e)) for name in PROJECTIONS for e in kept]
    bytes_NF = np.stack([menu.bytes_NF[row] for menu, _, row in rows])
    cost_NF = np.stack([menu.cost_NF[row] for menu, _, row in rows])
    now_N = np.asarray([chosen[row] for _, chosen, row in rows])
    left = budget - choice_bytes(costs, choice)
    while (upgrade := _best_upgrade(bytes_NF, cost_NF, now_N, left)) is not None:
        n, target = upgrade
        left -= int(bytes_NF[n, target] - bytes_NF[n, now_N[n]])
        now_N[n] = target
    for (_, chosen, row), target in zip(rows, now_N, strict=True):
        chosen[row] = target
    return Choice(tensor_N, choice.pruned, expert)


def _best_upgrade(bytes_NF: np.ndarray, cost_NF: np.ndarray, now_N: np.ndarray, left: int) -> tuple[int, int] | None:
    """The weight and its new format whose upgrade fits into `left` bytes and gains most per byte."""
    extra_NF = bytes_NF - _picked(bytes_NF, now_N)[:, None]
    gain_NF = _picked(cost_NF, now_N)[:, None] - cost_NF
    possible_NF = (extra_NF > 0) & (extra_NF <= left) & (gain_NF > 0)
    if not possible_NF.any():
        return None
    rate_NF = np.where(possible_NF, gain_NF / np.maximum(extra_NF, 1), -np.inf)
    n, target = np.unravel_index(np.argmax(rate_NF), rate_NF.shape)
    return int(n), int(target)
