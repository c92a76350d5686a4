"""An array on the devices where it is to lie, each part of it read once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from moejax.checkpoint.chunks import MOST_CHUNKS, Index


def placed(like: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array whose parts `read` gives, several at once, on those devices of a shape's sharding that are this
    process's own. Devices on which the same lies are given one part."""
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    different = {_bounds(index): index for index in indices}
    with ThreadPoolExecutor(max_workers=MOST_CHUNKS) as pool:
        parts = dict(zip(different, pool.map(read, different.values()), strict=True))
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: parts[_bounds(index)])


def _bounds(index: Index | None) -> tuple[tuple[int | None, int | None], ...]:
    assert index is not None
    return tuple((own.start, own.stop) for own in index)
