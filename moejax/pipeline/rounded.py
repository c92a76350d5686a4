"""Weights in the candidate formats: what each is rounded to, what error that makes, and what is remembered of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, Inputs
from moejax.errors import InputError
from moejax.formats import ExpertWeights, GroupFormat, Leaf, payload_bytes
from moejax.kernels import hadamard
from moejax.model.leaves import Weight
from moejax.model.weights import IN_BLOCK
from moejax.pipeline.working_copy import one_bucket
from moejax.transforms.compress_block import Rounder, experts_together, requantize_experts, requantize_once
from moejax.transforms.rounding import rounding_error, to_float32


class RoundedWeights:
    """A `Rounder` that remembers, by name and format, as much as `most_bytes` hold: plans that agree on a matrix and
    its format share the work.

    It suits one model and its statistics: what a matrix is rounded to depends on them.
    """

    def __init__(self, most_bytes: int):
        self._known: dict[tuple[str, str], Leaf] = {}
        self._bytes_left = most_bytes

    def __call__(self, names: Sequence[str], target: str, rounded: Callable[[Sequence[int]], list[Leaf]]) -> list[Leaf]:
        unknown = [i for i, name in enumerate(names) if (name, target) not in self._known]
        new = dict(zip(unknown, rounded(unknown), strict=True)) if unknown else {}
        leaves = [new[i] if i in new else self._known[name, target] for i, name in enumerate(names)]
        for i, leaf in new.items():
            self._remember(names[i], target, leaf)
        return leaves

    def _remember(self, name: str, target: str, leaf: Leaf) -> None:
        size = payload_bytes(leaf)
        if size <= self._bytes_left:
            self._known[name, target] = leaf
            self._bytes_left -= size


@dataclass(frozen=True)
class InFormats:
    """A matrix in each of some formats, rounded by what its input is.

    name: in the model. output_weight: what a unit error at each output counts, (..., O).
    """

    formats: Sequence[GroupFormat]
    rounder: Rounder
    name: str
    leaf: Leaf
    inputs: Inputs
    output_weight: jax.Array

    def rounded(self, f: int) -> jax.Array:
        """In format number f, in float32."""
        own = requantize_once(self.rounder, self.name, self.leaf, self.inputs, self.formats[f].name)
        return to_float32(own)

    def errors(self) -> np.ndarray:
        """The error of its outputs in every format, (F,): `rounding_error`."""
        matrix = to_float32(self.leaf)
        error_F = np.asarray(
            [
                rounding_error(matrix, self.rounded(f), self.inputs, self.output_weight)
                for f in range(len(self.formats))
            ],
            np.float64,
        )
        _require_finite(self.name, matrix, error_F)
        return error_F


@dataclass(frozen=True)
class ExpertsInFormats:
    """A projection of all experts of a block in each of some formats; `down` is the block's, by which errors of gate
    and up count (`ExpertStatistics.output_weight`)."""

    formats: Sequence[GroupFormat]
    rounder: Rounder
    name: str
    projection: str
    weights: ExpertWeights
    statistics: BlockStatistics
    down: ExpertWeights
    down_input_transform: str | None

    def rounded(self, f: int) -> ExpertWeights:
        """In format number f, in float32."""
        every = range(self.weights.num_experts)
        return one_bucket(jnp.stack([to_float32(leaf) for leaf in self._members(every, f)]))

    def errors(self, tick: Callable[[], object] = lambda: None) -> np.ndarray:
        """The error of every expert's outputs in every format, (E, F). `tick` is called for as many experts as are
        rounded together."""
        sums = self.statistics.experts
        assert sums is not None
        output_EO = jnp.broadcast_to(sums.output_weight(self.projection, self._down_norm2()), self.weights.shape[:2])
        every, together = range(self.weights.num_experts), experts_together(self.weights.shape)
        error_EF = np.zeros((len(every), len(self.formats)))
        for start in every[::together]:
            tick()
            members = every[start : start + together]
            dense = [to_float32(self.weights.expert(e)) for e in members]
            for f in range(len(self.formats)):
                each = map(to_float32, self._members(members, f))
                for e, matrix, rounded in zip(members, dense, each, strict=True):
                    inputs = sums.inputs(self.projection, e)
                    error_EF[e, f] = rounding_error(matrix, rounded, inputs, output_EO[e])
            for e, matrix in zip(members, dense, strict=True):
                _require_finite(f"{self.name} of expert {e}", matrix, error_EF[e])
        return error_EF

    def _members(self, members: Sequence[int], f: int) -> list[Leaf]:
        sums, target = self.statistics.experts, self.formats[f].name
        assert sums is not None

        def afresh(some: Sequence[int]) -> list[Leaf]:
            own = [members[k] for k in some]
            return requantize_experts(self.weights, sums, self.projection, target, own, own)

        return self.rounder([f"{self.name}.{e}" for e in members], target, afresh)

    def _down_norm2(self) -> jax.Array:
        """Squared norms of what a unit of every product of gate and up becomes in the output, (E, F)."""
        each = (to_float32(self.down.expert(e)) for e in range(self.down.num_experts))
        if self.down_input_transform:
            each = (hadamard(w_DF, inverse=True) for w_DF in each)
        return jnp.stack([jnp.sum(w_DF**2, axis=0) for w_DF in each])


def block_in_formats(
    name_of: Callable[[str], str],
    leaves: Mapping[str, Weight],
    statistics: BlockStatistics,
    formats: Sequence[GroupFormat],
    rounder: Rounder,
    down_input_transform: str | None,
) -> dict[str, InFormats | ExpertsInFormats]:
    """Every weight of a block, or of an MTP block, that gets formats, by its name within; in the model `name_of`."""

    def of(own: str, leaf: Weight) -> InFormats | ExpertsInFormats:
        name = name_of(own)
        if isinstance(leaf, ExpertWeights):
            projection, down = own.rpartition(".")[2], leaves["mlp.experts.down"]
            assert isinstance(down, ExpertWeights)
            return ExpertsInFormats(formats, rounder, name, projection, leaf, statistics, down, down_input_transform)
        return InFormats(formats, rounder, name, leaf, statistics.inputs(own), jnp.ones(leaf.shape[:-1]))

    rows = ((own, IN_BLOCK[own]) for own in leaves)
    return {own: of(own, leaves[own]) for own, row in rows if row.may_be_rounded or row.role == "routed experts"}


def _require_finite(name: str, matrix: jax.Array, error_F: np.ndarray) -> None:
    if not np.all(np.isfinite(error_F)):
        raise InputError(
            f"{name}: its largest weight is {float(jnp.max(jnp.abs(matrix))):.3g}, and the error of rounding it is not "
            "finite; a checkpoint whose weights are sound is needed"
        )
