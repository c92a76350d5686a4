"""Weights that err as rounded ones would, without the search: for variants of a model that are only looked at.

A weight's energy is the expected square of its outputs, inputs taken as uncorrelated: sum_o r_o sum_i h_i w_oi^2 with
h = E[x^2]. What rounding makes of it is given as a share of that, its relative error, which matrices of a kind have in
common where their own errors differ by far.
"""

from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

from moejax.formats import ExpertWeights, Format, Levels, dense, matrix
from moejax.formats.grouped import about_zero, group, round_to_codes, ungroup
from moejax.kernels import product
from moejax.transforms.quantize import positive

# The step between levels that suits normal weights best, in deviations, by the number of levels: Max, "Quantizing for
# Minimum Distortion" (1960), table II.
_STEPS = MappingProxyType(
    {2: 1.596, 3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881, 64: 0.1041, 128: 0.0569, 256: 0.0308}
)


def energy_by_output(weight: jax.Array, second_moment: jax.Array) -> jax.Array:
    """sum_i h_i w_oi^2 of a weight (..., O, I) with h = `second_moment` (I,): (..., O)."""
    return _energy(weight, positive(second_moment))


def imitate(weight: jax.Array, second_moment: jax.Array, to: Format, relative_error: jax.Array | float) -> jax.Array:
    """A weight (..., O, I) with an error like that of a format, of that share of its energy:

        w + a (q - w),    a^2 sum h (q - w)^2 = relative_error * sum h w^2

    with h = `second_moment` (I,), and q on as many even levels as the format's bits are worth, their step what suits
    normal weights of the group's deviation. So it shrinks as rounded weights do.
    """
    return _imitate(weight, positive(second_moment), *_grid(to), relative_error, to.group_size)


def imitate_expert(
    weights: ExpertWeights, e: int, moment_EI: jax.Array, to: Format, relative_error: jax.Array | float
) -> jax.Array:
    """What `imitate` makes of expert e's matrix among those of one format, (O, I), whose inputs' second moments are
    `moment_EI`; in one step, since a layer has many."""
    return _imitate_expert(weights, e, moment_EI, *_grid(to), relative_error, to.group_size)


@partial(jax.jit, static_argnames="group_size")
def _imitate_expert(
    weights: ExpertWeights,
    e: int,
    moment_EI: jax.Array,
    levels: Levels,
    step: jax.Array | float,
    relative_error: jax.Array | float,
    group_size: int,
) -> jax.Array:
    (bucket,) = weights.buckets
    own = dense(matrix(bucket, weights.index_E[e]), jnp.dtype(jnp.float32))
    return _imitate(own, positive(moment_EI[e]), levels, step, relative_error, group_size)


def _grid(to: Format) -> tuple[Levels, float]:
    """Levels about zero, and their step in deviations."""
    count = round(2**to.bits)
    return about_zero(count), _STEPS[count]


@jax.jit
def _energy(weight: jax.Array, moment_I: jax.Array) -> jax.Array:
    return product("...oi,i->...o", weight.astype(jnp.float32) ** 2, moment_I)


@partial(jax.jit, static_argnames="group_size")
def _imitate(
    weight: jax.Array,
    moment_I: jax.Array,
    levels: Levels,
    step: jax.Array | float,
    relative_error: jax.Array | float,
    group_size: int,
) -> jax.Array:
    grouped = group(weight.astype(jnp.float32), group_size)
    scale = step * jnp.sqrt(jnp.mean(grouped**2, axis=-1, keepdims=True))
    rounded = (round_to_codes(grouped, scale, levels) - levels.zero) * scale
    error = ungroup(rounded - grouped, weight.shape[-1])
    own, wanted = jnp.sum(_energy(error, moment_I)), relative_error * jnp.sum(_energy(weight, moment_I))
    return weight + jnp.sqrt(wanted / jnp.maximum(own, 1e-30)) * error
