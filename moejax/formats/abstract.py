"""Arrays known by shape and dtype alone."""

from typing import cast

import jax


def abstract_array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Stands where an array of that shape will stand."""
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))
