"""Arrays known by shape and dtype alone, and slices of arrays that cost what they return, inside a loop too."""

import math
from typing import cast

import jax
import jax.numpy as jnp


def abstract_array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Stands where an array of that shape will stand."""
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))


def array_bytes(array: jax.Array) -> int:
    """Of an array, abstract or concrete."""
    return math.prod(array.shape) * array.dtype.itemsize


def slice_axis(array: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    """Elements start to start+size along `axis`; start may be traced.

    XLA for CPU slices no narrow floats: it would convert the whole array to wider ones first. Bits it slices, but no
    gradient with respect to narrow floats passes through them.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize >= 4:
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(bits, start, size, axis), array.dtype)
