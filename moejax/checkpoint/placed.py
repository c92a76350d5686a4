"""An array on the devices where it is to lie, each part of it read once."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Sharding

from moejax.checkpoint.chunks import Index


def placed(shape: tuple[int, ...], read: Callable[[Index | None], np.ndarray], sharding: Sharding | None) -> jax.Array:
    """The array whose parts `read` gives, whole for None: on this process's own devices of a sharding, or without one
    on the default device."""
    if sharding is None:
        return jax.device_put(read(None))
    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = tuple((own.start, own.stop) for own in index)
        if bounds not in parts:
            parts[bounds] = read(index)
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part)
