"""Counts in multiples: of a layer's experts that stay, and in every projection of the experts of one format.

A layer holds the experts of one format as one array, and a device compiles a kernel for every size of such an array.
Multiples of a number make sizes fewer, and none is small.

The experts of a projection that stay are ordered by what rounding costs them and cut into groups of `multiple`, which
get one format each, as a single weight does. Nothing is lost by that order where what an expert costs in a format is a
figure of the expert times one of the format: whatever the numbers of experts by format, the best way to hand formats
out gives every format neighbours. Costs as measured are nearly of that form; most of what they differ by is won back by
experts that exchange their formats in the end.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moejax.model.weights import block_name
from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.planning.solve import Choice, menu_survivors, solve, solve_by_price

# What an exchange gains at least, as a share of the largest cost: below that lie errors of summing.
_LEAST_GAIN = 1e-12


def solve_in_multiples(costs: Menus, budget: int, pruning_weight: float, multiple: int) -> Choice | None:
    """The choice of `solve`, with as many experts in every format, projection by projection, as are a multiple.

    If the experts that stay are not, the remainder has the format of those that rounding costs least. How many stay is
    not decided here: `costs` has to forbid other numbers. It is chosen as if every expert had a format of its own.
    Experts of one projection have to have the same bytes, and the same formats allowed.
    """
    if multiple == 1:
        return solve(costs, budget, pruning_weight)
    free = solve_by_price(costs, budget, pruning_weight)
    if free is None:
        return None
    groups = [*_groups(costs, free.pruned, multiple)]
    grouped = solve(_joined(costs, groups), budget)
    return None if grouped is None else _of_experts(costs, free, groups, grouped.tensor_N)


def exchanged(cost_NF: np.ndarray, format_N: np.ndarray) -> np.ndarray:
    """As many experts of every format, at the least cost that there is: in rings of formats an expert of each takes the
    next one, as long as some ring costs less."""
    used, own_N = np.unique(format_N, return_inverse=True)
    cost_NU = cost_NF[:, used]
    least = _LEAST_GAIN * float(np.max(cost_NU))
    while True:
        step_UU, mover_UU = _cheapest_moves(cost_NU, own_N, len(used))
        ring = _negative_ring(step_UU, least)
        if not ring:
            return used[own_N]
        own_N[[mover_UU[here, there] for here, there in ring]] = [there for _, there in ring]


@dataclass(frozen=True)
class _Groups:
    """One projection of a block: the experts that stay, those that rounding costs most first, and where among them
    every group starts."""

    block: int
    projection: str
    members: np.ndarray
    starts: np.ndarray

    def summed(self, values_NF: np.ndarray) -> np.ndarray:
        """By group, (G, F)."""
        return np.add.reduceat(values_NF[self.members], self.starts, axis=0)

    def spread(self, format_G: np.ndarray) -> np.ndarray:
        """The members' formats."""
        return np.repeat(format_G, np.diff(self.starts, append=len(self.members)))


def _groups(costs: Menus, pruned: Mapping[int, int], multiple: int) -> Iterator[_Groups]:
    for block, menu in costs.experts.items():
        kept = menu_survivors(menu, pruned[block])
        starts = multiple * np.arange(max(1, len(kept) // multiple))
        for name in PROJECTIONS:
            suffering = _suffering(menu.menus[name].cost_NF[kept])
            yield _Groups(block, name, kept[np.argsort(-suffering, kind="stable")], starts)


def _suffering(cost_NF: np.ndarray) -> np.ndarray:
    """What rounding costs every expert, (N,); all formats count alike, however rough they are."""
    finite_NF = cost_NF[:, np.isfinite(cost_NF).all(axis=0)]
    return np.sum(finite_NF / np.maximum(np.mean(finite_NF, axis=0), 1e-300), axis=1)


def _joined(costs: Menus, groups: list[_Groups]) -> Menus:
    """The groups as weights behind those outside the experts."""
    names, bytes_NF, cost_NF = [*costs.names], [costs.tensors.bytes_NF], [costs.tensors.cost_NF]
    for own in groups:
        menu = costs.experts[own.block].menus[own.projection]
        names += [f"{block_name(own.block, costs.num_layers)}.mlp.experts.{own.projection}"] * len(own.starts)
        bytes_NF.append(own.summed(menu.bytes_NF))
        cost_NF.append(own.summed(menu.cost_NF))
    tensors = Menu(costs.tensors.formats, np.concatenate(bytes_NF), np.concatenate(cost_NF))
    return replace(costs, names=tuple(names), tensors=tensors, experts={})


def _of_experts(costs: Menus, free: Choice, groups: list[_Groups], format_N: np.ndarray) -> Choice:
    """From formats of weights and groups to those of every expert; pruned ones keep what they had in `free`."""
    expert = {block: {name: own.copy() for name, own in by.items()} for block, by in free.expert.items()}
    ends = np.cumsum([len(costs.names), *(len(own.starts) for own in groups)])
    for own, format_G in zip(groups, np.split(format_N, ends[:-1])[1:], strict=True):
        cost_NF = costs.experts[own.block].menus[own.projection].cost_NF[own.members]
        expert[own.block][own.projection][own.members] = exchanged(cost_NF, own.spread(format_G))
    return Choice(format_N[: len(costs.names)], free.pruned, expert)


def _cheapest_moves(cost_NU: np.ndarray, own_N: np.ndarray, formats: int) -> tuple[np.ndarray, np.ndarray]:
    """From every format to every other what it costs to move an expert, at least, and which expert that is."""
    extra_NU = cost_NU - np.take_along_axis(cost_NU, own_N[:, None], axis=1)
    mover_UU = np.zeros((formats, formats), int)
    for here in range(formats):
        members = np.flatnonzero(own_N == here)
        mover_UU[here] = members[np.argmin(extra_NU[members], axis=0)]
    return np.take_along_axis(extra_NU, mover_UU, axis=0), mover_UU


def _negative_ring(step_UU: np.ndarray, least: float) -> list[tuple[int, int]]:
    """The steps of a ring whose sum is below -least, none if there is no such ring (Bellman and Ford's search)."""
    count = len(step_UU)
    distance_U, before_U = np.zeros(count), np.arange(count)
    for _ in range(count):
        through_UU = distance_U[:, None] + step_UU
        nearer_U = np.min(through_UU, axis=0)
        improved_U = nearer_U < distance_U - least / count
        if not improved_U.any():
            return []
        before_U[improved_U] = np.argmin(through_UU, axis=0)[improved_U]
        distance_U = np.minimum(distance_U, nearer_U)
    here = int(np.flatnonzero(improved_U)[0])
    for _ in range(count):
        here = int(before_U[here])
    ring = [(int(before_U[here]), here)]
    while ring[-1][0] != here:
        ring.append((int(before_U[ring[-1][0]]), ring[-1][0]))
    return ring if sum(step_UU[own] for own in ring) < -least else []
