"""Errors of formats from a sample, for models whose every weight takes too long to round to every format.

Of a layer's experts EXPERTS are looked at, at even places in the order of what comes to them, sum g^2 |x|^2; of a
matrix ROWS rows, drawn in proportion to their energy (`imitate`), at even places of its running sum. They are rounded
to every format, as they will be if the plan says so, and give the kind's relative error, sum of errors / sum of
energies. Every matrix's error is its own energy times that; variants of the model have weights that err as much.
Variants, plans that are tried among them, see CHUNKS of the chunks held out, and experts are pruned on one of them.
(The first 128 or 256 tokens of eight, as many or half as many in all, led to plans with a tenth more KL divergence on a
55M model: contexts were too short.)
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import ExpertStatistics, Inputs
from moejax.formats import ExpertWeights, Format, Leaf, parse_format, row_parts
from moejax.model import DeepseekV3
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.rounded import ExpertsInFormats, InFormats, require_finite
from moejax.pipeline.variants import USED_ROWS
from moejax.planning import KEEP
from moejax.planning.parameters import count_parameters
from moejax.transforms.imitate import energy_by_output, imitate, imitate_expert
from moejax.transforms.rounder import AFRESH, MOST_NUMBERS, Rounder, Wanted, cut, some_rows
from moejax.transforms.rounding import rounding_error, rounding_errors, to_float32

EXPERTS, ROWS, CHUNKS = 8, 256, 4

OUTER = ("embed", "head")

# Of models with more numbers a sample is looked at, unless the recipe says otherwise.
MOST_WHOLE = 4_000_000_000


def is_sampled(recipe: Recipe, model: DeepseekV3) -> bool:
    """Whether prices of that model, which may be abstract, come from a sample."""
    if recipe.prices == "by size":
        return count_parameters(model).with_mtp > MOST_WHOLE
    return recipe.prices == "sampled"


class Sampled:
    """What is known of a sample; and the `Rounder` that imitates accordingly.

    relative: the relative error with which weights are imitated in every format, (F,), by a matrix's name in the model,
    or that of all experts' projection.
    """

    def __init__(self, formats: Sequence[Format], relative: Mapping[str, np.ndarray]):
        self.relative = dict(relative)
        self._formats = formats
        self._told: dict[str, np.ndarray] = {}

    def errors(self, own: InFormats) -> np.ndarray:
        """`InFormats.errors`, by some rows of the matrix."""
        inputs, output_O = own.inputs(), np.asarray(own.output_weight, np.float64).reshape(-1)
        energy_O = _energies(own.leaf, inputs)
        row_R, weight_R = _sample(energy_O, output_O)
        found_3F = self._errors(some_rows(own.leaf, row_R), inputs, weight_R)
        self.relative[own.name] = _imitated(found_3F)
        error_F = found_3F[0] * np.sum(energy_O * output_O)
        require_finite(own.name, own.leaf, error_F)
        return error_F

    def look_at_experts(self, own: ExpertsInFormats) -> None:
        """At some rows of each of those experts; together where all are rounded by their layer's Hessian."""
        rows, weights, energies = [], [], []
        every, output_EO = range(own.of.weights.num_experts), np.asarray(own.output_weight(), np.float64)
        for k in every:
            matrix = own.of.weights.expert(k)
            energy_O = _energies(matrix, own.of.inputs(k))
            row_R, weight_R = _sample(energy_O, output_EO[k])
            rows.append(some_rows(matrix, row_R))
            weights.append(weight_R)
            energies.append(float(np.sum(energy_O * output_EO[k])))
        # Each relative error counts as the expert's energy.
        share_E = np.asarray(energies) / sum(energies) if sum(energies) > 0 else np.full(len(every), 1 / len(every))
        each = [weight_R * share for weight_R, share in zip(weights, share_E, strict=True)]
        if own.of.shares_hessian:
            found_3F = self._errors(jnp.concatenate(rows), own.of.inputs(0), np.concatenate(each))
        else:
            found_3F = np.sum([self._errors(rows[k], own.of.inputs(k), each[k]) for k in every], axis=0)
        self._told[own.of.name], self.relative[own.of.name] = found_3F[0], _imitated(found_3F)

    def expert_errors(self, own: ExpertsInFormats) -> np.ndarray:
        """`ExpertsInFormats.errors`, of all experts of a layer some of which were looked at."""
        moment_EI = own.of.statistics.input_second_moment(own.of.own)
        energy_E = np.asarray(_expert_energies(own.of.weights, moment_EI, own.output_weight()), np.float64)
        error_EF = energy_E[:, None] * self._told[own.of.name]
        for k in np.flatnonzero(~np.isfinite(error_EF).all(axis=1)).tolist():
            require_finite(own.of.name_of(k), own.of.weights.expert(k), error_EF[k])
        return error_EF

    @property
    def afresh(self) -> Rounder:
        """As a `Rounder`: what does round."""
        return AFRESH

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        """As a `Rounder`; embedding and head are rounded, since they are few."""
        if target == KEEP or name in OUTER or name.startswith(USED_ROWS):
            return AFRESH.matrix(name, leaf, inputs, target)
        return imitate(to_float32(leaf), inputs.second_moment, *self._format_and_error(name, target))

    def experts(self, wanted: Sequence[Wanted]) -> list[list[Leaf]]:
        """As a `Rounder`."""
        return [list(map(partial(self._expert, own), own.some)) for own in wanted]

    def _expert(self, wanted: Wanted, k: int) -> Leaf:
        of = wanted.of
        if wanted.target == KEEP:
            return of.weights.expert(k)
        moment_EI = of.statistics.input_second_moment(of.own)
        return imitate_expert(of.weights, k, moment_EI, *self._format_and_error(of.name, wanted.target))

    def _format_and_error(self, name: str, target: str) -> tuple[Format, float]:
        to = parse_format(target)
        return to, float(self.relative[name][self._formats.index(to)])

    def _errors(self, row_RI: jax.Array, inputs: Inputs, weight_R: np.ndarray) -> np.ndarray:
        """Of some rows, by what they count, in every format, (3, F): the errors; and those of weights that imitate with
        a relative error of 1, by their inputs' Hessian, and with inputs taken as uncorrelated."""
        counts_R = jnp.asarray(weight_R, jnp.float32)
        told_F = rounding_errors(row_RI, inputs, self._formats, counts_R)
        if inputs.hessian is None:
            return np.stack([told_F, np.ones_like(told_F), np.ones_like(told_F)])
        imitated_2F = np.ones((2, len(told_F)))
        for f, to in enumerate(self._formats):
            own_RI = imitate(row_RI, inputs.second_moment, to, 1.0)
            for n, by in enumerate((inputs, inputs._replace(hessian=None))):
                imitated_2F[n, f] = rounding_error(row_RI, own_RI, by, counts_R)
        return np.stack([told_F, *imitated_2F])


def _imitated(found_3F: np.ndarray) -> np.ndarray:
    """The relative error with which weights imitate what is told of some: what imitates has errors that go along with
    the weights, which inputs that correlate make more of than of errors that were fed back."""
    told_F, correlated_F, alone_F = found_3F
    return told_F * alone_F / np.maximum(correlated_F, 1e-300)


def seen_by_variants(held_out_BT: np.ndarray, rounder: Rounder) -> np.ndarray:
    """Those of the chunks held out that variants with weights of that rounder see."""
    count = min(CHUNKS, len(held_out_BT)) if isinstance(rounder, Sampled) else len(held_out_BT)
    return held_out_BT[np.linspace(0, len(held_out_BT) - 1, count).round().astype(int)]


def experts_to_look_at(experts: ExpertStatistics) -> list[int]:
    """Their numbers, rising."""
    order = np.argsort(np.asarray(jnp.sum(experts.x2_ED, axis=1)), kind="stable")
    places = (np.arange(min(EXPERTS, len(order))) + 0.5) * len(order) / min(EXPERTS, len(order))
    return sorted(order[places.astype(int)].tolist())


def _sample(energy_O: np.ndarray, output_O: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, some perhaps twice, and by what their errors count, so that their sum is about the relative error."""
    counts_O = energy_O * output_O
    total = np.sum(counts_O)
    if not 0 < total < np.inf:
        counts_O, output_O, total = energy_O, np.ones_like(output_O), max(np.sum(energy_O), 1e-300)
    if len(energy_O) <= ROWS:
        return np.arange(len(energy_O)), output_O / total
    places = (np.arange(ROWS) + 0.5) / ROWS * total
    row_R = np.minimum(np.searchsorted(np.cumsum(counts_O), places), len(energy_O) - 1)
    return row_R, 1 / (ROWS * np.maximum(energy_O[row_R], 1e-300))


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
