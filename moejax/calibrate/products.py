"""What rounding needs of a weight's input, and the sums over tokens of x x^T that error feedback does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.kernels import expert_outer_products, product
from moejax.model.weights import IN_BLOCK


class Inputs(NamedTuple):
    """What rounding asks of a weight's input x: second_moment E[x^2] (I,), hessian E[x x^T] (I, I) or None where it was
    not collected, over how many tokens, and how many times the usual damping suits the hessian. output_hessian: by what
    errors of its outputs are weighed, (O, O), or None where they count alike and apart."""

    second_moment: jax.Array
    hessian: jax.Array | None = None
    tokens: jax.Array | float = 1.0
    damping: jax.Array | float = 1.0
    output_hessian: jax.Array | None = None


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
    wide_RI = x_RI.astype(jnp.float32)
    own_EII = expert_outer_products(wide_RI, wide_RI, rows_E)
    return own_EII, jnp.sum(own_EII, axis=0)
