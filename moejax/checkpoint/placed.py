"""An array on the devices where it is to lie, each part of it read once."""

from collections.abc import Callable

import jax
import numpy as np

from moejax.checkpoint.chunks import Index


def placed(like: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array whose parts `read` gives, on those devices of a shape's sharding that are this process's own."""
    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = tuple((own.start, own.stop) for own in index)
        if bounds not in parts:
            parts[bounds] = read(index)
        return parts[bounds]

    return jax.make_array_from_callback(like.shape, like.sharding, part)
