"""The paper's allocation (arXiv:2509.25689): one base precision for all tensors, the most sensitive raised within the
budget.

A tensor is a weight outside the routed experts, or one projection of all experts of a layer that survive; as many are
pruned as may be. How sensitive it is is what it costs in the format that it has. The paper says no more than that the
most sensitive are raised, so they are raised step by step, whichever costs most at the time, while a step fits.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.solve import Choice, menu_survivors


def raise_most_sensitive(costs: Menus, budget: int) -> Choice | None:
    """The choice whose weights take at most `budget` bytes; None if not even the smallest format does as base."""
    tensors = _tensors(costs)
    last = len(costs.tensors.formats) - 1
    fitting = [base for base in range(last) if sum(own.bytes_F[own.at(base)] for own in tensors) <= budget]
    if not fitting:
        return None
    now = [own.at(max(fitting)) for own in tensors]
    left = budget - int(sum(own.bytes_F[format_] for own, format_ in zip(tensors, now, strict=True)))
    queue = [(-own.cost_F[now[n]], n) for n, own in enumerate(tensors)]
    heapq.heapify(queue)
    while queue:
        _, n = heapq.heappop(queue)
        if now[n] == last:
            continue
        raised = tensors[n].at(now[n] + 1)
        extra = int(tensors[n].bytes_F[raised] - tensors[n].bytes_F[now[n]])
        if extra <= left:
            left, now[n] = left - extra, raised
            heapq.heappush(queue, (-tensors[n].cost_F[raised], n))
    return _choice(costs, now)


@dataclass(frozen=True)
class _Tensor:
    """Bytes and cost of all its matrices together by format, infinite where one of them may not have it."""

    bytes_F: np.ndarray
    cost_F: np.ndarray

    def at(self, level: int) -> int:
        """The format of that number, or the next that may be used; KEEP, the last, always may."""
        return level + int(np.argmax(np.isfinite(self.cost_F[level:])))


def _tensors(costs: Menus) -> list[_Tensor]:
    """Weights outside the experts, then every block's projections."""
    tensors = [_Tensor(*own) for own in zip(costs.tensors.bytes_NF, costs.tensors.cost_NF, strict=True)]
    for menu in costs.experts.values():
        kept = menu_survivors(menu, menu.most_pruned)
        tensors += [_together(menu.menus[name], kept) for name in PROJECTIONS]
    return tensors


def _together(menu: Menu, rows: np.ndarray) -> _Tensor:
    return _Tensor(np.sum(menu.bytes_NF[rows], axis=0), np.sum(menu.cost_NF[rows], axis=0))


def _choice(costs: Menus, formats: list[int]) -> Choice:
    others = len(costs.names)
    of_experts = iter(formats[others:])
    pruned = {block: menu.most_pruned for block, menu in costs.experts.items()}
    expert = {
        block: {name: np.full(menu.num_experts, next(of_experts)) for name in PROJECTIONS}
        for block, menu in costs.experts.items()
    }
    return Choice(np.asarray(formats[:others], int), pruned, expert)
