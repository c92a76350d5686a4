"""Errors of formats from a sample, for models whose every weight takes too long to round to every format.

Of a layer's experts EXPERTS are looked at, at even places in the order of what comes to them, sum g^2 |x|^2; of a
matrix ROWS rows, drawn in proportion to their energy (`imitate`), at even places of its running sum. They are rounded
to every format, as they will be if the plan says so, and give the kind's relative error, sum of errors / sum of
energies. Every matrix's error is its own energy times that; with error feedback experts differ more, and a few rows of
each, in one format, say by how much; variants of the model have weights that err as much.
Variants, plans that are tried among them, see CHUNKS of the chunks held out. (The first 128 or 256 tokens of eight, as
many or half as many in all, led to plans with a tenth more KL divergence on a 55M model: contexts were too short.)
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import ExpertStatistics, Inputs
from moejax.formats import ExpertWeights, GroupFormat, Leaf, parse_group_format, row_parts
from moejax.model import DeepseekV3
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.rounded import ExpertsInFormats, InFormats, require_finite
from moejax.pipeline.variants import USED_ROWS
from moejax.planning import KEEP
from moejax.planning.parameters import count_parameters
from moejax.transforms.imitate import energy_by_output, imitate, imitate_expert
from moejax.transforms.rounder import AFRESH, MOST_NUMBERS, Projection, Rounder, cut, some_rows
from moejax.transforms.rounding import round_weight, rounding_error, rounding_errors, to_float32

EXPERTS, ROWS, CHUNKS = 8, 256, 4

# With error feedback, the format and the rows in which every expert is looked at beside.
_LEVEL_BITS, _LEVEL_ROWS = 2, 32

OUTER = ("embed", "head")

# Of models with more numbers a sample is looked at, unless the recipe says otherwise.
MOST_WHOLE = 4_000_000_000


def is_sampled(recipe: Recipe, model: DeepseekV3) -> bool:
    """Whether prices of that model, which may be abstract, come from a sample."""
    if recipe.prices == "by size":
        return count_parameters(model).with_mtp > MOST_WHOLE
    return recipe.prices == "sampled"


class _Rows(NamedTuple):
    """Of a matrix: some rows (R, I), by what their errors count, and the energy of all."""

    row_RI: jax.Array
    weight_R: np.ndarray
    energy: float


class Sampled:
    """What is known of a sample; and the `Rounder` that imitates accordingly.

    relative: the relative error in every format, (F,), by a matrix's name in the model; by that of all experts'
    projection, an expert's by its number.
    """

    def __init__(self, formats: Sequence[GroupFormat], relative: Mapping[str, Any]):
        self.relative = dict(relative)
        self._formats = formats
        self._of_kind: dict[str, np.ndarray] = {}

    def errors(self, own: InFormats) -> np.ndarray:
        """`InFormats.errors`, by some rows of the matrix."""
        inputs, output_O = own.inputs(), np.asarray(own.output_weight, np.float64).reshape(-1)
        energy_O = _energies(own.leaf, inputs)
        row_R, weight_R = _sample(energy_O, output_O, ROWS)
        self.relative[own.name] = self._errors(some_rows(own.leaf, row_R), inputs, weight_R)
        error_F = self.relative[own.name] * np.sum(energy_O * output_O)
        require_finite(own.name, own.leaf, error_F)
        return error_F

    def look_at_experts(self, own: ExpertsInFormats) -> None:
        """At some rows of each of those experts; together where all are rounded by their layer's Hessian."""
        samples = [self._rows_of_expert(own, k, ROWS) for k in range(own.of.weights.num_experts)]
        energies = np.asarray([sample.energy for sample in samples])
        # Each relative error counts as the expert's energy.
        share_E = energies / sum(energies) if sum(energies) > 0 else np.full(len(energies), 1 / len(energies))
        rows = [sample.row_RI for sample in samples]
        each = [sample.weight_R * share for sample, share in zip(samples, share_E, strict=True)]
        if own.of.shares_hessian:
            found_F = self._errors(jnp.concatenate(rows), own.of.inputs(0), np.concatenate(each))
        else:
            found_F = np.sum([self._errors(rows[k], own.of.inputs(k), each[k]) for k in range(len(rows))], axis=0)
        self._of_kind[own.of.name] = found_F

    def expert_errors(self, own: ExpertsInFormats) -> np.ndarray:
        """`ExpertsInFormats.errors`, of experts of a layer some of which were looked at: an expert's energy times the
        kind's relative error, which with error feedback is as much larger or smaller for each as a few rows of it tell
        in one format."""
        moment_EI = own.of.statistics.input_second_moment(own.of.own)
        energy_E = np.asarray(_expert_energies(own.of.weights, moment_EI, own.output_weight()), np.float64)
        level_E = np.ones(len(energy_E)) if own.of.inputs(0).hessian is None else self._levels(own)
        relative_EF = level_E[:, None] * self._of_kind[own.of.name]
        self.relative.setdefault(own.of.name, {}).update(zip(own.of.members, relative_EF, strict=True))
        error_EF = energy_E[:, None] * relative_EF
        for k in np.flatnonzero(~np.isfinite(error_EF).all(axis=1)).tolist():
            require_finite(own.of.name_of(k), own.of.weights.expert(k), error_EF[k])
        return error_EF

    def _levels(self, own: ExpertsInFormats) -> np.ndarray:
        """Every expert's relative error in one format over that of the kind, (E,)."""
        f = min(range(len(self._formats)), key=lambda f: abs(self._formats[f].bits - _LEVEL_BITS))
        samples = [self._rows_of_expert(own, k, _LEVEL_ROWS) for k in range(own.of.weights.num_experts)]
        rows_ERI, rounded = jnp.stack([sample.row_RI for sample in samples]), partial(round_weight, to=self._formats[f])
        if own.of.shares_hessian:
            found = rounded(rows_ERI, own.of.inputs(0))
        else:
            each = [own.of.inputs(k) for k in range(len(samples))]
            found = jax.vmap(rounded)(rows_ERI, jax.tree.map(lambda *own: jnp.stack(own), *each))
        errors = [
            rounding_error(row_RI, found_RI, own.of.inputs(k), jnp.asarray(samples[k].weight_R, jnp.float32))
            for k, (row_RI, found_RI) in enumerate(zip(rows_ERI, to_float32(found), strict=True))
        ]
        return np.asarray(errors, np.float64) / max(float(self._of_kind[own.of.name][f]), 1e-300)

    def _rows_of_expert(self, own: ExpertsInFormats, k: int, most: int) -> _Rows:
        matrix, output_O = own.of.weights.expert(k), np.asarray(own.output_weight()[k], np.float64)
        energy_O = _energies(matrix, own.of.inputs(k))
        row_R, weight_R = _sample(energy_O, output_O, most)
        return _Rows(some_rows(matrix, row_R), weight_R, float(np.sum(energy_O * output_O)))

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        """As a `Rounder`; embedding and head are rounded, since they are few."""
        if target == KEEP or name in OUTER or name.startswith(USED_ROWS):
            return AFRESH.matrix(name, leaf, inputs, target)
        to = parse_group_format(target)
        own = float(self.relative[name][self._formats.index(to)])
        return imitate(to_float32(leaf), inputs.second_moment, to, own)

    def experts(self, of: Projection, some: Sequence[int], target: str) -> list[Leaf]:
        """As a `Rounder`."""
        if target == KEEP:
            return [of.weights.expert(k) for k in some]
        to, moment_EI = parse_group_format(target), of.statistics.input_second_moment(of.own)
        f, relative = self._formats.index(to), self.relative[of.name]
        each = [float(relative[of.members[k]][f]) for k in some]
        return [imitate_expert(of.weights, k, moment_EI, to, own) for k, own in zip(some, each, strict=True)]

    def _errors(self, row_RI: jax.Array, inputs: Inputs, weight_R: np.ndarray) -> np.ndarray:
        return rounding_errors(row_RI, inputs, self._formats, jnp.asarray(weight_R, jnp.float32))


def seen_by_variants(held_out_BT: np.ndarray, rounder: Rounder) -> np.ndarray:
    """Those of the chunks held out that variants with weights of that rounder see."""
    count = min(CHUNKS, len(held_out_BT)) if isinstance(rounder, Sampled) else len(held_out_BT)
    return held_out_BT[np.linspace(0, len(held_out_BT) - 1, count).round().astype(int)]


def experts_to_look_at(experts: ExpertStatistics) -> list[int]:
    """Their numbers, rising."""
    order = np.argsort(np.asarray(jnp.sum(experts.x2_ED, axis=1)), kind="stable")
    places = (np.arange(min(EXPERTS, len(order))) + 0.5) * len(order) / min(EXPERTS, len(order))
    return sorted(order[places.astype(int)].tolist())


def _sample(energy_O: np.ndarray, output_O: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, some perhaps twice, and by what their errors count, so that their sum is about the relative error."""
    counts_O = energy_O * output_O
    total = np.sum(counts_O)
    if not 0 < total < np.inf:
        counts_O, output_O, total = energy_O, np.ones_like(output_O), max(np.sum(energy_O), 1e-300)
    if len(energy_O) <= most:
        return np.arange(len(energy_O)), output_O / total
    places = (np.arange(most) + 0.5) / most * total
    row_R = np.minimum(np.searchsorted(np.cumsum(counts_O), places), len(energy_O) - 1)
    return row_R, 1 / (most * np.maximum(energy_O[row_R], 1e-300))


def _energies(leaf: Leaf, inputs: Inputs) -> np.ndarray:
    """Of every row, (O,)."""
    parts = (to_float32(cut(leaf, own)) for own in row_parts(leaf, MOST_NUMBERS))
    each = [np.asarray(energy_by_output(own, inputs.second_moment), np.float64).reshape(-1) for own in parts]
    return np.concatenate(each)


@jax.jit
def _expert_energies(weights: ExpertWeights, moment_EI: jax.Array, output_EO: jax.Array) -> jax.Array:
    """Of every expert, by what its outputs count, (E,)."""
    (bucket,) = weights.buckets

    def of(own: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, moment_I, output_O = own
        matrix = to_float32(jax.tree.map(lambda a: a[index], bucket))
        return jnp.sum(energy_by_output(matrix, moment_I) * output_O)

    return jax.lax.map(of, (weights.index_E, moment_EI, output_EO))
