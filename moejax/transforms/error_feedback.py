"""Rounding with error feedback: columns not yet rounded make up for the errors of those that are.

Levels are traced, so that every shape, group size and kind of scale compiles once for all formats.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.formats import GroupedCodes, GroupFormat, Levels, ScaleKind
from moejax.formats.grouped import round_to_codes
from moejax.formats.scales import as_stored, encode_scales
from moejax.kernels import product
from moejax.machine import accelerator_memory
from moejax.transforms.hessian import DAMPING, damped, factor, in_whole_groups
from moejax.transforms.quantize import in_parts, search_scales

# Candidate scales, as shares of the best without feedback. Feedback adds others' errors to the weights of a group.
SHARES = np.asarray([0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35], np.float32)

# How often every code and scale is looked at again. The first sweep gains 20% at 1 bit and 8% at 4, two more half that.
SWEEPS = 3

# Rows rounded together at most: what rounding takes beside the weight grows with them. More are cut into equal parts.
# On an accelerator they take that share of its memory, if those are more.
MOST_ROWS = 8192
_SHARE_ACCELERATED = 1 / 48

# In which order columns are rounded: from the largest diagonal of the Hessian to the smallest, or from last to first.
ColumnOrder = Literal["diagonal", "natural"]

# Columns whose changes reach the rest of their group together; it divides every group size.
_COLUMNS = 8


class Rounded(NamedTuple):
    """A weight (O, I) on even levels, inputs first: Q[o, i] = steps_IO[i, o] * scale_NO[i // group_size, o]; I is a
    multiple of the group size.

    steps_IO: a code minus the one that stands for zero. scale_NO: float32, but a number that stored scales hold.
    """

    steps_IO: jax.Array
    scale_NO: jax.Array

    def weight_IO(self) -> jax.Array:
        """What was rounded to, transposed."""
        return self.steps_IO * jnp.repeat(self.scale_NO, len(self.steps_IO) // len(self.scale_NO), axis=0)


def quantize_with_feedback(
    weight: jax.Array,
    hessian: jax.Array,
    to: GroupFormat,
    damping: jax.Array | float = DAMPING,
    column_order: ColumnOrder = "diagonal",
) -> GroupedCodes:
    """Round a weight (..., O, I) to a format so that E|(W - Q) x|^2 is small, given the `hessian` E[x x^T] (I, I).

    `feed_back` rounds; `descend` then improves codes and scales. A row's result depends on no other row:
    matrices with the same input may be stacked along O; matrices with inputs of their own are batched by `jax.vmap`.

    Raises InputError if there is no such `column_order`.
    """
    inputs = weight.shape[-1]
    if column_order not in get_args(ColumnOrder):
        raise InputError(f"column_order is {column_order!r}; {' or '.join(get_args(ColumnOrder))} is accepted")

    def of_part(weight: jax.Array) -> GroupedCodes:
        weight_OI = weight.reshape(-1, inputs)
        rounded = round_rows(weight_OI, hessian, to.levels, to.group_size, damping, to.scale_kind, column_order)
        return pack(rounded, weight.shape, to)

    return in_parts(weight, rows_together(inputs), of_part)


def rows_together(inputs: int) -> int:
    """How many rows of so many inputs are rounded together, at most."""
    own = accelerator_memory()
    return MOST_ROWS if own is None else max(MOST_ROWS, int(_SHARE_ACCELERATED * own) // (4 * inputs))


@partial(jax.jit, static_argnames=("group_size", "scale_kind"))
def quantized_with_feedback(
    weight: jax.Array,
    hessian: jax.Array,
    levels_F: Levels,
    group_size: int,
    damping: jax.Array | float = DAMPING,
    scale_kind: ScaleKind = "bf16",
) -> jax.Array:
    """What `quantize_with_feedback` rounds a weight (..., O, I) to at each of F sorts of levels, (F, ..., O, I)
    float32: all of them step by step together, since a step takes a device that computes many numbers as long as few.
    """
    inputs = weight.shape[-1]

    def rounded(levels: Levels) -> jax.Array:
        own = round_rows(weight.reshape(-1, inputs), hessian, levels, group_size, damping, scale_kind)
        return own.weight_IO()[:inputs].T.reshape(weight.shape)

    return jax.vmap(rounded)(levels_F)


@partial(jax.jit, static_argnames=("group_size", "scale_kind", "column_order"))
def round_rows(
    weight_OI: jax.Array,
    hessian_II: jax.Array,
    levels: Levels,
    group_size: int,
    damping: jax.Array | float,
    scale_kind: ScaleKind,
    column_order: ColumnOrder = "diagonal",
) -> Rounded:
    """What `quantize_with_feedback` rounds rows (O, I) to; no row's result depends on another."""
    weight_IO, damped_II = in_whole_groups(weight_OI.T.astype(jnp.float32), damped(hessian_II, damping), group_size)
    fed_back = feed_back(weight_IO, damped_II, levels, group_size, scale_kind, column_order)
    return descend(weight_IO, damped_II, fed_back, levels, scale_kind=scale_kind)


def feed_back(
    weight_IO: jax.Array,
    hessian_II: jax.Array,
    levels: Levels,
    group_size: int,
    scale_kind: ScaleKind = "bf16",
    column_order: ColumnOrder = "diagonal",
) -> Rounded:
    """Round column by column (the weight's, here rows), errors fed back.

    With H = U^T U, U upper triangular, an error D = W - Q of one output costs

        D H D^T = sum_i U_ii^2 (D_i + sum_(j>i) D_j U_ij/U_ii)^2

    so columns are rounded from last to first, each to the level nearest to w_i + sum_(j>i) D_j U_ij/U_ii, its weight
    and the feedback. That is GPTQ (arXiv:2210.17323), or LDLQ (arXiv:2307.13304), without H's inverse. The sooner a
    column comes the more columns can make up for its error: by "diagonal" groups come in order of their sums of H_ii,
    and columns in that order within their group; by "natural" they stand as they are.

    A group's scale is chosen when its turn comes: the one of `SHARES` whose codes, each with its feedback, cost least.
    """
    natural = column_order == "natural"
    order_I = jnp.arange(len(weight_IO)) if natural else _by_diagonal(jnp.diagonal(hessian_II), group_size)
    upper_II = factor(hessian_II[order_I][:, order_I])
    pivot_I = jnp.diagonal(upper_II)
    feedback_II = jnp.triu(upper_II, 1) / pivot_I[:, None]
    start = jnp.zeros_like(weight_IO)

    def round_group(error_IO: jax.Array, n: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weight_GO, feedback_GI = weight_IO[_cut(order_I, n, group_size)], _cut(feedback_II, n, group_size)
        target_GO = weight_GO + product("gi,io->go", feedback_GI, error_IO)
        own_GG, cost_G = _cut(feedback_GI, n, group_size, axis=1), _cut(pivot_I, n, group_size) ** 2
        steps_GO, scale_O = _round_group(weight_GO, target_GO, own_GG, cost_G, levels, scale_kind)
        return _put(error_IO, weight_GO - steps_GO * scale_O, n), (steps_GO, scale_O)

    groups = jnp.arange(len(weight_IO) // group_size)
    _, (steps_NGO, scale_NO) = jax.lax.scan(round_group, start, groups, reverse=True)
    steps_IO = start.at[order_I].set(steps_NGO.reshape(start.shape), unique_indices=True)
    group_N = order_I[::group_size] // group_size
    return Rounded(steps_IO, jnp.zeros_like(scale_NO).at[group_N].set(scale_NO, unique_indices=True))


def descend(
    weight_IO: jax.Array,
    hessian_II: jax.Array,
    rounded: Rounded,
    levels: Levels,
    sweeps: int = SWEEPS,
    scale_kind: ScaleKind = "bf16",
) -> Rounded:
    """Lower the cost D H D^T of every output further, D = W - Q: `sweeps` times column by column, all else fixed.

    The level nearest to q_i + (H D)_i / H_ii costs least. After a group's columns its scale s has its turn, which with
    steps c costs least at s + c(H D)_g / (c H_gg c), and stays where that, as it is stored, is no gain.
    """
    group_size = len(weight_IO) // len(rounded.scale_NO)

    def descend_group(k: jax.Array, state: tuple[Rounded, jax.Array]) -> tuple[Rounded, jax.Array]:
        (steps_IO, scale_NO), error_IO = state
        n = k % len(scale_NO)
        hessian_GI, steps_GO = _cut(hessian_II, n, group_size), _cut(steps_IO, n, group_size)
        own_GG = _cut(hessian_GI, n, group_size, axis=1)
        slope_GO = product("gi,io->go", hessian_GI, error_IO)
        new_GO, scale_O = _descend_group(steps_GO, scale_NO[n], own_GG, slope_GO, levels, scale_kind)
        error_GO = _cut(error_IO, n, group_size) + steps_GO * scale_NO[n] - new_GO * scale_O
        return Rounded(_put(steps_IO, new_GO, n), scale_NO.at[n].set(scale_O)), _put(error_IO, error_GO, n)

    start = (rounded, weight_IO - rounded.weight_IO())
    return jax.lax.fori_loop(0, sweeps * len(rounded.scale_NO), descend_group, start)[0]


def _descend_group(
    steps_GO: jax.Array,
    scale_O: jax.Array,
    own_GG: jax.Array,
    slope_GO: jax.Array,
    levels: Levels,
    scale_kind: ScaleKind,
) -> tuple[jax.Array, jax.Array]:
    """Better steps, then a better scale, for one group; the slope is H D on entry.

    A few columns at a time, whose changes then reach the rest of the group together: half the time.
    """

    def recode_columns(n: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        steps_GO, slope_GO = state
        own_GB, before_BO = _cut(own_GG, n, _COLUMNS, axis=1), _cut(steps_GO, n, _COLUMNS)
        after_BO = _recode(before_BO, scale_O, _cut(own_GB, n, _COLUMNS), _cut(slope_GO, n, _COLUMNS), levels)
        change_BO = (after_BO - before_BO) * scale_O
        return _put(steps_GO, after_BO, n), slope_GO - product("gb,bo->go", own_GB, change_BO)

    steps_GO, slope_GO = jax.lax.fori_loop(0, len(steps_GO) // _COLUMNS, recode_columns, (steps_GO, slope_GO))
    gain_O = jnp.sum(steps_GO * slope_GO, axis=0)
    curvature_O = jnp.sum(steps_GO * product("gh,ho->go", own_GG, steps_GO), axis=0)
    fitted_O = as_stored(scale_O + gain_O / jnp.where(curvature_O > 0, curvature_O, 1), scale_kind)
    change_O = fitted_O - scale_O
    better_O = (change_O * (change_O * curvature_O - 2 * gain_O) < 0) & (fitted_O > 0)
    return steps_GO, jnp.where(better_O, fitted_O, scale_O)


def _recode(
    steps_BO: jax.Array, scale_O: jax.Array, own_BB: jax.Array, slope_BO: jax.Array, levels: Levels
) -> jax.Array:
    """Better steps for a few columns, one after the other."""
    curvature_B = jnp.diagonal(own_BB)

    def recode(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        steps_BO, slope_BO = state
        wanted_O = steps_BO[b] * scale_O + slope_BO[b] / jnp.where(curvature_B[b] > 0, curvature_B[b], 1)
        steps_O = round_to_codes(wanted_O, scale_O, levels) - levels.zero
        change_O = (steps_O - steps_BO[b]) * scale_O
        return steps_BO.at[b].set(steps_O), slope_BO - own_BB[b][:, None] * change_O

    # In one piece, without a step between: what a loop's steps cost on a GPU is nearly all that rounding takes there.
    return jax.lax.fori_loop(0, len(steps_BO), recode, (steps_BO, slope_BO), unroll=len(steps_BO))[0]


def _round_group(
    weight_GO: jax.Array,
    target_GO: jax.Array,
    own_GG: jax.Array,
    cost_G: jax.Array,
    levels: Levels,
    scale_kind: ScaleKind,
) -> tuple[jax.Array, jax.Array]:
    """Steps (G, O) and scales (O,) of one group. Targets hold the feedback of the groups before, own_GG its own."""
    group_size = len(weight_GO)
    guess_O1, _ = search_scales(target_GO.T, cost_G, levels, group_size, scale_kind)
    scale_SO = as_stored(jnp.asarray(SHARES)[:, None] * guess_O1[:, 0], scale_kind)

    def round_column(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        steps_GSO, error_GSO, cost_SO = state
        g = group_size - 1 - k
        target_SO = target_GO[g] + product("h,hso->so", own_GG[g], error_GSO)
        steps_SO = round_to_codes(target_SO, scale_SO, levels) - levels.zero
        rounded_SO = steps_SO * scale_SO
        cost_SO = cost_SO + cost_G[g] * (target_SO - rounded_SO) ** 2
        return steps_GSO.at[g].set(steps_SO), error_GSO.at[g].set(weight_GO[g] - rounded_SO), cost_SO

    start_GSO = jnp.zeros((group_size, *scale_SO.shape))
    steps_GSO, _, cost_SO = jax.lax.fori_loop(0, group_size, round_column, (start_GSO, start_GSO, start_GSO[0]))
    best_1O = jnp.argmin(cost_SO, axis=0)[None]
    steps_G1O = jnp.take_along_axis(steps_GSO, best_1O[None], axis=1)
    return steps_G1O[:, 0], jnp.take_along_axis(scale_SO, best_1O, axis=0)[0]


def _by_diagonal(diagonal_I: jax.Array, group_size: int) -> jax.Array:
    """Inputs from the least to the largest, group by group: groups by their sums, inputs within each."""
    diagonal_NG = diagonal_I.reshape(-1, group_size)
    order_N, order_NG = jnp.argsort(jnp.sum(diagonal_NG, axis=1)), jnp.argsort(diagonal_NG, axis=1)
    return (order_N[:, None] * group_size + order_NG[order_N]).reshape(-1)


def _cut(x: jax.Array, n: jax.Array, group_size: int, axis: int = 0) -> jax.Array:
    """The n-th group of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, n * group_size, group_size, axis)


def _put(x_IO: jax.Array, own_GO: jax.Array, n: jax.Array) -> jax.Array:
    """The n-th group of inputs replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x_IO, own_GO, n * len(own_GO), 0)


@partial(jax.jit, static_argnums=(1, 2))
def pack(rounded: Rounded, shape: tuple[int, ...], to: GroupFormat) -> GroupedCodes:
    """The weight of that shape (..., O, I), its rows side by side in what was rounded."""
    *outer, inputs = shape
    codes_OI = (rounded.steps_IO[:inputs] + to.levels.zero).T.astype(jnp.uint32)
    scale_ON = encode_scales(rounded.scale_NO.T, to.scale_kind)
    return to.leaf(to.pack(codes_OI.reshape(shape)), scale_ON.reshape(*outer, -1), inputs)
