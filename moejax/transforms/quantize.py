"""Rounding weights to even levels, group scales chosen to minimize the activation-weighted error.

Levels are traced in the search: it compiles once per shape, group size and kind of scale for all formats.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import GroupedCodes, GroupFormat, Levels, ScaleKind
from moejax.formats.group_format import encode
from moejax.formats.grouped import group, round_to_codes
from moejax.formats.scales import as_stored
from moejax.kernels import product

# Candidate scales, as shares of the one at which the largest weight of a group meets the outermost level. The best
# share falls from about 1 at 8 bits to 0.3 at 1 bit; 1 itself is among them, so that no group is worse than with it.
SHARES = np.linspace(0.20, 1.04, 22, dtype=np.float32)

# Weights whose scales are searched together at most: what the search takes, some six times as many numbers, grows with
# them.
MOST_WEIGHTS = 1 << 24


# Every share reads the weights again: of a matrix with more than caches hold, about so many are searched at a time.
_CACHED, _TOGETHER = 1 << 23, 1 << 19


def quantize(weight: jax.Array, second_moment: jax.Array, to: GroupFormat) -> GroupedCodes:
    """Round a weight (..., O, I) to a format, minimizing E|(W - Q) x|^2 over the group scales with x's entries taken as
    uncorrelated: sum_i h_i (w_oi - q_oi)^2 in every group, h = `second_moment` (..., I) of the input.

    The scale is the best of a grid or the least-squares scale for the codes it gave,
    s = sum_i h_i w_i c_i / sum_i h_i c_i^2 with c = code - zero.
    """

    def round_rows(weight: jax.Array) -> GroupedCodes:
        scale, _ = search_scales(weight, second_moment, to.levels, to.group_size, to.scale_kind)
        return _encode(weight, scale, to)

    if second_moment.ndim > 1:
        return round_rows(weight)
    return in_parts(weight, MOST_WEIGHTS // weight.shape[-1], round_rows)


def in_parts(weight: jax.Array, most_rows: int, round_rows: Callable[[jax.Array], GroupedCodes]) -> GroupedCodes:
    """`round_rows` of a weight (..., O, I), of which no row's result depends on another: in equal parts where there are
    more than `most_rows` rows."""
    *outer, inputs = weight.shape
    outputs = math.prod(outer)
    if outputs <= most_rows:
        return round_rows(weight)
    rows = math.ceil(outputs / math.ceil(outputs / most_rows))
    parts = [round_rows(own_OI) for own_OI in jnp.split(weight.reshape(-1, inputs), [*range(rows, outputs, rows)])]
    return jax.tree.map(lambda *own: jnp.concatenate(own).reshape(*outer, -1), *parts)


@partial(jax.jit, static_argnames=("group_size", "scale_kind"))
def search_scales(
    weight: jax.Array,
    second_moment: jax.Array,
    levels: Levels,
    group_size: int,
    scale_kind: ScaleKind = "bf16",
) -> tuple[jax.Array, jax.Array]:
    """Every group's best scale and its weighted squared error, both (..., O, ceil(I/group_size))."""
    *outer, inputs = weight.shape
    if len(outer) == 1 and weight.size > _CACHED:
        rows = math.gcd(outer[0], 1 << (_TOGETHER // inputs).bit_length() >> 1)
        of_rows = partial(_search_scales, levels=levels, group_size=group_size, scale_kind=scale_kind)
        found = jax.lax.map(lambda own_OI: of_rows(own_OI, second_moment), weight.reshape(-1, rows, inputs))
        return jax.tree.map(lambda own: own.reshape(outer[0], -1), found)
    return _search_scales(weight, second_moment, levels, group_size, scale_kind)


def _search_scales(
    weight: jax.Array, second_moment: jax.Array, levels: Levels, group_size: int, scale_kind: ScaleKind
) -> tuple[jax.Array, jax.Array]:
    w_grouped = group(weight.astype(jnp.float32), group_size)
    h_grouped = group(positive(second_moment), group_size)[..., None, :, :]
    largest = jnp.max(jnp.abs(w_grouped), axis=-1) / (levels.highest - levels.zero)

    def assess(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Error of every group under the scale as it will be stored, and the least-squares scale for its codes."""
        stored = as_stored(scale, scale_kind)[..., None]
        steps = round_to_codes(w_grouped, stored, levels) - levels.zero
        error = jnp.sum(h_grouped * (w_grouped - steps * stored) ** 2, axis=-1)
        step_norm2 = jnp.sum(h_grouped * steps**2, axis=-1)
        # With an odd number of levels, a group of zeros has no step but zero.
        fitted = jnp.sum(h_grouped * w_grouped * steps, axis=-1) / jnp.where(step_norm2 > 0, step_norm2, 1)
        return error, jnp.abs(fitted)

    def try_share(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale = largest * shares[i]
        return _better((*assess(scale), scale), best)

    shares = jnp.asarray(SHARES)
    start = (jnp.full_like(largest, jnp.inf), largest, largest)
    error, fitted, scale = jax.lax.fori_loop(0, len(shares), try_share, start)
    error, _, scale = _better((*assess(fitted), fitted), (error, fitted, scale))
    return scale, error


@partial(jax.jit, static_argnames=("group_size", "scale_kind"))
def quantization_errors(
    weight: jax.Array,
    second_moment: jax.Array,
    output_weight: jax.Array,
    levels_F: Levels,
    group_size: int,
    scale_kind: ScaleKind = "bf16",
) -> jax.Array:
    """sum_o r_o sum_i h_i (w_oi - q_oi)^2 of `quantize`'s result at each of F sorts of levels, (F, ...): the expected
    squared error of the outputs, each weighted by r = `output_weight` (..., O)."""

    def error_at(levels: Levels) -> jax.Array:
        _, error = search_scales(weight, second_moment, levels, group_size, scale_kind)
        return product("...og,...o->...", error, output_weight.astype(error.dtype))

    return jax.lax.map(error_at, levels_F)


def positive(second_moment: jax.Array) -> jax.Array:
    """Inputs that calibration never saw count a little, so that their weights are not left to chance.

    Where it saw none at all they count alike.
    """
    second_moment = second_moment.astype(jnp.float32)
    mean = jnp.mean(second_moment, axis=-1, keepdims=True)
    return jnp.where(mean > 0, jnp.maximum(second_moment, 1e-4 * mean), 1.0)


_encode = jax.jit(lambda weight, scale, to: encode(weight.astype(jnp.float32), scale, to), static_argnums=2)


def _better(candidate: tuple[jax.Array, ...], best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Group by group the one with the lower error, which comes first."""
    lower = candidate[0] < best[0]
    return tuple(jnp.where(lower, new, old) for new, old in zip(candidate, best, strict=True))
