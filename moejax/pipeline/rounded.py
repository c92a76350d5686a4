"""Weights in the candidate formats: what each is rounded to, what error that makes, and what is remembered of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, ExpertStatistics, Inputs
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Format, Leaf, payload_bytes, row_parts
from moejax.kernels import hadamard
from moejax.model.leaves import Weight, named_leaves
from moejax.model.moe import Experts
from moejax.model.weights import IN_BLOCK
from moejax.pipeline.working_copy import one_bucket
from moejax.planning import KEEP
from moejax.transforms.rounder import (
    AFRESH,
    MOST_NUMBERS,
    Projection,
    Rounder,
    Wanted,
    cut,
    experts_together,
)
from moejax.transforms.rounding import rounding_error, to_float32

_EXPERTS = "mlp.experts"


class RoundedWeights:
    """A `Rounder` that remembers, by name and format, as much as `most_bytes` hold: plans that agree on a matrix and
    its format share the work.

    It suits one model and its statistics: what a matrix is rounded to depends on them. What a plan keeps is as it was
    given, which is dense where plans are tried, and is not remembered.
    """

    def __init__(self, most_bytes: int, rounder: Rounder = AFRESH):
        self._rounder, self._bytes_left = rounder, most_bytes
        self._known: dict[tuple[str, str], Leaf] = {}

    @property
    def afresh(self) -> Rounder:
        return self._rounder.afresh

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        if (name, target) in self._known:
            return self._known[name, target]
        rounded = self._rounder.matrix(name, leaf, inputs, target)
        self._remember(name, target, rounded)
        return rounded

    def experts(self, wanted: Sequence[Wanted]) -> list[list[Leaf]]:
        unknown = [replace(own, some=[k for k in own.some if self._key(own, k) not in self._known]) for own in wanted]
        asked = [own for own in unknown if own.some]
        new = {
            self._key(own, k): leaf
            for own, leaves in zip(asked, self._rounder.experts(asked), strict=True)
            for k, leaf in zip(own.some, leaves, strict=True)
        }
        known = self._known | new
        leaves = [[known[self._key(own, k)] for k in own.some] for own in wanted]
        for (name, target), leaf in new.items():
            self._remember(name, target, leaf)
        return leaves

    @staticmethod
    def _key(wanted: Wanted, k: int) -> tuple[str, str]:
        return wanted.of.name_of(k), wanted.target

    def _remember(self, name: str, target: str, leaf: Leaf) -> None:
        size = payload_bytes(leaf)
        if target != KEEP and size <= self._bytes_left:
            self._known[name, target] = leaf
            self._bytes_left -= size


@dataclass(frozen=True)
class InFormats:
    """A matrix in each of some formats, rounded by what its input is.

    name: in the model. inputs: gives what its input is, whose Hessian may be large. output_weight: what a unit error at
    each output counts, (..., O).
    """

    formats: Sequence[Format]
    rounder: Rounder
    name: str
    leaf: Leaf
    inputs: Callable[[], Inputs]
    output_weight: jax.Array

    def rounded(self, f: int) -> Leaf:
        """In format number f."""
        return self._rounded(f, self.inputs())

    def errors(self) -> np.ndarray:
        """The error of its outputs in every format, (F,): `rounding_error`."""
        inputs = self.inputs()
        error_F = np.asarray([self._error(f, inputs) for f in range(len(self.formats))], np.float64)
        require_finite(self.name, self.leaf, error_F)
        return error_F

    def _rounded(self, f: int, inputs: Inputs) -> Leaf:
        return self.rounder.matrix(self.name, self.leaf, inputs, self.formats[f].name)

    def _error(self, f: int, inputs: Inputs) -> float:
        rounded, error = self._rounded(f, inputs), 0.0
        for own in row_parts(self.leaf, MOST_NUMBERS):
            each = (to_float32(cut(leaf, own)) for leaf in (self.leaf, rounded))
            error += float(rounding_error(*each, inputs, self.output_weight[own]))
        return error


@dataclass(frozen=True)
class ExpertsInFormats:
    """A projection of some experts of a block in each of some formats.

    down_norm2: squared norms of what a unit of every product of gate and up becomes in the output, (E, F), by which
    their errors count (`ExpertStatistics.output_weight`).
    """

    formats: Sequence[Format]
    rounder: Rounder
    of: Projection
    down_norm2: Callable[[], jax.Array]

    def rounded(self, f: int) -> ExpertWeights:
        """In format number f, in float32."""
        return one_bucket(jnp.stack([to_float32(leaf) for leaf in self._in(self._every, [f])[0]]))

    def errors(self, tick: Callable[[], object] = lambda: None) -> np.ndarray:
        """The error of every expert's outputs in every format, (E, F). `tick` is called for as many experts as are
        rounded together."""
        output_EO = self.output_weight()
        together = experts_together(self.of.weights.shape)
        error_EF = np.zeros((len(self._every), len(self.formats)))
        for start in self._every[::together]:
            tick()
            some = self._every[start : start + together]
            dense = [to_float32(self.of.weights.expert(e)) for e in some]
            for f, leaves in enumerate(self._in(some, range(len(self.formats)))):
                each = map(to_float32, leaves)
                for e, matrix, rounded in zip(some, dense, each, strict=True):
                    error_EF[e, f] = rounding_error(matrix, rounded, self.of.inputs(e), output_EO[e])
            for e, matrix in zip(some, dense, strict=True):
                require_finite(f"{self.of.name} of expert {self.of.members[e]}", matrix, error_EF[e])
        return error_EF

    def output_weight(self) -> jax.Array:
        """What a unit error at each output counts, (E, O)."""
        weights = self.of.weights
        own_EO = self.of.statistics.output_weight(self.of.own, self.down_norm2())
        return jnp.broadcast_to(own_EO, weights.shape[:2])

    @property
    def _every(self) -> range:
        return range(self.of.weights.num_experts)

    def _in(self, some: Sequence[int], formats: Sequence[int]) -> list[list[Leaf]]:
        """Some in each of some formats, by their numbers."""
        return self.rounder.experts([Wanted(self.of, some, self.formats[f].name) for f in formats])


def matrices_in_formats(
    part: str,
    leaves: Mapping[str, Weight],
    statistics: BlockStatistics,
    formats: Sequence[Format],
    rounder: Rounder,
) -> dict[str, InFormats]:
    """Every weight of a trunk, or around one, that gets formats, by its name within; that part's name in the model is
    `part`."""

    def of(own: str, leaf: Leaf) -> InFormats:
        ones = jnp.ones(leaf.shape[:-1])
        return InFormats(formats, rounder, f"{part}.{own}", leaf, partial(statistics.inputs, own), ones)

    return {own: of(own, leaf) for own, leaf in leaves.items() if IN_BLOCK[own].may_be_rounded}


def experts_in_formats(
    block: str,
    members: Sequence[int],
    experts: Experts,
    statistics: ExpertStatistics,
    formats: Sequence[Format],
    rounder: Rounder,
) -> dict[str, ExpertsInFormats]:
    """Every projection of the experts `members` of a block of that name in the model, by its name within; the
    statistics are all experts'."""
    leaves, sums = named_leaves(experts), statistics.of(members)
    norm2 = cache(partial(_down_norm2, leaves["down"], experts.config.down_input_transform))

    def of(own: str, weights: ExpertWeights) -> ExpertsInFormats:
        return ExpertsInFormats(
            formats, rounder, Projection(f"{block}.{_EXPERTS}.{own}", members, weights, sums), norm2
        )

    return {f"{_EXPERTS}.{own}": of(own, weights) for own, weights in leaves.items()}


@partial(jax.jit, static_argnums=1)
def _down_norm2(down: ExpertWeights, input_transform: str | None) -> jax.Array:
    (bucket,) = down.buckets

    def of(index: jax.Array) -> jax.Array:
        w_DF = to_float32(jax.tree.map(lambda a: a[index], bucket))
        return jnp.sum((hadamard(w_DF, inverse=True) if input_transform else w_DF) ** 2, axis=0)

    return jax.lax.map(of, down.index_E)


def require_finite(name: str, matrix: Leaf, error_F: np.ndarray) -> None:
    """Raises InputError, naming the matrix, unless its errors are finite."""
    if not np.all(np.isfinite(error_F)):
        raise InputError(
            f"{name}: its largest weight is {float(jnp.max(jnp.abs(to_float32(matrix)))):.3g}, and the error of "
            "rounding it is not finite; a checkpoint whose weights are sound is needed"
        )
