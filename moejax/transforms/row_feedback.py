"""Rounding with error feedback between outputs too: rows not yet rounded make up for the errors of those that are, by
how the model's predictions depend on their outputs together (as in YAQA, arXiv:2505.22988)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from moejax.formats import GroupedCodes, GroupFormat, Levels, ScaleKind
from moejax.kernels import product
from moejax.transforms.error_feedback import Rounded, pack, round_rows
from moejax.transforms.hessian import factor
from moejax.transforms.quantize import positive

# Rows that are rounded without knowing of each other's errors, at most; in blocks of 64 KL divergence is 1 to 3 % more.
_ROWS = 16

# How much the outputs' Hessian's diagonal grows, as a share of its mean.
_DAMPING = 0.01


def quantize_with_row_feedback(
    weight: jax.Array, hessian: jax.Array, output_hessian: jax.Array, to: GroupFormat, damping: jax.Array | float
) -> GroupedCodes:
    """Round a weight (..., O, I) to a format so that E[d^T G d], d = (W - Q) x, is small, given `hessian` = E[x x^T]
    (I, I) and G = `output_hessian` (O, O): `quantize_with_feedback` of blocks of rows, one after another, each towards
    what makes up for those before it."""

    def of_matrix(weight_OI: jax.Array) -> GroupedCodes:
        rounded = _rounded(weight_OI, hessian, output_hessian, damping, to.levels, to.group_size, to.scale_kind)
        return pack(rounded, weight_OI.shape, to)

    for _ in range(weight.ndim - 2):
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(weight)


@partial(jax.jit, static_argnames=("group_size", "scale_kind"))
def _rounded(
    weight_OI: jax.Array,
    hessian_II: jax.Array,
    output_OO: jax.Array,
    damping: jax.Array | float,
    levels: Levels,
    group_size: int,
    scale_kind: ScaleKind,
) -> Rounded:
    outputs, inputs = weight_OI.shape
    feedback_MRO = row_feedback(output_OO, math.gcd(outputs, _ROWS))
    rows = feedback_MRO.shape[1]
    weight_OI = weight_OI.astype(jnp.float32)

    def round_block(error_OI: jax.Array, m: jax.Array) -> tuple[jax.Array, Rounded]:
        own_RI = jax.lax.dynamic_slice_in_dim(weight_OI, m * rows, rows)
        target_RI = own_RI + product("ro,oi->ri", feedback_MRO[m], error_OI)
        rounded = round_rows(target_RI, hessian_II, levels, group_size, damping, scale_kind)
        error_RI = own_RI - rounded.weight_IO()[:inputs].T
        return jax.lax.dynamic_update_slice_in_dim(error_OI, error_RI, m * rows, 0), rounded

    _, rounded_M = jax.lax.scan(round_block, jnp.zeros_like(weight_OI), jnp.arange(outputs // rows), reverse=True)
    return jax.tree.map(lambda own_MXR: jnp.moveaxis(own_MXR, 0, 1).reshape(own_MXR.shape[1], -1), rounded_M)


def row_feedback(output_OO: jax.Array, rows: int) -> jax.Array:
    """By what the errors of later rows come to a block of `rows` rows, (O / rows, rows, O).

    With G, damped, = U^T U, U upper triangular, errors E = W - Q (O, I) cost

        tr(G E H E^T) = sum over blocks b of tr(A_b H A_b^T),  A_b = U_bb (E_b + U_bb^-1 U_b,later E_later)

    so blocks are rounded from the last to the first, towards W_b + U_bb^-1 U_b,later E_later: what `feed_back` does to
    columns. Within a block rows count alike.
    """
    outputs = len(output_OO)
    damping = _DAMPING * jnp.mean(positive(jnp.diagonal(output_OO)))
    upper_MRO = factor(output_OO.astype(jnp.float32) + damping * jnp.eye(outputs)).reshape(-1, rows, outputs)

    def of_block(m: jax.Array) -> jax.Array:
        own_RR = jax.lax.dynamic_slice_in_dim(upper_MRO[m], m * rows, rows, axis=1)
        is_later_O = jnp.arange(outputs) >= (m + 1) * rows
        return jax.scipy.linalg.solve_triangular(own_RR, jnp.where(is_later_O, upper_MRO[m], 0))

    return jax.lax.map(of_block, jnp.arange(len(upper_MRO)))
