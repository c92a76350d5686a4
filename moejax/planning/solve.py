"""The budget solver: formats of all weights and experts kept per layer, least predicted cost under a byte budget.

A multiple-choice knapsack by Lagrangian sweep: for a price per byte every weight and every layer decides for itself;
the price is found by bisection, and what is left of the budget buys the best remaining upgrades.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moejax.model.weights import in_mtp_block
from moejax.planning.menus import ExpertMenu, Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.predict import Losses

_BISECTIONS = 40


@dataclass(frozen=True)
class Choice:
    """tensor_N: format index per weight. pruned: experts pruned per block. expert: by block and projection, the format
    index of every expert, (E,), pruned ones included."""

    tensor_N: np.ndarray
    pruned: Mapping[int, int]
    expert: Mapping[int, Mapping[str, np.ndarray]]


def solve(costs: Menus, budget: int, pruning_weight: float = 1.0) -> Choice | None:
    """The choice of least cost whose weights take at most `budget` bytes; None if not even the smallest does.

    `pruning_weight` multiplies the costs of pruning: at infinity as few go as may; below 1 it says that pruning costs
    less when the surviving weights are rough themselves.
    """
    choice = solve_by_price(costs, budget, pruning_weight)
    return None if choice is None else _spend_rest(costs, choice, budget)


def solve_by_price(costs: Menus, budget: int, pruning_weight: float) -> Choice | None:
    """As `solve`, at one price per byte for all: some of the budget is left."""
    table = _Table.of(costs, pruning_weight)
    low, high = 0.0, _dearest_price(costs)
    if table.respond(high).bytes > budget:
        return None
    if table.respond(low).bytes <= budget:
        return table.choice(table.respond(low))
    for _ in range(_BISECTIONS):
        middle = np.sqrt(max(low, high * 1e-18) * high)
        if table.respond(middle).bytes <= budget:
            high = middle
        else:
            low = middle
    return table.choice(table.respond(high))


def choice_bytes(costs: Menus, choice: Choice) -> int:
    """Bytes of the arrays of all weights that survive."""
    total = int(np.sum(_picked(costs.tensors.bytes_NF, choice.tensor_N)))
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        for name in PROJECTIONS:
            total += int(np.sum(_picked(menu.menus[name].bytes_NF, choice.expert[block][name])[kept]))
    return total


def choice_losses(costs: Menus, choice: Choice) -> Losses:
    """The summed costs of a choice; MTP blocks' cost the model's predictions nothing."""
    counts_N = np.asarray([not in_mtp_block(name) for name in costs.names], bool)
    others = float(np.sum(_picked(costs.tensors.cost_NF, choice.tensor_N), where=counts_N))
    experts = pruning = 0.0
    for block, menu in costs.experts.items():
        if block >= costs.num_layers:
            continue
        kept = menu_survivors(menu, choice.pruned[block])
        pruning += float(menu.pruning_cost[choice.pruned[block]])
        for name in PROJECTIONS:
            experts += float(np.sum(_picked(menu.menus[name].cost_NF, choice.expert[block][name])[kept]))
    return Losses(others, experts, pruning)


def menu_survivors(menu: ExpertMenu, pruned: int) -> np.ndarray:
    """The experts left after pruning the first `pruned` of the order, ascending."""
    return np.setdiff1d(np.arange(menu.num_experts), menu.order[:pruned])


class _Response(NamedTuple):
    """Everybody's best choice at a price: formats of weights (N,) and of experts (B, P, E) of B blocks and P
    projections, how many experts each block prunes, and the bytes of what survives."""

    tensor_N: np.ndarray
    expert_BPE: np.ndarray
    pruned_B: np.ndarray
    bytes: int


@dataclass(frozen=True)
class _Table:
    """Costs stacked over blocks, so that a price is answered in a few operations. `blocks` have so many experts, and
    where another has more, experts of no bytes behind them. `going_BE` are experts in the order in which they go, those
    that cannot last; `penalty_BM` is what pruning the first m = 0 .. E costs."""

    blocks: Mapping[int, int]
    tensors: Menu
    bytes_FBPE: np.ndarray
    cost_FBPE: np.ndarray
    going_BE: np.ndarray
    penalty_BM: np.ndarray

    @staticmethod
    def of(costs: Menus, pruning_weight: float) -> "_Table":
        menus = costs.experts.values()
        num_experts = max((menu.num_experts for menu in menus), default=0)
        shape = (len(costs.tensors.formats), len(menus), len(PROJECTIONS), num_experts)
        bytes_FBPE, cost_FBPE = np.zeros(shape, np.int64), np.zeros(shape)
        going_BE = np.zeros((len(menus), num_experts), int)
        penalty_BM = np.full((len(menus), num_experts + 1), np.inf)
        for b, menu in enumerate(menus):
            for p, name in enumerate(PROJECTIONS):
                bytes_FBPE[:, b, p, : menu.num_experts] = menu.menus[name].bytes_NF.T
                cost_FBPE[:, b, p, : menu.num_experts] = menu.menus[name].cost_NF.T
            staying = np.setdiff1d(np.arange(num_experts), menu.order)
            going_BE[b] = np.concatenate([menu.order, staying])
            penalty_BM[b, : len(menu.order) + 1] = _pruning_penalty(menu, pruning_weight)
        sizes = {block: menu.num_experts for block, menu in costs.experts.items()}
        return _Table(sizes, costs.tensors, bytes_FBPE, cost_FBPE, going_BE, penalty_BM)

    def respond(self, price: float) -> _Response:
        tensor_N = np.argmin(self.tensors.cost_NF + price * self.tensors.bytes_NF, axis=1)
        size = int(np.sum(_picked(self.tensors.bytes_NF, tensor_N)))
        if not self.blocks:
            return _Response(tensor_N, np.zeros(self.bytes_FBPE.shape[1:], int), np.zeros(0, int), size)
        priced_FBPE = self.cost_FBPE + price * self.bytes_FBPE
        expert_BPE = np.argmin(priced_FBPE, axis=0)
        kept_BE = np.sum(np.min(priced_FBPE, axis=0), axis=1)
        saved_BE = np.cumsum(np.take_along_axis(kept_BE, self.going_BE, axis=1), axis=1)
        pruned_B = np.argmin(self.penalty_BM - np.pad(saved_BE, ((0, 0), (1, 0))), axis=1)
        bytes_BE = np.sum(np.take_along_axis(self.bytes_FBPE, expert_BPE[None], axis=0)[0], axis=1)
        stays_BE = np.arange(bytes_BE.shape[1]) >= pruned_B[:, None]
        size += int(np.sum(np.take_along_axis(bytes_BE, self.going_BE, axis=1), where=stays_BE))
        return _Response(tensor_N, expert_BPE, pruned_B, size)

    def choice(self, response: _Response) -> Choice:
        pruned = dict(zip(self.blocks, response.pruned_B.tolist(), strict=True))
        expert = {
            block: dict(zip(PROJECTIONS, own_PE[:, :size], strict=True))
            for (block, size), own_PE in zip(self.blocks.items(), response.expert_BPE, strict=True)
        }
        return Choice(response.tensor_N, pruned, expert)


def _picked(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _dearest_price(costs: Menus) -> float:
    """A price per byte at which every weight takes its smallest format and every layer prunes all it can."""
    menus = [costs.tensors, *(menu for block in costs.experts.values() for menu in block.menus.values())]
    steepest = max(float(np.max(menu.cost_NF, where=np.isfinite(menu.cost_NF), initial=0.0)) for menu in menus)
    pruning = max((float(block.pruning_cost[block.most_pruned]) for block in costs.experts.values()), default=0.0)
    return 2 * (steepest + pruning + 1.0)


def _pruning_penalty(menu: ExpertMenu, pruning_weight: float) -> np.ndarray:
    allowed = np.isfinite(menu.pruning_cost)
    if np.isinf(pruning_weight):
        return np.where(np.arange(len(allowed)) > np.argmax(allowed), np.inf, menu.pruning_cost)
    return np.where(allowed, pruning_weight * np.where(allowed, menu.pruning_cost, 0.0), np.inf)


@dataclass(frozen=True)
class _Rows:
    """All weights that survive as one table; `chosen` says in which array of a Choice a row's format stands."""

    bytes_NF: np.ndarray
    cost_NF: np.ndarray
    chosen: Sequence[tuple[np.ndarray, np.ndarray]]

    def write_back(self, now_N: np.ndarray) -> None:
        start = 0
        for array, rows in self.chosen:
            array[rows] = now_N[start : start + len(rows)]
            start += len(rows)


def _rows_of(costs: Menus, choice: Choice) -> _Rows:
    menus, chosen = [costs.tensors], [(choice.tensor_N, np.arange(len(choice.tensor_N)))]
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, choice.pruned[block])
        menus += [menu.menus[name] for name in PROJECTIONS]
        chosen += [(choice.expert[block][name], kept) for name in PROJECTIONS]
    picked = list(zip(menus, chosen, strict=True))
    bytes_NF = np.concatenate([menu.bytes_NF[rows] for menu, (_, rows) in picked])
    cost_NF = np.concatenate([menu.cost_NF[rows] for menu, (_, rows) in picked])
    return _Rows(bytes_NF, cost_NF, chosen)


def _spend_rest(costs: Menus, choice: Choice, budget: int) -> Choice:
    """Raise weights, the largest gain per byte first, while an upgrade fits into what is left.

    Every weight has its best upgrade in a queue. One that fits when its turn comes is still its weight's best, and of
    all; one that does not fit any more says that it is time to look at all weights again.
    """
    raised = Choice(
        choice.tensor_N.copy(),
        choice.pruned,
        {block: {name: own.copy() for name, own in by.items()} for block, by in choice.expert.items()},
    )
    rows = _rows_of(costs, raised)
    now_N = np.concatenate([array[own] for array, own in rows.chosen])
    everyone, left = np.arange(len(now_N)), budget - choice_bytes(costs, choice)
    queue = _queue(rows, everyone, now_N, left)
    while queue:
        _, n, target = heapq.heappop(queue)
        extra = int(rows.bytes_NF[n, target] - rows.bytes_NF[n, now_N[n]])
        if extra > left:
            queue = _queue(rows, everyone, now_N, left)
            continue
        left, now_N[n] = left - extra, target
        for following in _queue(rows, np.asarray([n]), now_N, left):
            heapq.heappush(queue, following)
    rows.write_back(now_N)
    return raised


def _queue(rows: _Rows, which: np.ndarray, now_N: np.ndarray, left: int) -> list[tuple[float, int, int]]:
    """Of the weights `which`, the upgrades that gain most per byte among those that fit into `left` bytes, as a heap:
    gain per byte (negative), weight, format."""
    now = now_N[which]
    extra_NF = rows.bytes_NF[which] - _picked(rows.bytes_NF[which], now)[:, None]
    gain_NF = _picked(rows.cost_NF[which], now)[:, None] - rows.cost_NF[which]
    possible_NF = (extra_NF > 0) & (extra_NF <= left) & (gain_NF > 0)
    rate_NF = np.where(possible_NF, gain_NF / np.maximum(extra_NF, 1), 0.0)
    target_N = np.argmax(rate_NF, axis=1)
    rate_N = _picked(rate_NF, target_N)
    found = np.flatnonzero(rate_N > 0)
    queue = list(zip((-rate_N[found]).tolist(), which[found].tolist(), target_N[found].tolist(), strict=True))
    heapq.heapify(queue)
    return queue
