"""The exact optimum of small planning problems, by dynamic programming over bytes."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from moejax.planning.menus import Menu

# The least cost at which so many bytes can be taken.
Frontier = dict[int, float]


def rows_frontier(menu: Menu, rows: Iterable[int]) -> Frontier:
    found: Frontier = {0: 0.0}
    for n in rows:
        options: Frontier = {}
        for size, cost in zip(menu.bytes_NF[n].tolist(), menu.cost_NF[n].tolist(), strict=True):
            options[size] = min(options.get(size, np.inf), cost)
        found = both(found, options)
    return found


def both(first: Frontier, second: Frontier) -> Frontier:
    """One choice of each, together."""
    found: Frontier = {}
    for size, cost in first.items():
        for more, extra in second.items():
            found[size + more] = min(found.get(size + more, np.inf), cost + extra)
    return found


def efficient(found: Frontier) -> list[tuple[int, float]]:
    """The corners of the frontier's lower convex hull with falling cost: the answers at some price per byte."""
    hull: list[tuple[int, float]] = []
    for point in sorted(found.items()):
        while len(hull) > 1 and slope(hull[-2], point) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull[:1] + [now for before, now in pairwise(hull) if now[1] < before[1]]


def slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
