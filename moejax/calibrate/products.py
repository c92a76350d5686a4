"""What rounding needs of a weight's input, and the sums over tokens of x x^T that error feedback does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.kernels import product
from moejax.model.weights import IN_BLOCK

# The most rows of an expert that are multiplied at once.
_ROW_BLOCK = 128


class Inputs(NamedTuple):
    """What rounding asks of a weight's input x: second_moment E[x^2] (I,), hessian E[x x^T] (I, I) or None where it was
    not collected, over how many tokens, and how many times the usual damping suits the hessian."""

    second_moment: jax.Array
    hessian: jax.Array | None = None
    tokens: jax.Array | float = 1.0
    damping: jax.Array | float = 1.0


def input_name(weight: str) -> str:
    """The weight, of the same block, under whose name the sum for this one's input is held."""
    return IN_BLOCK[weight].same_input or weight


def input_products(taps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """sum x x^T (I, I) of every distinct input x (..., I)."""
    return {name: products(x) for name, x in taps.items() if input_name(name) == name}


def products(x: jax.Array) -> jax.Array:
    """sum x x^T over all but the last axis, (I, I), in float32."""
    x_TI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return product("ti,tj->ij", x_TI, x_TI)


def expert_products(x_RI: jax.Array, rows_E: jax.Array, max_bytes_each: int) -> tuple[jax.Array | None, jax.Array]:
    """sum x x^T over each expert's rows, (E, I, I), or None where one takes more than `max_bytes_each`; and over all
    rows, (I, I). Rows are sorted by expert, the first rows_E[0] belong to expert 0 and so on; the rest are zero."""
    if 4 * x_RI.shape[1] ** 2 > max_bytes_each:
        return None, products(x_RI)
    own_EII = _products_by_expert(x_RI, rows_E)
    return own_EII, jnp.sum(own_EII, axis=0)


def _products_by_expert(x_RI: jax.Array, rows_E: jax.Array) -> jax.Array:
    """An expert's rows are visited in blocks, so that the work is one product per row, however many experts."""
    block = min(_ROW_BLOCK, len(x_RI))

    def of_expert(last_and_rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        end, rows = last_and_rows

        def add_block(b: jax.Array, sum_II: jax.Array) -> jax.Array:
            first = end - rows + b * block
            start = jnp.minimum(first, len(x_RI) - block)  # the last block lies wholly inside
            row = start + jnp.arange(block)
            own = (first <= row) & (row < end)
            return sum_II + products(jnp.where(own[:, None], jax.lax.dynamic_slice_in_dim(x_RI, start, block), 0))

        return jax.lax.fori_loop(0, -(-rows // block), add_block, jnp.zeros(2 * x_RI.shape[1:], jnp.float32))

    return jax.lax.map(of_expert, (jnp.cumsum(rows_E), rows_E))
