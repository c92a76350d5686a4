"""Matrices rounded by name: one by one, and some experts of a layer together."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import ExpertStatistics, Inputs
from moejax.formats import ExpertWeights, Leaf, parse_format, row_parts, rows
from moejax.machine import accelerator_memory
from moejax.planning import KEEP
from moejax.sharding import ALONE, Crew
from moejax.transforms.error_feedback import rows_together
from moejax.transforms.rounding import round_weight, to_float32

# Numbers of a matrix that are in float32 together, at most; its rows are rounded each by itself.
MOST_NUMBERS = 1 << 26

# How many experts are rounded together, at most, and in how many bytes of weights and Hessians; on an accelerator, of
# its memory.
_EXPERTS_TOGETHER, _BYTES_TOGETHER = 8, 1 << 28
_EXPERTS_ACCELERATED, _SHARE_ACCELERATED = 32, 1 / 12

# What of several experts' inputs is each one's own: by what outputs are weighed is their layer's.
_OF_EACH = Inputs._make((0, 0, 0, 0, None))

# Groups are unpacked one at a time where their experts lie, whatever number of devices they then go to.
_UNPACKED = threading.Lock()

# Numbers of a matrix that takes longer to round than another size of stack takes to compile.
_LARGE = 1 << 22


@dataclass(frozen=True)
class Projection:
    """A projection of some experts of a layer.

    name: all experts', in the model. members: numbers in the layer. weights, statistics: these experts'.
    """

    name: str
    members: Sequence[int]
    weights: ExpertWeights
    statistics: ExpertStatistics

    @property
    def own(self) -> str:
        """Its name among an expert's projections."""
        return self.name.rpartition(".")[2]

    @property
    def shares_hessian(self) -> bool:
        """Whether these experts are rounded by one Hessian, their layer's."""
        return self.statistics.shares_hessian(self.own)

    def name_of(self, k: int) -> str:
        """The name of the k-th of these experts' matrix."""
        return f"{self.name}.{self.members[k]}"

    def inputs(self, k: int) -> Inputs:
        """The k-th of these experts'."""
        return self.statistics.inputs(self.own, k)


@dataclass(frozen=True)
class Wanted:
    """Experts at some positions of a projection's, in the format of a name; as they are if that is KEEP."""

    of: Projection
    some: Sequence[int]
    target: str


class Rounder(Protocol):
    """Gives matrices, by their names in the model, in the format of a name; as they are if that is KEEP."""

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        """One that has that input."""
        ...

    def experts(self, wanted: Sequence[Wanted]) -> list[list[Leaf]]:
        """Every wanted expert, each by itself."""
        ...

    @property
    def afresh(self) -> "Rounder":
        """What rounds matrices of which it knows others by the same names."""
        ...


@dataclass(frozen=True)
class Afresh:
    """The rounder that knows nothing yet. crew: over whose devices groups of experts are spread."""

    crew: Crew = ALONE

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        return requantize(leaf, inputs, target)

    @property
    def afresh(self) -> "Afresh":
        return self

    def experts(self, wanted: Sequence[Wanted]) -> list[list[Leaf]]:
        groups = [list(_groups(own)) for own in wanted]
        every = [group for own in groups for group in own]
        rounded = iter(self.crew.spread(lambda n, device: every[n].rounded(device), [own.abstract() for own in every]))
        leaves = []
        for own, of_own in zip(wanted, groups, strict=True):
            kept = [own.of.weights.expert(k) for k in own.some] if own.target == KEEP else []
            leaves.append(kept + [jax.tree.map(jnp.asarray, leaf) for _ in of_own for leaf in next(rounded)])
        return leaves


@dataclass(frozen=True)
class _Group:
    """Experts of a projection, by their positions, that are rounded together; the first `count` are wanted, the others
    make up a number that is compiled."""

    of: Projection
    positions: np.ndarray
    count: int
    target: str
    by_rows: bool = False

    def abstract(self) -> list[Leaf]:
        """The wanted ones, shapes only."""
        return [parse_format(self.target).abstract(self.of.weights.shape[1:])] * self.count

    def rounded(self, device: jax.Device | None) -> list[Leaf]:
        """The wanted ones, arrays of NumPy's, rounded on a device."""
        to = parse_format(self.target)
        if self.by_rows:
            (k,) = self.positions.tolist()
            leaf, inputs = _on(device, (self.of.weights.expert(k), self.of.inputs(k)))
            return [jax.device_get(requantize(leaf, inputs, self.target))]
        with _UNPACKED:
            given = _matrices_and_inputs(self.of.weights, self.of.statistics, self.positions, self.of.own)
            given = given if device is None else jax.block_until_ready(_on(device, given))
        rounding = partial(round_weight, to=to)
        rounded = (rounding if self.of.shares_hessian else jax.vmap(rounding, (0, _OF_EACH)))(*given)
        return [jax.tree.map(lambda a, k=k: a[k], jax.device_get(rounded)) for k in range(self.count)]


def _groups(wanted: Wanted) -> Iterator[_Group]:
    """Experts are rounded together so that the number of experts compiles little anew: by powers of two where they are
    large or share a Hessian; else in as many as there may be, the last beside some that were rounded already. Large
    ones without Hessians go one by one, in a sixth of the time: by rows that a cache holds.
    """
    if wanted.target == KEEP:
        return
    of, some = wanted.of, np.asarray(wanted.some, int)
    (_, outputs, inputs), shared = of.weights.shape, of.shares_hessian
    is_large = outputs * inputs >= _LARGE
    by_rows = is_large and of.statistics.layer.x_DD is None
    together = max(1, rows_together(inputs) // outputs) if shared else experts_together(of.weights.shape)
    start = 0
    while count := min(1 if by_rows else together, len(some) - start):
        by_powers = shared or is_large
        count = 1 << count.bit_length() >> 1 if by_powers else count
        own = np.resize(some[start : start + count], count if by_powers else together)
        yield _Group(of, own, count, wanted.target, by_rows)
        start += count


def _on(device: jax.Device | None, given: Any) -> Any:
    """Arrays moved to a device."""
    return given if device is None else jax.device_put(given, device)


AFRESH = Afresh()


def requantize(leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
    """The leaf in the format named `target`, or as it is if that is KEEP."""
    if target == KEEP:
        return leaf
    to, parts = parse_format(target), row_parts(leaf, MOST_NUMBERS)
    if len(parts) == 1:
        return round_weight(to_float32(leaf), inputs, to)

    def rounded(own: slice) -> Leaf:
        output = inputs.output_hessian  # between parts no row makes up for another
        of_rows = inputs if output is None else inputs._replace(output_hessian=output[own, own])
        return round_weight(to_float32(cut(leaf, own)), of_rows, to)

    return jax.tree.map(lambda *own: jnp.concatenate(own), *map(rounded, parts))


def cut(leaf: Leaf, own: slice) -> Leaf:
    """Of `row_parts`: those rows of a matrix; of what is no matrix, or has no others, all."""
    size = own.stop - own.start
    return leaf if size == leaf.shape[0] else rows(leaf, own.start, size)


def some_rows(leaf: Leaf, row_R: np.ndarray) -> jax.Array:
    """Rows of all matrices of a leaf (..., O, I), counted through, (R, I) in float32."""
    found, start = jnp.zeros((len(row_R), leaf.shape[-1])), 0
    for part in row_parts(leaf, MOST_NUMBERS):
        own_OI = to_float32(cut(leaf, part)).reshape(-1, leaf.shape[-1])
        here = (row_R >= start) & (row_R < start + len(own_OI))
        found = jnp.where(here[:, None], own_OI[np.where(here, row_R - start, 0)], found)
        start += len(own_OI)
    return found


def few_experts(shape: tuple[int, ...]) -> int:
    """How many of a layer's experts (E, O, I) any device rounds together."""
    return _that_fit(shape, _EXPERTS_TOGETHER, _BYTES_TOGETHER)


def experts_together(shape: tuple[int, ...]) -> int:
    """How many of a layer's experts (E, O, I) this device rounds together."""
    own = accelerator_memory()
    return few_experts(shape) if own is None else _that_fit(shape, _EXPERTS_ACCELERATED, int(_SHARE_ACCELERATED * own))


def _that_fit(shape: tuple[int, ...], most: int, size: int) -> int:
    _, outputs, inputs = shape
    return max(1, min(most, size // (4 * inputs * (outputs + inputs))))


@partial(jax.jit, static_argnames="projection")
def _matrices_and_inputs(
    weights: ExpertWeights, experts: ExpertStatistics, member_B: jax.Array, projection: str
) -> tuple[jax.Array, Inputs]:
    """Matrices (B, O, I) of some experts of an original, and their inputs: one where they share a Hessian."""
    (bucket,) = weights.buckets
    matrices = jax.tree.map(lambda a: a[weights.index_E[member_B]], bucket)
    if experts.shares_hessian(projection):
        return to_float32(matrices), experts.inputs(projection, member_B[0])
    return to_float32(matrices), jax.vmap(lambda e: experts.inputs(projection, e), out_axes=_OF_EACH)(member_B)
